"""Finds identical images in two splits: a model must not be tested on images it has learned."""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np

from datasets.fer.ferplus import PixelFaces
from datasets.folder import ImageFiles
from datasets.labelled import Concatenated, LabelledImages, Source, Subset
from util.wording import printable

MOST_FILES = 50_000  # compared before a run; main_pack.py, which reads all anyway, has no limit
READERS = 16  # threads, so that the delays of a network disk overlap


def duplicate_warnings(splits: Mapping[str, LabelledImages]) -> list[str]:
    """Warnings, one for each pair of splits that share images; [] if none do, or if none are files.

    Files of the same size are compared by hash. If there are more than MOST_FILES, nothing is
    compared, and a note says so.
    """
    places = {name: _places(images.source) for name, images in splits.items()}
    places = {name: found for name, found in places.items() if found}
    if len(places) < 2:
        return []
    if sum(map(len, places.values())) > MOST_FILES:
        return [
            f"not checked for images that are in two splits: more than {MOST_FILES:,} files; "
            "main_pack.py finds them"
        ]
    contents = _contents(places)
    return shared(
        {
            split: [(contents.get(place), _named(place)) for place in found]
            for split, found in places.items()
        }
    )


def shared(splits: Mapping[str, Iterable[tuple[object, str]]]) -> list[str]:
    """Warnings, one for each pair of splits with equal images, given as (content or None, name)."""
    splits = {split: list(images) for split, images in splits.items()}
    first = {
        split: {content: name for content, name in reversed(images) if content is not None}
        for split, images in splits.items()
    }
    lines = []
    for one, other in combinations(splits, 2):
        both = [(name, first[one][key]) for key, name in splits[other] if key in first[one]]
        if both:
            count = f"{len(both):,} of {len(splits[other]):,} images of {other}"
            example = f"first: {printable(both[0][0])} equals {printable(both[0][1])}"
            lines.append(f"warning: {count} are in {one}, too, byte for byte ({example})")
    return lines


Place = str | tuple[PixelFaces, int]  # where an image is: its path, or a row of pixels in memory


def _places(source: Source) -> list[Place]:
    """The places of a source's images; [] for images that are not files, or are packed."""
    if isinstance(source, Subset):
        places = _places(source.source)
        return [places[i] for i in source.indices] if places else []
    if isinstance(source, Concatenated):
        return [place for one in source.sources for place in _places(one)]
    if isinstance(source, ImageFiles):
        return [source.files[i] for i in range(len(source))]
    if isinstance(source, PixelFaces):
        return [(source, i) for i in range(len(source))]
    return []


def _named(place: Place) -> str:
    return place if isinstance(place, str) else place[0].name(place[1])


def _contents(places: Mapping[str, list[Place]]) -> dict[Place, tuple[int, bytes]]:
    """(size, hash) of the images that may be equal to one of another split."""
    with ThreadPoolExecutor(READERS) as pool:
        every = [place for found in places.values() for place in found]
        sizes = dict(zip(every, pool.map(_size, every), strict=True))
        splits = defaultdict(set)
        for split, found in places.items():
            for place in found:
                splits[sizes[place]].add(split)
        alike = [place for place in sizes if sizes[place] > 0 and len(splits[sizes[place]]) > 1]
        hashes = pool.map(_hash, alike)
        return {p: (sizes[p], h) for p, h in zip(alike, hashes, strict=True) if h}


def _size(place: Place) -> int:
    """Size in bytes; 0 for a file that is missing or not a regular one."""
    if not isinstance(place, str):
        return place[0].pixels[place[1]].nbytes
    try:
        found = os.stat(place)
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _hash(place: Place) -> bytes:
    """Hash of an image's bytes; empty for a file that cannot be read."""
    if not isinstance(place, str):
        return digest(place[0].pixels[place[1]])
    try:
        with open(place, "rb") as file:
            return hashlib.blake2b(file.read()).digest()
    except OSError:
        return b""


def digest(pixels: np.ndarray) -> bytes:
    """Hash of (H, W, 3) uint8 or similar -> 8 bytes, enough to tell a data set's images apart."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest()
