"""A saved classifier on faces: probabilities and features."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine_train import Precision
from models_saved import SavedClassifier


class Prediction(NamedTuple):
    """What a model says of n faces."""

    probabilities: np.ndarray  # (n, K) float32, rows sum to 1
    features: np.ndarray  # (n, D) float32: what the last layer sees


class Predictor:
    """A classifier on a device, together with what it wants done to a picture before."""

    def __init__(self, saved: SavedClassifier, device: torch.device) -> None:
        """In fp32, so that a face's numbers hardly depend on the others in its batch."""
        self.classes, self.device = saved.classes, device
        self.view, self._size = saved.preprocessing.view, saved.preprocessing.input_size
        self._precision = Precision("off", device)
        self._normalise = saved.preprocessing.normalise.to(device)
        self._model = saved.model.to(device).eval()

    @torch.no_grad()
    def __call__(self, faces: Sequence[np.ndarray]) -> Prediction:
        """n pictures of faces, (H, W, 3) uint8 each -> see Prediction. One forward pass."""
        views = [self.view(face) for face in faces]
        x = torch.stack(views) if views else torch.empty(0, 3, self._size, self._size)
        with self._precision.autocast():
            features = self._model.forward_features(self._normalise(x.to(self.device)))
            p = self._model.head(features).softmax(dim=-1)
        return Prediction(p.cpu().numpy(), features.cpu().numpy())
