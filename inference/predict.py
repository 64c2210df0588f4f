"""Finds faces in pictures and applies a saved classifier to them: probabilities and features.

main_predict.py, the web page and code of others all use `Predictor`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from datasets.decode import UnreadableImage
from datasets.faces.pictures import FaceFinder, FoundFaces, Picture, find_faces
from datasets.transforms import Box
from models_saved import Saved, SavedClassifier, open_classifier
from training.precision import Precision
from util.distributed import ProcessInfo, pick_device
from util.errors import BadInput, Fault
from util.options.predict import DETECTORS, LARGEST_MARGIN, MARGIN

T = TypeVar("T")
DTYPES = {"float32": "off", "bfloat16": "bf16", "float16": "fp16"}  # and the modes of Precision


def face_margin(saved: Saved, given: float | None) -> tuple[float, str]:
    """The margin for cropping faces, and a line about it: `given`, else as in training."""
    own = saved.preprocessing.face_margin
    margin = next((m for m in (given, own) if m is not None), MARGIN)
    how = f"faces are cropped with --face_margin {margin:g}"
    if own is None:
        assumed = " (assumed: the checkpoint does not say)" if given is None else ""
        return margin, how + assumed
    if own == margin:
        return margin, f"{how}, as in training"
    return margin, f"warning: {how}; trained with --face_margin {own:g}"


def whole_line(margin: float | None) -> str:
    """The line to print without a detector; `margin`: see Preprocessing.face_margin."""
    if margin is None:
        return "each picture is used whole, as a face"
    return (
        "warning: each picture is used whole, but training cropped faces from photographs with "
        f"--face_margin {margin:g}: give pictures cropped in the same way"
    )


def cropping(saved: Saved, detector: str, given: float | None) -> tuple[float, str]:
    """The margin for the faces that a detector finds, and a line about it.

    Raises BadInput for arguments that cannot work.
    """
    if detector not in DETECTORS:
        raise BadInput(f"detector {detector}: no such detector; use {' or '.join(DETECTORS)}")
    if given is not None and not 0 <= given <= LARGEST_MARGIN:
        raise BadInput(f"face_margin {given}: must be from 0 to {LARGEST_MARGIN}")
    if given is not None and detector == "none":
        raise BadInput("face_margin: without a detector pictures are used whole; leave it out")
    margin, line = face_margin(saved, given)
    return margin, whole_line(saved.preprocessing.face_margin) if detector == "none" else line


class Prediction(NamedTuple):
    """A model's outputs for n faces."""

    probabilities: np.ndarray  # (n, K) float32, rows sum to 1
    features: np.ndarray  # (n, D) float32: the input of the head

    def labels(self, classes: Sequence[str]) -> list[str]:
        """The most probable class of each face; `classes`: the names of all K."""
        return [classes[k] for k in self.probabilities.argmax(axis=1)]

    def is_finite(self) -> bool:
        """Whether there are no NaN or infinite values."""
        return all(np.isfinite(values).all() for values in self)


class PredictedFace(NamedTuple):
    """A face in a picture, and its expression."""

    box: Box  # left, top, width, height in pixels of the upright picture
    score: float  # the detector's, 0–1; 1 without a detector
    label: str  # the most probable class
    probabilities: dict[str, float]  # by class, in the order of the model's outputs


