"""Labelled images for fine-tuning and evaluation: data sets, choice of splits, class matching."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.augment import Augment
from datasets.decode import UnreadableImage
from datasets.labelled import LabelledImages, LabelledSet, Source
from datasets.labels import shared_classes
from datasets.unreadable import read_or_replace
from util.errors import BadInput
from util.seeding import AUGMENT, SPLIT, borrowed_globals, generator
from util.wording import did_you_mean, printable


class FinetuneDataset(Dataset):
    """(epoch, draw) -> augmented image, target distribution, and what was wrong with the file.

    The augmentation is a function of (seed, epoch, draw). Draw `i + k * len(self)` is the k-th
    repetition of image i, augmented differently.
    """

    def __init__(self, images: LabelledImages, classes: int, augment: Augment, seed: int) -> None:
        self.images, self.augment, self.seed = images, augment, seed
        # One row per class, so that no distribution has to be stored for each of 280,000 images.
        self._one_hot = torch.eye(classes)

    def __len__(self) -> int:
        return len(self.images)

    def target(self, index: int) -> Tensor:
        """(K,) float: the distribution of the votes if there is one, else the one-hot label."""
        if self.images.targets is not None:
            return torch.from_numpy(self.images.targets[index])
        return self._one_hot[self.images.labels[index]]

    def __getitem__(self, position: int | tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        """-> image (3, S, S) uint8, target (K,) float32, "" or "name<TAB>reason".

        An unreadable image is replaced by another one, with the target of that one.
        """
        epoch, draw = position if isinstance(position, tuple) else (0, position)
        rng = generator(AUGMENT, self.seed, epoch, draw)
        image, index, problem = read_or_replace(self.images.source, draw % len(self), rng)
        with borrowed_globals(rng):
            return self.augment(image), self.target(index), problem


class PlainImages(Dataset):
    """index -> image without augmentation (3, S, S) uint8, its index, whether it was readable."""

    def __init__(self, source: Source, view: Augment) -> None:
        self.source, self.view = source, view
        self._blank = view(np.zeros((8, 8, 3), np.uint8))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        """An unreadable image comes out black and marked, so that callers make no prediction."""
        try:
            return self.view(self.source.image(index)), index, True
        except UnreadableImage:
            return self._blank, index, False


def stratified(labels: np.ndarray, share: float, seed: int, spared: int = 0) -> np.ndarray:
    """Choose a random `share` of each class, at least one image -> (n,) bool.

    But at least `spared` images of each class are not chosen, whatever the share.
    """
    rng, chosen = generator(SPLIT, seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(share * len(members))), len(members) - spared)
        chosen[members[:count]] = True
    return chosen


def hold_out(
    images: LabelledImages, share: float, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Split training images into those to train on and a stratified `share` for model selection.

    Each class keeps at least one training image.
    """
    held = stratified(images.labels, share, seed, spared=1)
    return images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held))


def take_fraction(images: LabelledImages, share: float, seed: int) -> LabelledImages:
    """A stratified `share` of the images; all of them for 1."""
    if share == 1:
        return images
    return images.take(np.flatnonzero(stratified(images.labels, share, seed)))


class ChosenSplits(NamedTuple):
    """The images to train on and to test on."""

    train: LabelledImages
    tests: dict[str, LabelledImages]  # "test", and "val" if that selects the best epoch
    splits: dict[str, str]  # for each of the tests, the data set's name of the split
    notes: list[str]


def test_split(data: LabelledSet, flag: str) -> tuple[str, list[str]]:
    """The split of a set to test on, and a note if it is not the test split.

    Without a test split, that is the validation split or, in a set without splits, all images.
    Raises BadInput if there is none of these.
    """
    if "test" in data.splits:
        return "test", []
    for name, what in (("val", "its validation images"), ("all", "all of its images")):
        if name in data.splits:
            return name, [f"{data.title} has no test split: testing on {what}"]
    raise BadInput(f"{flag}: has neither a test nor a validation split")


