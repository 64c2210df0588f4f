"""The content of the web page: checkpoints, expressions, attention maps, reconstructions.

Without gradio, which lays it out: see `page_layout`. The faces come from `page_picture`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine_pretrain import reconstruct, shown_with
from inference.explanation import attention_map
from inference.page_picture import Picture
from inference.predict import Predictor
from models_saved import (
    Peeked,
    SavedAutoencoder,
    SavedClassifier,
    open_autoencoder,
    open_classifier,
    peek,
)
from util.errors import BadInput
from util.predictions import COLUMNS, OK, csv_line, inert
from util.report.figures import overlay, reconstruction_grid

ENDINGS = (".pth", ".pt", ".safetensors")
MOST_OPEN = 3  # checkpoints in memory: two to compare and one for masks
SHOWN = 336  # side length in pixels of a face on the page


class Checkpoints:
    """The checkpoints in a folder by type, opened on demand; the last few are kept in memory."""

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        """Raises BadInput when the folder has no checkpoint that the page can show."""
        self.folder, self.device = Path(folder), device
        if not self.folder.is_dir():
            raise BadInput(f"--checkpoints {folder}: no such folder")
        found = sorted(p for p in self.folder.rglob("*") if p.suffix in ENDINGS and p.is_file())
        looked_through = tqdm(found, "checkpoints", unit="file", delay=2, leave=False)
        seen = {path: peek(path) for path in looked_through}
        self.classifiers = self._named(seen, "classifier")
        self.autoencoders = self._named(seen, "autoencoder")
        if not self.classifiers and not self.autoencoders:
            raise BadInput(
                f"--checkpoints {folder}: none of its {len(found)} files is a checkpoint that can "
                "be shown; name the folder of a pre-training or fine-tuning run, or run `make demo`"
            )
        self._opened: dict[tuple, Any] = {}  # by path and version, the last used at the end

    def classifier(self, name: str) -> tuple[SavedClassifier, Predictor]:
        """One of `classifiers`. Raises BadInput."""
        return self._open(self._classifier, name, self.classifiers)

    def autoencoder(self, name: str) -> SavedAutoencoder:
        """One of `autoencoders`. Raises BadInput."""
        return self._open(self._autoencoder, name, self.autoencoders)

    def is_open(self, name: str) -> bool:
        """Whether a checkpoint is in memory already."""
        return any(path == self.folder / name for path, _ in self._opened)

    def _open(self, load: Callable[[Path], Any], name: str, known: Sequence[str]) -> Any:
        key = path, _ = self._current(name, known)
        self._opened[key] = self._opened.pop(key, None) or load(path)
        if len(self._opened) > MOST_OPEN:
            del self._opened[next(iter(self._opened))]
        return self._opened[key]

    def _named(self, seen: dict[Path, Peeked], kind: str) -> list[str]:
        """Paths within the folder: best epochs, last epochs, then others, each by best result."""
        order = {"checkpoint-best.pth": 0, "checkpoint-last.pth": 1}
        paths = [path for path, peeked in seen.items() if peeked.kind == kind]
        paths.sort(key=lambda path: (order.get(path.name, 2), -seen[path].best, path))
        return [str(path.relative_to(self.folder)) for path in paths]

    def _classifier(self, path: Path) -> tuple[SavedClassifier, Predictor]:
        saved = open_classifier(path)
        return saved, Predictor(saved, self.device)

    def _autoencoder(self, path: Path) -> SavedAutoencoder:
        saved = open_autoencoder(path)
        saved.model.to(self.device)
        return saved

    def _current(self, name: str, known: Sequence[str]) -> tuple[Path, tuple]:
        """The path of a checkpoint and its version, which changes when a run replaces the file."""
        if name not in known:  # requests are not trusted
            raise BadInput(f"{name}: no such checkpoint")
        path = self.folder / name
        try:
            found = path.stat()
        except OSError as error:
            reason = error.strerror
            raise BadInput(f"{name}: can no longer be read ({reason}); choose another") from None
        return path, (found.st_ino, found.st_mtime_ns, found.st_size)


class Seen(NamedTuple):
    """A classifier's view of a face."""

    probabilities: dict[str, float]  # by class
    attention: np.ndarray  # (SHOWN, SHOWN, 3) uint8: what the model sees, under its attention map
    method: str  # of that map

    @property
    def label(self) -> str:
        """The most probable class."""
        return max(self.probabilities, key=self.probabilities.get)


def explain_faces(
    saved: SavedClassifier, predictor: Predictor, faces: Sequence[np.ndarray]
) -> list[Seen]:
    """Predictions and attention maps of a classifier for faces, (H, W, 3) uint8 each.

    Raises BadInput for a classifier whose outputs are not finite.
    """
    views = torch.stack([predictor.view(face) for face in faces])
    p = predictor.of_views(list(views.numpy())).probabilities
    if not np.isfinite(p).all():
        raise BadInput("This checkpoint's outputs are not finite; choose another.")
    device = predictor.device
    x = saved.preprocessing.normalise.to(device)(views.to(device))
    heat = attention_map(saved.model, x, torch.from_numpy(p.argmax(axis=1))).cpu()
    heat = torch.nn.functional.interpolate(heat[:, None], (SHOWN, SHOWN), mode="bilinear")[:, 0]
    shown = [enlarged(view.permute(1, 2, 0).numpy()) for view in views]
    maps = [overlay(picture, h) for picture, h in zip(shown, heat.numpy(), strict=True)]
    shares = [dict(zip(saved.classes, row, strict=True)) for row in p.tolist()]
    method = saved.model.explained_by
    return [Seen(*one, method) for one in zip(shares, maps, strict=True)]


def face_table(picture: Picture, seen: Mapping[str, Sequence[Seen]]) -> str:
    """The faces of a picture as CSV, with main_predict.py's columns after the checkpoint's name.

    `seen`: by checkpoint, one per face. Classes that one of several checkpoints does not have are
    empty in its rows.
    """
    classes = dict.fromkeys(c for faces in seen.values() for c in faces[0].probabilities)
    lines = [csv_line(["checkpoint", *COLUMNS, *(f"p_{name}" for name in classes)])]
    for name, faces in seen.items():
        for k, (face, one) in enumerate(zip(picture.faces, faces, strict=True)):
            p = [one.probabilities.get(c) for c in classes]
            row = [inert(picture.name), k, *face.box, face.score, one.label, OK, *p]
            lines.append(csv_line([inert(name), *row]))
    return "".join(lines)


def mask_and_reconstruct(
    saved: SavedAutoencoder, face: np.ndarray, mask_ratio: float, seed: int
) -> np.ndarray:
    """(H, W, 3) uint8 -> one picture of the face: original, masked, reconstructed."""
    model = saved.model
    device = next(model.parameters()).device
    imgs = saved.preprocessing.view(face)[None]
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.random((1, model.num_patches), "float32"))
    total = model.num_patches
    # With few patches, the ratio cannot be met exactly; some must be visible and some masked.
    kept = min(max(round(total * (1 - mask_ratio)), 1), total - 1)
    normalise = saved.preprocessing.normalise.to(device)
    stages = reconstruct(model, normalise, imgs=imgs, mask_ratio=1 - kept / total, noise=noise)
    title = f"{kept} of {total} patches are visible"
    return reconstruction_grid(*stages, title=title, note=shown_with(model))


def enlarged(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (SHOWN, SHOWN, 3)."""
    image = Image.fromarray(picture)
    return np.asarray(image.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC))