class Predictor:
    """Finds the faces in pictures and predicts their expressions with a fine-tuned model.

    A picture is a path, a PIL image, or a NumPy array (H, W, 3) uint8 in RGB, not OpenCV's BGR. Any
    number of threads can use the same predictor.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike | SavedClassifier,
        device: str | torch.device = "auto",
        *,
        dtype: str | torch.dtype = "float32",
        classes: Sequence[str] = (),
        detector: str = DETECTORS[0],
        face_margin: float | None = None,
        min_score: float = 0.0,
        batch_size: int = 32,
    ) -> None:
        """Open the checkpoint, or use an open one. Most arguments are options of main_predict.py.

        `device`: auto, cuda, mps or cpu. `dtype`: of the model's arithmetic, see DTYPES; in
        float32, results hardly depend on the other faces in a batch. If the model was tested with
        mirrored images, predictions use them too. Raises BadInput, a ValueError, for a file that is
        no classifier and for arguments that cannot work.
        """
        opened = isinstance(checkpoint, SavedClassifier)
        if opened and classes:
            raise BadInput("classes: the checkpoint is open; name them in open_classifier")
        saved = checkpoint if opened else open_classifier(checkpoint, classes)
        chosen = isinstance(device, torch.device)
        self.device = device if chosen else pick_device(device, ProcessInfo())
        self._precision = Precision(precision_of(dtype, self.device), self.device)
        self.name, self.classes, self.notes = saved.name, saved.classes, saved.notes
        self.view = saved.preprocessing.view
        margin, self.cropping = cropping(saved, detector, face_margin)
        self._find = FaceFinder(detector, margin, min_score, self.view)
        self._source, self._batch_size = saved.name if opened else str(checkpoint), batch_size
        self._blank = self.view(np.zeros((8, 8, 3), np.uint8)).numpy()
        self._normalise = saved.preprocessing.normalise.to(self.device)
        self._model, self._flip = saved.model.to(self.device).eval(), saved.flip

    def __call__(
        self, pictures: Picture | Iterable[Picture]
    ) -> list[PredictedFace] | list[list[PredictedFace]]:
        """The faces of a picture, from left to right; [] if there are none.

        Of several pictures, of any kinds: a list with the faces of each. Raises UnreadableImage for
        the first picture that cannot be read; `stream` continues after it.
        """
        return self._each(pictures, self._faces)

    def features(self, pictures: Picture | Iterable[Picture]) -> np.ndarray | list[np.ndarray]:
        """The features of the same faces, (n, D) float32: the input of the model's last layer."""
        return self._each(pictures, lambda _, prediction: prediction.features)

    def stream(
        self, pictures: Iterable[Picture], workers: int = 0
    ) -> Iterator[tuple[FoundFaces, Prediction]]:
        """Yields each picture, in order, with the prediction for its faces.

        For any number of pictures: faces of several share a batch, those of one with more faces are
        split. A picture that cannot be read has a `problem` and no faces. `workers`: processes that
        read pictures and find faces. Raises Fault for outputs that are not finite.
        """
        waiting: list[FoundFaces] = []
        for found in find_faces(pictures, self._find, workers):
            waiting.append(found)
            # Pictures without faces count too, so that they are not held back for long.
            if sum(max(1, len(one.views)) for one in waiting) >= self._batch_size:
                yield from self._predicted(waiting)
                waiting = []
        yield from self._predicted(waiting)

    def of_faces(self, faces: Sequence[np.ndarray]) -> Prediction:
        """n faces that are cut out already, (H, W, 3) uint8 each -> Prediction, in one pass."""
        return self.of_views([self.view(face).numpy() for face in faces])

    @torch.no_grad()
    def of_views(self, views: Sequence[np.ndarray]) -> Prediction:
        """The same for faces preprocessed by `view`, (3, S, S) uint8 each."""
        n = len(views)  # not all layers take an empty batch
        imgs = torch.from_numpy(np.stack(views if n else [self._blank]))
        x = self._normalise(imgs.to(self.device))
        with self._precision.autocast():
            features = self._model.forward_features(x)
            p = self._model.head(features).float().softmax(dim=-1)
            if self._flip:
                p = (p + self._model(x.flip(-1)).float().softmax(dim=-1)) / 2
        return Prediction(p[:n].cpu().numpy(), features[:n].float().cpu().numpy())

    def _each(self, pictures: Picture | Iterable[Picture], result: Callable[..., T]) -> T | list[T]:
        """A result for the picture, or a list of them for several."""
        alone = isinstance(pictures, Picture | bytes) and getattr(pictures, "ndim", 0) != 4
        results = []
        for found, prediction in self.stream([pictures] if alone else pictures):
            if found.problem:
                raise UnreadableImage(found.path or f"picture {len(results)}", found.problem)
            results.append(result(found, prediction))
        return results[0] if alone else results

    def _faces(self, found: FoundFaces, prediction: Prediction) -> list[PredictedFace]:
        faces = zip(found.faces, prediction.labels(self.classes), strict=True)
        return [
            PredictedFace(face.box, face.score, label, dict(zip(self.classes, p, strict=True)))
            for (face, label), p in zip(faces, prediction.probabilities.tolist(), strict=True)
        ]

    def _predicted(self, pictures: list[FoundFaces]) -> Iterator[tuple[FoundFaces, Prediction]]:
        views = [view for picture in pictures for view in picture.views]
        starts = range(0, max(1, len(views)), self._batch_size)
        batches = [self.of_views(views[i : i + self._batch_size]) for i in starts]
        p, features = (np.concatenate(part) for part in zip(*batches, strict=True))
        end = 0
        for picture in pictures:
            start, end = end, end + len(picture.views)
            prediction = Prediction(p[start:end], features[start:end])
            if not prediction.is_finite():
                what = picture.path or "a picture"
                raise Fault(f"{self._source}: its outputs for {what} are not finite")
            yield picture, prediction


def precision_of(dtype: str | torch.dtype, device: torch.device) -> str:
    """The mode of Precision for one of DTYPES. Raises BadInput for one that does not work here."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BadInput(f"dtype {name}: choose from {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise BadInput("dtype float16: needs a GPU; use float32 or bfloat16 on the CPU")
    return DTYPES[name]


def device_name(device: torch.device) -> str:
    """A device in words, with the model name if it is a GPU."""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device}{name}"
