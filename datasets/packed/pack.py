"""Packs a data set into a store: several processes decode the images, one writes them in order."""

import json
import os
from collections.abc import Iterator, Sequence
from itertools import compress

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.decode import UnreadableImage
from datasets.duplicates import shared
from datasets.labelled import LabelledSet, Source, digest_of
from datasets.loader import Loader
from datasets.packed import store
from datasets.packed.store_writer import Parts
from util.files import replacing, write_file

SAMPLE = 100  # images decoded to estimate the size of the store


class ToPack(Dataset):
    """The images of several sources, concatenated and shrunk. Workers do this for the writer."""

    def __init__(self, sources: Sequence[Source], short_side: int) -> None:
        """`short_side` in pixels; 0 keeps the images' own size."""
        self.sources, self.short_side = sources, short_side
        self._ends = np.cumsum([len(source) for source in sources])
        self.digest = digest_of(*(source.digest for source in sources))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, i: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._ends, i, side="right"))
        source = self.sources[number]
        return source, i - int(self._ends[number]) + len(source)

    def image(self, i: int) -> np.ndarray:
        """See Source."""
        source, index = self._place(i)
        return shrink(source.image(index), self.short_side)

    def name(self, i: int) -> str:
        """See Source."""
        source, index = self._place(i)
        return source.name(index)

    def __getitem__(self, i: int) -> np.ndarray | str:
        """Image i -> (H, W, 3) uint8, or why it cannot be read."""
        try:
            return self.image(i)
        except UnreadableImage as error:
            return error.reason

    def estimated_bytes(self) -> int:
        """Estimated bytes of all images, from the mean of a sample spread over them."""
        some = np.unique(np.linspace(0, len(self) - 1, SAMPLE).astype(int))
        sizes = [image.size for i in some if not isinstance(image := self[int(i)], str)]
        return round(len(self) * float(np.mean(sizes))) if sizes else 0

    def in_order(self, start: int, workers: int) -> Iterator[np.ndarray | str]:
        """Images from `start` on, in their order, whatever the number of decoding processes."""
        for group in Loader(
            self,
            batch_size=8,
            sampler=range(start, len(self)),
            num_workers=workers,
            collate_fn=list,  # arrays through pipes: containers have little shared memory
            timeout=600 if workers else 0,
            generator=torch.Generator(),
        ):
            yield from group


def shrink(image: np.ndarray, short_side: int) -> np.ndarray:
    """(H, W, 3) -> resized to a short side of at most `short_side` pixels (0: no limit)."""
    height, width = image.shape[:2]
    if not 0 < short_side < min(height, width):
        return image
    scale = short_side / min(height, width)
    size = round(width * scale), round(height * scale)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def names_below(data_path: str, data: ToPack) -> list[str]:
    """Image names relative to the data set, so that they do not depend on where it is."""
    path = os.path.abspath(os.path.expanduser(data_path))
    names = (data.name(i) for i in range(len(data)))
    roots = path + os.sep, os.path.dirname(path) + os.sep  # a list's images are beside it
    return [name.removeprefix(roots[0]).removeprefix(roots[1]) for name in names]


def finish(
    parts: Parts,
    plan: dict,
    names: Sequence[str],
    splits: dict[str, int],
    labelled: LabelledSet | None,
    notes: Sequence[str] = (),
) -> None:
    """Write index, names, labels and, last of all, the manifest.

    `names` are those of all images; `splits` has the number of images in each split, in the order
    in which they were written; `notes` are those on images without labels.
    """
    folder = parts.folder
    for leftover in folder.glob(".*.tmp"):  # left by a process that was killed in this function
        leftover.unlink()
    kept = np.array([not isinstance(item, str) for item in parts.images])
    sizes = np.array([item[:2] for item in parts.images if not isinstance(item, str)], np.int64)
    ends = np.cumsum(3 * sizes.prod(axis=1))
    arrays = {store.INDEX: np.column_stack([ends - 3 * sizes.prod(axis=1), sizes])}
    if labelled:
        images = labelled.splits.values()
        arrays[store.LABELS] = np.concatenate([split.labels for split in images])[kept]
        if all(split.targets is not None for split in images):
            arrays[store.TARGETS] = np.concatenate([split.targets for split in images])[kept]
    for name, array in arrays.items():
        with replacing(folder / name) as file:
            np.save(file, array)
    encoded = (os.fsencode(name) + b"\0" for name in compress(names, kept))
    write_file(folder / store.NAMES, b"".join(encoded))
    ends_of = np.cumsum(list(splits.values()))[:-1]
    of_split = np.split(kept, ends_of)
    manifest = {
        **plan,
        "images": int(kept.sum()),
        "bytes": int(ends[-1]),
        "splits": {name: int(part.sum()) for name, part in zip(splits, of_split, strict=True)},
        "set": labelled and describe_set(labelled),
        "notes": list(notes),
        "duplicates": shared(
            {
                split: [(parts.content(i), names[i]) for i in places]
                for split, places in zip(
                    splits, np.split(np.arange(len(names)), ends_of), strict=True
                )
            }
        ),
        "left_out": [
            {"image": name, "reason": item}
            for name, item in zip(names, parts.images, strict=True)
            if isinstance(item, str)
        ],
        "parts": parts.full,
        "files": {
            name: store.file_digest(folder / name) for name in sorted([*arrays, store.NAMES])
        },
    }
    manifest["digest"] = store.manifest_digest(manifest)
    write_file(folder / store.MANIFEST, json.dumps(manifest, indent=1) + "\n")
    parts.close(whole=True)


def describe_set(data: LabelledSet) -> dict:
    """A labelled set without its images, as values that JSON can hold."""
    return {
        "name": data.name,
        "title": data.title,
        "classes": list(data.classes),
        "rule": data.rule,
        "notes": list(data.notes),
        "published": dict(data.published),
        "options": dict(data.options),
    }
