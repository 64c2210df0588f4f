"""Labelled data sets: their classes, and their splits of images with a label each."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from datasets.folder import FileList, ImageFiles


class Source(Protocol):
    """Images by index."""

    digest: str  # identifies the images and their order

    def __len__(self) -> int: ...

    def image(self, i: int) -> np.ndarray:
        """Image i -> (H, W, 3) uint8. Raises UnreadableImage."""

    def name(self, i: int) -> str:
        """A name that no other image has, such as a path."""


class FaceFiles(ImageFiles):
    """Image files cropped to a box: the face and a margin around it."""

    def __init__(self, files: FileList, boxes: np.ndarray, margin: float) -> None:
        """`boxes` (n, 4) int: left, top, width, height in pixels; width 0 for the whole image.

        `margin` is added on each side, as a share of the box's longer side.
        """
        super().__init__(files)
        self.boxes, self.margin = boxes.astype(np.int32), margin
        self.digest = digest_of(files.digest, self.boxes, np.float64(margin))

    def image(self, i: int) -> np.ndarray:
        """See Source. The crop is clipped to the image; a box outside it gives the whole image."""
        return crop_face(super().image(i), self.boxes[i], self.margin)


def crop_face(image: np.ndarray, box: Sequence[int], margin: float) -> np.ndarray:
    """(H, W, 3), (left, top, width, height) -> the square around the box and its margin, clipped.

    A box that has no area or is outside the image gives the whole image.
    """
    height, width = image.shape[:2]
    left, top, w, h = (int(v) for v in box)
    if w <= 0 or h <= 0 or left >= width or top >= height or left + w <= 0 or top + h <= 0:
        return image
    half = max(w, h) * (0.5 + margin)
    x, y = left + w / 2, top + h / 2
    rows = slice(max(0, round(y - half)), min(height, max(1, round(y + half))))
    columns = slice(max(0, round(x - half)), min(width, max(1, round(x + half))))
    return image[rows, columns]


class Subset:
    """A selection of a source's images, in the order of `indices`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.digest = digest_of(source.digest, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, i: int) -> np.ndarray:
        """See Source."""
        return self.source.image(int(self.indices[i]))

    def name(self, i: int) -> str:
        """See Source."""
        return self.source.name(int(self.indices[i]))


class Concatenated:
    """The images of several sources, concatenated."""

    def __init__(self, *sources: Source) -> None:
        self.sources = sources
        self._starts = np.cumsum([0, *map(len, sources)])
        self.digest = digest_of(*(source.digest for source in sources), self._starts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def image(self, i: int) -> np.ndarray:
        """See Source."""
        source, own = self._at(i)
        return source.image(own)

    def name(self, i: int) -> str:
        """See Source."""
        source, own = self._at(i)
        return source.name(own)

    def _at(self, i: int) -> tuple[Source, int]:
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.sources[k], i - int(self._starts[k])


class LabelledImages:
    """One split: a source, a class for each image, and optionally a distribution over classes."""

    def __init__(
        self, source: Source, labels: np.ndarray, targets: np.ndarray | None = None
    ) -> None:
        """`labels` (n,) are indices into the set's classes; rows of `targets` (n, K) sum to 1."""
        self.source, self.labels = source, np.asarray(labels, np.int64)
        self.targets = None if targets is None else np.asarray(targets, np.float32)
        extra = [] if targets is None else [self.targets]
        self.digest = digest_of(source.digest, self.labels, *extra)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "LabelledImages":
        """The images at `indices`, in that order."""
        targets = None if self.targets is None else self.targets[indices]
        return LabelledImages(Subset(self.source, indices), self.labels[indices], targets)

    def counts(self, classes: int) -> np.ndarray:
        """Number of images in each class, (classes,)."""
        return np.bincount(self.labels, minlength=classes)


@dataclass(frozen=True)
class LabelledSet:
    """A labelled data set, as the readers return it."""

    name: str  # as in --data_set
    title: str  # to be displayed: "RAF-DB basic, aligned"
    classes: tuple[str, ...]  # in the owner's order; expressions have their canonical names
    splits: Mapping[str, LabelledImages]  # those that exist of "train", "val", "test"; or "all"
    rule: str = ""  # how labels were made from the owner's annotations; recorded in every result
    notes: tuple[str, ...] = ()  # printed at the start: files missing, rows left out, …
    # The owner's counts by split: one number, or one per class in the order of `classes`.
    published: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    # The options that determined its images and labels, by name: nb_classes, label_rule,
    # label_order, face_margin. Without a face_margin, images are used whole.
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identifies the classes and all images and labels."""
        parts = [part for name, split in self.splits.items() for part in (name, split.digest)]
        return digest_of(*self.classes, *parts)


def describe_labelled(data: LabelledSet) -> list[str]:
    """The lines printed at the start of a run: images per class and split, and published counts."""
    rule = f", labels by {data.rule}" if data.rule else ""
    lines = [f"{data.title}: {len(data.classes)} classes{rule}"]
    for split, images in data.splits.items():
        counts = images.counts(len(data.classes))
        listed = ", ".join(f"{n} {c:,}" for n, c in zip(data.classes, counts, strict=True))
        lines.append(f"  {split}: {len(images):,} images ({listed}){_compared(data, split)}")
    return lines + [f"  {note}" for note in data.notes]


def _compared(data: LabelledSet, split: str) -> str:
    """How a split compares with the counts that its owner published; "" if there are none."""
    owners = data.published.get(split)
    if owners is None:
        return ""
    images = data.splits[split]
    if isinstance(owners, tuple):
        same = tuple(images.counts(len(data.classes)).tolist()) == owners
        listed, total = f" ({', '.join(map(str, owners))})", sum(owners)
    else:
        same, listed, total = len(images) == owners, "", owners
    return ", as published" if same else f"; published: {total:,}{listed}"


def digest_of(*parts: str | np.ndarray | np.generic) -> str:
    """Hash of texts and arrays, in the order given."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