def choose_splits(
    data: LabelledSet, other: LabelledSet | None, select: str, share: float, seed: int, path: str
) -> ChosenSplits:
    """Choose what to train on and what to test on: `test`, and `val` if it is to `select` the best.

    The test images come from the `other` set, if there is one. If `data` has no validation split, a
    stratified `share` of its training images is held out. Raises BadInput.
    """
    train = data.splits.get("train", data.splits.get("all"))
    if train is None:
        raise BadInput(f"--data_path {path}: has no training images, only {', '.join(data.splits)}")
    check_classes(data, train, path)
    tests, splits, notes = {}, {}, []
    if other:
        splits["test"], notes = test_split(other, "--eval_data_path")
        tests["test"] = other.splits[splits["test"]]
    elif "test" in data.splits:
        tests["test"], splits["test"] = data.splits["test"], "test"
    if select == "val":
        splits["val"] = "val"
        if "val" in data.splits:
            tests["val"] = data.splits["val"]
        else:
            train, tests["val"] = hold_out(train, share, seed)
            if not len(tests["val"]):
                raise BadInput(
                    f"--val_fraction {share}: no class of --data_path {path} can spare an image"
                )
            held = f"{len(tests['val']):,} images, {share:.0%} of each class"
            notes.append(f"val: {held}, are held out from the training images")
    elif not tests:
        raise BadInput(
            f"--data_path {path}: has no test split; name a set to test on with --eval_data_path, "
            "or hold images out with --select val"
        )
    return ChosenSplits(train, tests, splits, notes)


def check_classes(data: LabelledSet, images: LabelledImages, path: str) -> None:
    """Raise BadInput for a class without any training image."""
    counts = images.counts(len(data.classes))
    if missing := [name for name, n in zip(data.classes, counts, strict=True) if not n]:
        hint = (
            "; use --nb_classes 7" if missing == ["Contempt"] and data.name == "affectnet" else ""
        )
        raise BadInput(
            f"--data_path {path}: no training image of {', '.join(missing)}; a classifier cannot "
            f"learn a class without one{hint}"
        )


class Matched(NamedTuple):
    """Images of a data set labelled by the classes of a model, and what either of them lacks."""

    images: LabelledImages  # labels are indices into the model's classes
    common: list[int]  # ascending indices of the model's classes that the data set has, too
    unknown: dict[str, int]  # number of images left out, by class that the model does not know
    unasked: list[str]  # classes of the model that the data set does not have

    def lines(self) -> list[str]:
        """Notes on the classes that do not match."""
        lines = []
        for name, count in self.unknown.items():
            near = did_you_mean(name, self.unasked, most=1, cutoff=0.6)
            hint = f"; {near}" if near else ""
            images = f"{count:,} image{'s' * (count != 1)} of {printable(name)}"
            lines.append(f"left out: {images}, a class that the model does not know{hint}")
        if self.unasked:
            names = ", ".join(map(printable, self.unasked))
            lines.append(
                f"left out: the model's {names}, which the data set does not have; predictions "
                f"are made among the other {len(self.common)} classes"
            )
        return lines


def match_classes(data: LabelledSet, images: LabelledImages, classes: Sequence[str]) -> Matched:
    """Label a set's images by the classes of a model; classes are matched by name.

    All spellings of an expression match. Raises BadInput if fewer than two classes are in common.
    """
    common, owners = shared_classes(classes, data.classes)
    if len(common) < 2:
        raise BadInput(
            f"{data.title}: its classes ({', '.join(data.classes)}) have fewer than two in common "
            f"with the model's ({', '.join(classes)})"
        )
    place = np.full(len(data.classes), -1)
    place[owners] = common
    labels, counts = place[images.labels], images.counts(len(place))
    kept = np.flatnonzero(labels >= 0)
    matched = LabelledImages(images.take(kept).source, labels[kept])
    unknown = {data.classes[k]: int(counts[k]) for k in np.flatnonzero(place < 0) if counts[k]}
    unasked = [name for k, name in enumerate(classes) if k not in common]
    return Matched(matched, common, unknown, unasked)
