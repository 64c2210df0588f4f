"""A saved classifier on faces: probabilities and features."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from datasets.faces.pictures import Found
from engine_train import Precision
from models_saved import Saved, SavedClassifier
from util.options.predict import MARGIN


def face_margin(saved: Saved, given: float | None) -> tuple[float, str]:
    """The margin to cut faces with, and a line on it: as asked for, else as in training."""
    own = saved.preprocessing.face_margin
    margin = next((m for m in (given, own) if m is not None), MARGIN)
    how = f"faces are cut with --face_margin {margin:g}"
    if own is None:
        assumed = " (assumed: the checkpoint names none)" if given is None else ""
        return margin, how + assumed
    if own == margin:
        return margin, f"{how}, as in training"
    return margin, f"warning: {how}; trained with --face_margin {own:g}"


def whole_line(margin: float | None) -> str:
    """What no detector means for a model whose faces were cut with a margin in training."""
    if margin is None:
        return "each picture is used whole, as a face"
    return (
        "warning: each picture is used whole; training cut faces from photographs with "
        f"--face_margin {margin:g}: give pictures that are cut like that"
    )


class Prediction(NamedTuple):
    """What a model says of n faces."""

    probabilities: np.ndarray  # (n, K) float32, rows sum to 1
    features: np.ndarray  # (n, D) float32: what the head sees


class Predictor:
    """A classifier on a device, together with what it wants done to a picture before."""

    def __init__(self, saved: SavedClassifier, device: torch.device) -> None:
        """In fp32, so that a face's numbers hardly depend on the others in its batch.

        A model that was tested with mirrored images is used so, too.
        """
        self.classes, self.device = saved.classes, device
        self.view = saved.preprocessing.view
        self._blank = self.view(np.zeros((8, 8, 3), np.uint8)).numpy()
        self._precision = Precision("off", device)
        self._normalise = saved.preprocessing.normalise.to(device)
        self._model, self._flip = saved.model.to(device).eval(), saved.flip

    def __call__(self, faces: Sequence[np.ndarray]) -> Prediction:
        """n pictures of faces, (H, W, 3) uint8 each -> see Prediction. One forward pass."""
        return self.of_views([self.view(face).numpy() for face in faces])

    @torch.no_grad()
    def of_views(self, views: Sequence[np.ndarray]) -> Prediction:
        """The same of what `view` made of each, (3, S, S) uint8."""
        n = len(views)  # not all layers take an empty batch
        imgs = torch.from_numpy(np.stack(views if n else [self._blank]))
        x = self._normalise(imgs.to(self.device))
        with self._precision.autocast():
            features = self._model.forward_features(x)
            p = self._model.head(features).softmax(dim=-1)
            if self._flip:
                p = (p + self._model(x.flip(-1)).softmax(dim=-1)) / 2
        return Prediction(p[:n].cpu().numpy(), features[:n].cpu().numpy())


def predict_pictures(
    found: Iterable[Found], predictor: Predictor, batch_size: int
) -> Iterator[tuple[Found, Prediction]]:
    """Each picture, in their order, with the prediction of its faces.

    Faces of several pictures share a batch; a picture with more of them goes through in parts.
    """
    waiting: list[Found] = []
    for picture in found:
        waiting.append(picture)
        # Pictures without faces count as well: what is known of them need not wait for ever.
        if sum(max(1, len(one.views)) for one in waiting) >= batch_size:
            yield from _predicted(waiting, predictor, batch_size)
            waiting = []
    yield from _predicted(waiting, predictor, batch_size)


def _predicted(
    pictures: list[Found], predictor: Predictor, batch_size: int
) -> Iterator[tuple[Found, Prediction]]:
    views = [view for picture in pictures for view in picture.views]
    starts = range(0, max(1, len(views)), batch_size)
    batches = [predictor.of_views(views[i : i + batch_size]) for i in starts]
    p, features = (np.concatenate(part) for part in zip(*batches, strict=True))
    end = 0
    for picture in pictures:
        start, end = end, end + len(picture.views)
        yield picture, Prediction(p[start:end], features[start:end])
