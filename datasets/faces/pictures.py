"""Pictures named on a command line, and the faces in them as a model takes them."""

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
from datasets.loader import Loader, Reporting
from util.errors import BadInput
from util.stop import shield_worker
from util.wording import printable


class Listed(NamedTuple):
    """The files to look at, and how many others were skipped, by their ending."""

    paths: list[str]
    skipped: Counter


def list_pictures(given: Sequence[str]) -> Listed:
    """Files, folders (all images below them) and patterns, in their order, each file once.

    A pattern stands for what a shell would make of it, `**` for folders at any depth. Raises
    BadInput for what is not there and for folders and patterns without images.
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
    return Listed(list(files.values()), skipped)


def _matches(pattern: str) -> list[str]:
    """The paths that a pattern stands for, sorted as bytes as folders are."""
    if not glob.has_magic(pattern):
        raise BadInput(f"{printable(pattern)}: does not exist; check the spelling")
    try:
        found = glob.glob(pattern, recursive=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"{printable(pattern)}: is no pattern ({error})") from None
    if not found:
        raise BadInput(f"{printable(pattern)}: stands for no file; check the spelling")
    return sorted(found, key=os.fsencode)


def _below(folder: str) -> FileList:
    files = images_below(folder)
    if not len(files):
        told = "".join(f" ({line})" for line in skipped_line(files.skipped))
        what = f"holds no images{told}; name a folder that does, or files"
        raise BadInput(f"{printable(folder)}: {what}")
    return files


class Found(NamedTuple):
    """A picture and its faces."""

    path: str
    faces: list[Face]
    views: list[np.ndarray]  # of each face what the model takes, (3, S, S) uint8
    problem: str  # why it could not be read, else ""


class Pictures(Dataset):
    """index -> Found."""

    def __init__(
        self, paths: Sequence[str], detector: str, margin: float, min_score: float, view: Augment
    ) -> None:
        """`detector` by name; see cut_face for `margin`; faces below `min_score` do not count."""
        self.paths, self.margin, self.min_score, self.view = paths, margin, min_score, view
        self._name = detector

    @cached_property
    def _detect(self) -> Detector:
        return open_detector(self._name)  # in each worker its own

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Found:
        path = self.paths[index]
        try:
            image = load_rgb(path)
        except UnreadableImage as error:
            return Found(path, [], [], error.reason)
        try:
            faces = [face for face in self._detect(image) if face.score >= self.min_score]
            views = [self.view(cut_face(image, face, self.margin)).numpy() for face in faces]
        except BadInput:
            raise
        except Exception as error:  # of libraries that never saw this picture before
            return Found(path, [], [], f"{type(error).__name__}: {error}")
        return Found(path, faces, views, "")

    def in_order(self, workers: int) -> Iterator[Found]:
        """All of them, in their order however many processes look for faces."""
        return iter(
            Loader(
                Reporting(self) if workers else self,
                batch_size=None,
                num_workers=workers,
                collate_fn=_as_it_is,  # arrays through pipes: containers have little shared memory
                worker_init_fn=shield_worker,
                timeout=600 if workers else 0,
                generator=torch.Generator(),
            )
        )


def _as_it_is(found: Found) -> Found:
    return found
