"""Applies a saved classifier to faces: probabilities and features."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from datasets.faces.pictures import FoundFaces
from models_saved import Saved, SavedClassifier
from training.precision import Precision
from util.options.predict import MARGIN


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


class Prediction(NamedTuple):
    """A model's outputs for n faces."""

    probabilities: np.ndarray  # (n, K) float32, rows sum to 1
    features: np.ndarray  # (n, D) float32: the input of the head

    def is_finite(self) -> bool:
        """Whether there are no NaN or infinite values."""
        return all(np.isfinite(values).all() for values in self)


class Predictor:
    """A classifier on a device, together with its preprocessing."""

    def __init__(self, saved: SavedClassifier, device: torch.device) -> None:
        """Computes in fp32, so that results hardly depend on the other faces in a batch.

        If the model was tested with mirrored images, predictions use them too.
        """
        self.classes, self.device = saved.classes, device
        self.view = saved.preprocessing.view
        self._blank = self.view(np.zeros((8, 8, 3), np.uint8)).numpy()
        self._precision = Precision("off", device)
        self._normalise = saved.preprocessing.normalise.to(device)
        self._model, self._flip = saved.model.to(device).eval(), saved.flip

    def __call__(self, faces: Sequence[np.ndarray]) -> Prediction:
        """n pictures of faces, (H, W, 3) uint8 each -> Prediction, in one forward pass."""
        return self.of_views([self.view(face).numpy() for face in faces])

    @torch.no_grad()
    def of_views(self, views: Sequence[np.ndarray]) -> Prediction:
        """The same for faces preprocessed by `view`, (3, S, S) uint8 each."""
        n = len(views)  # not all layers take an empty batch
        imgs = torch.from_numpy(np.stack(views if n else [self._blank]))
        x = self._normalise(imgs.to(self.device))
        with self._precision.autocast():
            features = self._model.forward_features(x)
            p = self._model.head(features).softmax(dim=-1)
            if self._flip:
                p = (p + self._model(x.flip(-1)).softmax(dim=-1)) / 2
        return Prediction(p[:n].cpu().numpy(), features[:n].cpu().numpy())


def device_name(device: torch.device) -> str:
    """A device in words, with the model name if it is a GPU."""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device}{name}"


def predict_pictures(
    found: Iterable[FoundFaces], predictor: Predictor, batch_size: int
) -> Iterator[tuple[FoundFaces, Prediction]]:
    """Yields each picture, in order, with the prediction for its faces.

    Faces of several pictures share a batch; those of a picture with more faces are split.
    """
    waiting: list[FoundFaces] = []
    for picture in found:
        waiting.append(picture)
        # Pictures without faces count too, so that they are not held back for long.
        if sum(max(1, len(one.views)) for one in waiting) >= batch_size:
            yield from _predicted(waiting, predictor, batch_size)
            waiting = []
    yield from _predicted(waiting, predictor, batch_size)


def _predicted(
    pictures: list[FoundFaces], predictor: Predictor, batch_size: int
) -> Iterator[tuple[FoundFaces, Prediction]]:
    views = [view for picture in pictures for view in picture.views]
    starts = range(0, max(1, len(views)), batch_size)
    batches = [predictor.of_views(views[i : i + batch_size]) for i in starts]
    p, features = (np.concatenate(part) for part in zip(*batches, strict=True))
    end = 0
    for picture in pictures:
        start, end = end, end + len(picture.views)
        yield picture, Prediction(p[start:end], features[start:end])
