"""Unreadable images: replaces them during training, and checks for them beforehand."""

import numpy as np

from datasets.decode import UnreadableImage
from datasets.labelled import Source
from util.errors import BadInput, Lost

MAX_REPLACEMENTS = 20
PREFLIGHT_IMAGES = 32


def read_or_replace(
    source: Source, index: int, rng: np.random.Generator
) -> tuple[np.ndarray, int, str]:
    """Read image `index`, or a random one in its place -> (H, W, 3) uint8, its index, a problem.

    The problem is "name<TAB>reason", or "" if the image itself could be read. After
    MAX_REPLACEMENTS unreadable images in a row, raises Lost if the file system refused every one of
    them, else BadInput.
    """
    problem, of_disk = "", True
    for _ in range(MAX_REPLACEMENTS):
        try:
            return source.image(index), index, problem
        except UnreadableImage as error:
            problem = problem or f"{source.name(index)}\t{error.reason}"
            of_disk = of_disk and error.of_disk
            index = int(rng.integers(len(source)))
    first = problem.replace("\t", ": ")
    if of_disk:
        raise Lost(
            f"--data_path: {MAX_REPLACEMENTS} files in a row cannot be read (the first: {first}); "
            "is the disk still there?"
        )
    raise BadInput(
        f"--data_path: {MAX_REPLACEMENTS} files in a row are not images (the first: {first})"
    )


def check_readable(source: Source, flag: str = "--data_path") -> None:
    """Decode a few images from all over a source; raises BadInput if none can be read."""
    if not len(source):
        raise BadInput(f"{flag}: holds no images")
    sample = np.unique(np.linspace(0, len(source) - 1, PREFLIGHT_IMAGES).astype(int))
    for index in sample:
        try:
            source.image(int(index))
            return
        except UnreadableImage as error:
            problem = f"{source.name(int(index))}: {error.reason}"
    raise BadInput(
        f"{flag}: none of the {len(sample)} images tried can be read (the last: {problem})"
    )
