"""The content of the web page: faces, their expressions, attention maps, reconstructions.

Without gradio, which lays it out: see `page_layout`.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets.decode import load_rgb
from datasets.faces.detection import Detector, cut_face, whole_picture
from datasets.synthetic.generator import SyntheticFaces
from engine_pretrain import reconstruct, shown_with
from inference.explanation import attention_map
from inference.predict import Predictor, face_margin, whole_line
from models_saved import (
    Peeked,
    Saved,
    SavedAutoencoder,
    SavedClassifier,
    open_autoencoder,
    open_classifier,
    peek,
)
from util.errors import BadInput
from util.report.figures import overlay, reconstruction_grid, save_png

ENDINGS = (".pth", ".pt", ".safetensors")
MOST_FACES = 12  # per picture
SHOWN = 336  # side length in pixels of a face on the page
EXAMPLES = 5  # synthetic faces to click on
INVITATION = "Upload or photograph a face."


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
        self._open_classifier = lru_cache(2)(self._classifier)
        self._open_autoencoder = lru_cache(2)(self._autoencoder)

    def classifier(self, name: str) -> tuple[SavedClassifier, Predictor]:
        """One of `classifiers`. Raises BadInput."""
        return self._open_classifier(*self._current(name, self.classifiers))

    def autoencoder(self, name: str) -> SavedAutoencoder:
        """One of `autoencoders`. Raises BadInput."""
        return self._open_autoencoder(*self._current(name, self.autoencoders))

    def _named(self, seen: dict[Path, Peeked], kind: str) -> list[str]:
        """Paths within the folder: best epochs, last epochs, then others, each by best result."""
        order = {"checkpoint-best.pth": 0, "checkpoint-last.pth": 1}
        paths = [path for path, peeked in seen.items() if peeked.kind == kind]
        paths.sort(key=lambda path: (order.get(path.name, 2), -seen[path].best, path))
        return [str(path.relative_to(self.folder)) for path in paths]

    def _classifier(self, path: Path, _version: tuple) -> tuple[SavedClassifier, Predictor]:
        saved = open_classifier(path)
        return saved, Predictor(saved, self.device)

    def _autoencoder(self, path: Path, _version: tuple) -> SavedAutoencoder:
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
    """A face in a picture, with a classifier's prediction."""

    picture: np.ndarray  # (SHOWN, SHOWN, 3) uint8
    attention: np.ndarray  # the same with the attention map as an overlay
    probabilities: dict[str, float]  # by class

    @property
    def label(self) -> str:
        """The most probable class."""
        return max(self.probabilities, key=self.probabilities.get)


def faces_in(
    path: str, detect: Detector, saved: Saved, given: float | None = None
) -> tuple[list[np.ndarray], str]:
    """The faces of a picture, cropped as in training, largest first, and a line to show.

    `given`: a margin to use instead of training's. A picture without faces is used whole. Raises
    UnreadableImage.
    """
    image = load_rgb(path)
    if detect is whole_picture:
        return [image], "; ".join([whole_line(saved.preprocessing.face_margin), *saved.notes])
    found = sorted(detect(image), key=lambda face: -face.box[2] * face.box[3])[:MOST_FACES]
    if not found:
        none = (
            "No face was found, so the whole picture is used as a face. Try one in which the face "
            "is larger or less turned away."
        )
        return [image], "; ".join([none, *saved.notes])
    count = "1 face" if len(found) == 1 else f"{len(found)} faces, the largest first"
    margin, line = face_margin(saved, given)
    lines = "; ".join([count, line, *saved.notes])
    return [cut_face(image, face, margin) for face in found], lines


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
    heat = attention_map(saved.model, x).cpu()
    heat = torch.nn.functional.interpolate(heat[:, None], (SHOWN, SHOWN), mode="bilinear")[:, 0]
    shown = [enlarged(view.permute(1, 2, 0).numpy()) for view in views]
    return [
        Seen(picture, overlay(picture, h), dict(zip(saved.classes, row, strict=True)))
        for picture, h, row in zip(shown, heat.numpy(), p.tolist(), strict=True)
    ]


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
    """(S, S, 3) uint8 -> (SHOWN, SHOWN, 3)."""
    image = Image.fromarray(picture)
    return np.asarray(image.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC))


def example_faces(folder: str) -> list[str]:
    """Write synthetic faces, of the demo's kind but not its training images; return their paths."""
    faces = SyntheticFaces(EXAMPLES, size=256, split="test", lab=True)
    paths = [str(Path(folder, f"face-{i + 1}.png")) for i in range(EXAMPLES)]
    for i, path in enumerate(paths):
        save_png(faces.image(i), path)
    return paths
