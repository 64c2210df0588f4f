"""Using trained models, for Python code: `from inference import Predictor`.

`predict`: expressions of the faces in pictures. `outputs`: rows, annotated pictures and features of
main_predict. `explanation`: attention maps of classifiers. `visualize`: figures of a model on a
data set. `examples`: right and wrong predictions on a test set. `annotate`: boxes and labels on
pictures. `page…`, `same_origin`, `upload_limits`: the web page.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference.predict import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> object:
    """Import Predictor at its first use: programs check their options without torch."""
    if name == "Predictor":
        from inference.predict import Predictor

        return Predictor
    raise AttributeError(f"module 'inference' has no attribute {name!r}")
