"""Lists the pictures named on a command line, and prepares the faces in them for a model."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.augment import Augment
from datasets.decode import UnreadableImage, load_rgb, rgb_of
from datasets.faces.detection import Detector, Face, cut_face, open_detector
from datasets.filetypes import skipped_line
from datasets.folder import FileList, images_below
from datasets.loader import ErrorsAsSamples, Loader
from util.errors import BadInput
from util.wording import printable

Picture = str | os.PathLike | Image.Image | np.ndarray  # see load_rgb and rgb_of


class PictureList(NamedTuple):
    """The files to look at, and how many others were skipped, by extension."""

    paths: list[str]
    skipped: Counter


def list_pictures(given: Sequence[str]) -> PictureList:
    """List files, folders (all images below them) and patterns, in order, each file once.

    A pattern matches what it would in a shell, `**` matches folders at any depth. Raises BadInput
    for a path that does not exist, a pattern without a match and a folder without images.
    """
    files: dict[str, str] = {}  # by absolute path
    folders: dict[str, FileList] = {}
    for name in given:
        path = os.path.expanduser(name)
        for one in [path] if os.path.lexists(path) else _matches(path):
            found = [one]
            if os.path.isdir(one):
                below = folders[os.path.realpath(one)] = _below(one)
                found = [os.path.join(one, below.relative(i)) for i in range(len(below))]
            for file in found:
                files.setdefault(os.path.abspath(file), file)
    skipped = Counter()
    for path, below in folders.items():
        if not any(path.startswith(os.path.join(other, "")) for other in folders.keys() - {path}):
            skipped.update(below.skipped)
    return PictureList(list(files.values()), skipped)


def _matches(pattern: str) -> list[str]:
    """The paths that a pattern matches, sorted as bytes, as those in folders are."""
    if not glob.has_magic(pattern):
        raise BadInput(f"{printable(pattern)}: does not exist; check the spelling")
    try:
        found = glob.glob(pattern, recursive=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"{printable(pattern)}: is not a valid pattern ({error})") from None
    if not found:
        raise BadInput(f"{printable(pattern)}: matches no file; check the spelling")
    return sorted(found, key=os.fsencode)


def _below(folder: str) -> FileList:
    files = images_below(folder)
    if not len(files):
        told = "".join(f" ({line})" for line in skipped_line(files.skipped))
        what = f"holds no images{told}; name a folder that does, or files"
        raise BadInput(f"{printable(folder)}: {what}")
    return files


class FoundFaces(NamedTuple):
    """A picture and its faces."""

    path: str  # "" if it is not from a file
    faces: list[Face]  # from left to right
    views: list[np.ndarray]  # each face as input for the model, (3, S, S) uint8
    problem: str = ""  # why the picture could not be read
    size: tuple[int, int] = (0, 0)  # its width and height in pixels


class FaceFinder:
    """Finds the faces in a picture and prepares them for a model. Threads can share one."""

    def __init__(self, detector: str, margin: float, min_score: float, view: Augment) -> None:
        """`detector`: its name; `margin`: see cut_face; faces below `min_score` are ignored."""
        self.margin, self.min_score, self.view = margin, min_score, view
        self._name = detector
        # Detectors not in use: only one thread at a time may use each, and each process needs its
        # own, so they are opened when they are needed.
        self._idle: list[Detector] = []

    def __call__(self, picture: Picture) -> FoundFaces:
        """The faces of a picture; of one that cannot be read, the reason.

        Raises BadInput for something that is no picture, and if the detector cannot be opened.
        """
        named = isinstance(picture, str | os.PathLike)
        path = os.fsdecode(picture) if named else ""
        try:
            image = load_rgb(path) if named else rgb_of(picture)
        except UnreadableImage as error:
            return FoundFaces(error.path, [], [], error.reason)
        try:
            faces = [face for face in self._detect(image) if face.score >= self.min_score]
            views = [self.view(cut_face(image, face, self.margin)).numpy() for face in faces]
        except BadInput:
            raise
        except Exception as error:  # libraries can fail on an unusual picture in any way
            return FoundFaces(path, [], [], f"{type(error).__name__}: {error}")
        return FoundFaces(path, faces, views, size=image.shape[1::-1])

    def __getstate__(self) -> dict[str, object]:
        """Without detectors, which cannot be pickled."""
        return {**self.__dict__, "_idle": []}

    def _detect(self, image: np.ndarray) -> list[Face]:
        try:
            detect = self._idle.pop()
        except IndexError:
            detect = open_detector(self._name)
        faces = detect(image)
        self._idle.append(detect)
        return faces


class Pictures(Dataset):
    """index -> FoundFaces."""

    def __init__(self, pictures: Sequence[Picture], find: FaceFinder) -> None:
        self.pictures, self.find = pictures, find

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> FoundFaces:
        return self.find(self.pictures[index])


def find_faces(
    pictures: Iterable[Picture], find: FaceFinder, workers: int = 0
) -> Iterator[FoundFaces]:
    """All pictures, in their order, whatever the number of worker processes; 0: none."""
    if not workers:
        return map(find, pictures)
    return iter(
        Loader(
            ErrorsAsSamples(Pictures(list(pictures), find)),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,  # arrays through pipes: containers have little shared memory
            timeout=600,
            generator=torch.Generator(),
        )
    )


def _as_it_is(found: FoundFaces) -> FoundFaces:
    return found
