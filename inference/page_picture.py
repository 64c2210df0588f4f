"""Pictures on the web page: the faces in them, and the examples to click on."""

import hashlib
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.decode import load_rgb
from datasets.faces.detection import Detector, Face, cut_face, whole_picture
from datasets.synthetic.generator import SyntheticFaces
from datasets.transforms import Box
from inference.predict import face_margin, whole_line
from models_saved import Saved
from util.report.figures import save_png

MOST_FACES = 12  # per picture
MOST_FOUND = 100  # pictures whose faces are remembered, a few numbers each
SYNTHETIC = 5  # examples
# Photographs in the public domain, by the package that they come with. Matplotlib is always
# installed, but some distributions leave its sample data out.
PHOTOGRAPHS = {
    "matplotlib": "mpl-data/sample_data/grace_hopper.jpg",  # Grace Hopper, by the US Navy
    "skimage": "data/astronaut.png",  # Eileen Collins, by NASA
}


class Picture(NamedTuple):
    """A picture and the faces in it."""

    name: str  # of the file
    image: np.ndarray  # (H, W, 3) uint8
    faces: Sequence[Face]  # the largest first, at most MOST_FACES
    whole: bool  # whether it is used as it is, as one face

    @property
    def boxes(self) -> list[Box]:
        """Where the faces are."""
        return [face.box for face in self.faces]

    @property
    def line(self) -> str:
        """What was found, in words."""
        if self.whole:
            return "The whole picture is used as one face."
        if not self.faces:
            return (
                "No face was found. Try a picture in which the face is larger or less turned away. "
                "If it is a face already, use the whole picture."
            )
        count = len(self.faces)
        return "1 face was found." if count == 1 else f"{count} faces were found, largest first."


class Finder:
    """Opens pictures, finds the faces in them and crops these as a model needs them."""

    def __init__(
        self, detect: Detector, margin: float | None = None, whole: Sequence[str] = ()
    ) -> None:
        """`margin`: instead of training's; `whole`: paths of pictures that are faces already."""
        self._detect, self._margin = detect, margin
        self._whole = {_digest(path) for path in whole}
        self._found: dict[str, list[Face]] = {}  # by the file's digest, the oldest first

    @property
    def detects(self) -> bool:
        """Whether it has a detector."""
        return self._detect is not whole_picture

    def open(self, path: str | Path, search: bool = True) -> Picture:
        """Open a picture; without `search`, it is used whole. Raises UnreadableImage."""
        image, digest = load_rgb(path), _digest(path)
        if not search or not self.detects or digest in self._whole:
            return Picture(Path(path).name, image, whole_picture(image), whole=True)
        if digest not in self._found:
            found = sorted(self._detect(image), key=lambda face: -face.box[2] * face.box[3])
            self._found[digest] = found[:MOST_FACES]
            if len(self._found) > MOST_FOUND:
                del self._found[next(iter(self._found))]
        return Picture(Path(path).name, image, self._found[digest], whole=False)

    def crop(self, picture: Picture, saved: Saved) -> tuple[list[np.ndarray], str]:
        """The faces of a picture, (H, W, 3) uint8 each, cropped as in training, and how, in words.

        A picture that is used whole is not cropped; there is only something to say if training did.
        """
        if picture.whole:
            margin = saved.preprocessing.face_margin
            return [picture.image], "" if margin is None else whole_line(margin)
        margin, line = face_margin(saved, self._margin)
        return [cut_face(picture.image, face, margin) for face in picture.faces], line


class Examples(NamedTuple):
    """Paths of pictures to click on."""

    synthetic: Sequence[str]  # of the demo's kind but not its training images: faces already
    photographs: Sequence[str]


def example_pictures(folder: str) -> Examples:
    """Write synthetic faces, and copy the photographs that this machine has, to a folder."""
    faces = SyntheticFaces(SYNTHETIC, size=256, split="test", lab=True)
    synthetic = [str(Path(folder, f"face-{i + 1}.png")) for i in range(SYNTHETIC)]
    for i, path in enumerate(synthetic):
        save_png(faces.image(i), path)
    found = [path for item in PHOTOGRAPHS.items() if (path := _in_package(*item)).is_file()]
    return Examples(synthetic, [shutil.copy(path, folder) for path in found])


def _in_package(package: str, name: str) -> Path:
    """The path of a package's file, without importing it; of no file if it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / name if spec and spec.origin else Path(name)


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
