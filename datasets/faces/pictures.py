"""Lists the pictures named on a command line, and prepares the faces in them for a model."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.augment import Augment
from datasets.decode import UnreadableImage, load_rgb
from datasets.faces.detection import Detector, Face, cut_face, open_detector
from datasets.filetypes import skipped_line
from datasets.folder import FileList, images_below
from datasets.loader import ErrorsAsSamples, Loader
from util.errors import BadInput
from util.wording import printable


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

    path: str
    faces: list[Face]
    views: list[np.ndarray]  # each face as input for the model, (3, S, S) uint8
    problem: str  # why the picture could not be read, else ""


class Pictures(Dataset):
    """index -> FoundFaces."""

    def __init__(
        self, paths: Sequence[str], detector: str, margin: float, min_score: float, view: Augment
    ) -> None:
        """`detector`: its name; `margin`: see cut_face; faces below `min_score` are ignored."""
        self.paths, self.margin, self.min_score, self.view = paths, margin, min_score, view
        self._name = detector

    @cached_property
    def _detect(self) -> Detector:
        return open_detector(self._name)  # each worker opens its own

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> FoundFaces:
        path = self.paths[index]
        try:
            image = load_rgb(path)
        except UnreadableImage as error:
            return FoundFaces(path, [], [], error.reason)
        try:
            faces = [face for face in self._detect(image) if face.score >= self.min_score]
            views = [self.view(cut_face(image, face, self.margin)).numpy() for face in faces]
        except BadInput:
            raise
        except Exception as error:  # libraries can fail on an unusual picture in any way
            return FoundFaces(path, [], [], f"{type(error).__name__}: {error}")
        return FoundFaces(path, faces, views, "")

    def in_order(self, workers: int) -> Iterator[FoundFaces]:
        """All pictures, in their order, whatever the number of processes."""
        return iter(
            Loader(
                ErrorsAsSamples(self) if workers else self,
                batch_size=None,
                num_workers=workers,
                collate_fn=_as_it_is,  # arrays through pipes: containers have little shared memory
                timeout=600 if workers else 0,
                generator=torch.Generator(),
            )
        )


def _as_it_is(found: FoundFaces) -> FoundFaces:
    return found
