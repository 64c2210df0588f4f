"""What fine-tuning and evaluation draw from labelled images."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.augment import Augment
from datasets.decode import UnreadableImage
from datasets.labelled import LabelledImages, LabelledSet, Source
from datasets.replace import read_or_replace
from util.errors import BadInput
from util.seeding import AUGMENT, SPLIT, borrowed_globals, generator


class FinetuneDataset(Dataset):
    """(epoch, draw) -> augmented image, target distribution, and what was wrong with its file.

    The augmentation is a function of (seed, epoch, draw). A draw is an image's number; numbers from
    the count on are the same images again, drawn differently.
    """

    def __init__(self, images: LabelledImages, classes: int, augment: Augment, seed: int) -> None:
        self.images, self.augment, self.seed = images, augment, seed
        # Rows to hand out, so that 280,000 distributions need not be stored.
        self._one_hot = torch.eye(classes)

    def __len__(self) -> int:
        return len(self.images)

    def target(self, index: int) -> Tensor:
        """(K,) float: the votes where there are some, else 1 for the label."""
        if self.images.targets is not None:
            return torch.from_numpy(self.images.targets[index])
        return self._one_hot[self.images.labels[index]]

    def __getitem__(self, position: int | tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        """-> image (3, S, S) uint8, target (K,) float32, "" or "name<TAB>reason".

        An unreadable image is replaced by another, with that one's target.
        """
        epoch, draw = position if isinstance(position, tuple) else (0, position)
        rng = generator(AUGMENT, self.seed, epoch, draw)
        image, index, problem = read_or_replace(self.images.source, draw % len(self), rng)
        with borrowed_globals(rng):
            return self.augment(image), self.target(index), problem


class PlainImages(Dataset):
    """index -> the image without augmentation (3, S, S) uint8, its index, whether readable."""

    def __init__(self, source: Source, view: Augment) -> None:
        self.source, self.view = source, view
        self._blank = view(np.zeros((8, 8, 3), np.uint8))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        """An unreadable image comes out black and marked: there is no prediction for it."""
        try:
            return self.view(self.source.image(index)), index, True
        except UnreadableImage:
            return self._blank, index, False


def stratified(labels: np.ndarray, share: float, seed: int, spared: int = 0) -> np.ndarray:
    """Whether each image is in a random `share` of its class, (n,) bool; at least one a class.

    But `spared` images of every class are left out whatever the share.
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
    """Split training images into those to train on and a stratified `share` to select by.

    A class keeps at least one image to learn from.
    """
    held = stratified(images.labels, share, seed, spared=1)
    return images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held))


def take_fraction(images: LabelledImages, share: float, seed: int) -> LabelledImages:
    """A stratified `share` of the images; all of them for 1."""
    if share == 1:
        return images
    return images.take(np.flatnonzero(stratified(images.labels, share, seed)))


def test_images(data: LabelledSet, flag: str) -> LabelledImages:
    """What a set has to test on; images that are of no split count as such. Raises BadInput."""
    for name in ("test", "val", "all"):
        if name in data.splits:
            return data.splits[name]
    raise BadInput(f"{flag}: has neither a test nor a validation split")


def choose_splits(
    data: LabelledSet, other: LabelledSet | None, select: str, share: float, seed: int, path: str
) -> tuple[LabelledImages, dict[str, LabelledImages]]:
    """What to train on, and what to test on: `test`, and `val` if that is to `select` the best.

    The test images are those of the `other` set if there is one. Without a validation split of the
    owner's, a stratified `share` of the training images is held out. Raises BadInput.
    """
    train = data.splits.get("train", data.splits.get("all"))
    if train is None:
        raise BadInput(f"--data_path {path}: has no training images, only {', '.join(data.splits)}")
    check_classes(data, train, path)
    tests = {}
    if other:
        tests["test"] = test_images(other, "--eval_data_path")
    elif "test" in data.splits:
        tests["test"] = data.splits["test"]
    if select == "val":
        if "val" in data.splits:
            tests["val"] = data.splits["val"]
        else:
            train, tests["val"] = hold_out(train, share, seed)
            if not len(tests["val"]):
                raise BadInput(
                    f"--val_fraction {share}: no class of --data_path {path} can spare an image"
                )
    elif not tests:
        raise BadInput(
            f"--data_path {path}: has no test split; name a set to test on with --eval_data_path, "
            "or hold images out with --select val"
        )
    return train, tests


def check_classes(data: LabelledSet, images: LabelledImages, path: str) -> None:
    """Raises BadInput for a class without any training image."""
    counts = images.counts(len(data.classes))
    if missing := [name for name, n in zip(data.classes, counts, strict=True) if not n]:
        hint = (
            "; use --nb_classes 7" if missing == ["Contempt"] and data.name == "affectnet" else ""
        )
        raise BadInput(
            f"--data_path {path}: no training image of {', '.join(missing)}; a classifier cannot "
            f"learn a class without one{hint}"
        )


def in_classes(
    data: LabelledSet, images: LabelledImages, classes: tuple[str, ...]
) -> tuple[LabelledImages, list[int]]:
    """Images of another set with labels as places in `classes`, and which places occur in both.

    Images of classes that are not among them are left out. Raises BadInput without common ones.
    """
    common = [k for k, name in enumerate(classes) if name in data.classes]
    if len(common) < 2:
        raise BadInput(
            f"{data.title}: its classes ({', '.join(data.classes)}) have fewer than two in common "
            f"with the model's ({', '.join(classes)})"
        )
    place = np.array([classes.index(name) if name in classes else -1 for name in data.classes])
    labels = place[images.labels]
    kept = np.flatnonzero(labels >= 0)
    chosen = images.take(kept)
    return LabelledImages(chosen.source, labels[kept]), common
