"""Images that are in two splits of a data set, byte for byte: what is tested on has been learnt."""

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
from datasets.labelled import Joined, LabelledImages, Picked, Source
from util.wording import printable

MOST_FILES = 50_000  # to look at before a run; main_pack.py, which reads them all, has no limit
READERS = 16  # threads, so that the waits of a network disk overlap


def duplicates(splits: Mapping[str, LabelledImages]) -> list[str]:
    """The line on each pair of splits that share images; [] where none do, or none are files.

    Files of one size are compared by their hash. Of more than MOST_FILES, a line says that it was
    not tried.
    """
    places = {name: _places(images.source) for name, images in splits.items()}
    places = {name: found for name, found in places.items() if found}
    if len(places) < 2:
        return []
    if sum(map(len, places.values())) > MOST_FILES:
        return [
            f"images that are in two splits were not looked for: more than {MOST_FILES:,} files; "
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
    """The line on each pair of splits with equal images, given as (content or None, name)."""
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
            example = f"first: {printable(both[0][0])} is {printable(both[0][1])}"
            lines.append(f"warning: {count} are in {one}, too, byte for byte ({example})")
    return lines


Place = str | tuple[PixelFaces, int]  # of an image: its path, or a row of pixels in memory


def _places(source: Source) -> list[Place]:
    """Where the images of a source lie; [] for those that have no file, or are packed."""
    if isinstance(source, Picked):
        places = _places(source.source)
        return [places[i] for i in source.indices] if places else []
    if isinstance(source, Joined):
        return [place for one in source.sources for place in _places(one)]
    if isinstance(source, ImageFiles):
        return [source.files[i] for i in range(len(source))]
    if isinstance(source, PixelFaces):
        return [(source, i) for i in range(len(source))]
    return []


def _named(place: Place) -> str:
    return place if isinstance(place, str) else place[0].name(place[1])


def _contents(places: Mapping[str, list[Place]]) -> dict[Place, tuple[int, bytes]]:
    """(size, hash) of those that may be equal to one of another split."""
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
    """Bytes; 0 for what is not there or no regular file."""
    if not isinstance(place, str):
        return place[0].pixels[place[1]].nbytes
    try:
        found = os.stat(place)
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _hash(place: Place) -> bytes:
    """Of the bytes; empty for a file that cannot be read."""
    if not isinstance(place, str):
        return digest(place[0].pixels[place[1]])
    try:
        with open(place, "rb") as file:
            return hashlib.blake2b(file.read()).digest()
    except OSError:
        return b""


def digest(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 or the like -> 8 bytes that other images of a data set do not have."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest()
