"""Opens the images of `--data_path` and builds the data sets for pre-training and fine-tuning."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from datasets.augment import Augment, face_augment, plain, random_augment
from datasets.fer.class_folder import unused_beside
from datasets.filetypes import skipped_line
from datasets.finetune import FinetuneDataset, PlainImages
from datasets.folder import FileList, ImageFiles, list_images
from datasets.labelled import LabelledSet, Source, describe_labelled
from datasets.loader import build_loader, build_test_loader
from datasets.packed.store import PackedImages, is_store
from datasets.pretrain import PretrainDataset
from datasets.registry import detect_layout, open_labelled
from datasets.synthetic.generator import SyntheticFaces, parse_synthetic
from datasets.wrapped import wrapped_notes
from util.errors import BadInput
from util.wording import printable

__all__ = [
    "Augment",
    "FinetuneDataset",
    "Images",
    "LabelledSet",
    "PlainImages",
    "PretrainDataset",
    "build_finetune_dataset",
    "build_loader",
    "build_pretrain_dataset",
    "build_test_loader",
    "face_augment",
    "open_images",
    "open_labelled",
    "plain",
    "random_augment",
]


class Images(NamedTuple):
    """Images without labels, with the notes to print about them."""

    source: Source
    notes: list[str]  # printed at the start: which images are used, files skipped, …
    face_margin: float | None = None  # margin around face boxes; None: images are used whole


def open_images(
    data_path: str = "synthetic",
    size: int = 256,
    face_margin: float | None = None,
    trained: Mapping[str, object] | None = None,
) -> Images:
    """Open a `--data_path`: folder, list or CSV, packed store, `synthetic[-lab][:COUNT]`.

    A labelled set in its owner's layout, or packed, gives its training images only, cropped to the
    face if it has face boxes. The margin is `face_margin` or, if that is None, the one in
    `trained`, the options that a model was trained with. `size` is the side length of synthetic
    faces in pixels. Raises BadInput.
    """
    if drawn := parse_synthetic(str(data_path)):
        count = 10_000 if drawn.counts[0] is None else drawn.counts[0]
        if count < 1:
            raise BadInput(f"--data_path {data_path}: ask for at least one face")
        return Images(SyntheticFaces(count, size=size, lab=drawn.lab), [])
    root = Path(os.path.expanduser(data_path))
    notes = []
    if name := detect_layout(root):
        data = open_labelled(str(data_path), name, face_margin=face_margin, trained=trained)
        if "train" in data.splits:
            others = ", ".join(split for split in data.splits if split != "train")
            unused = [f"only the training images are used, not {others}"] if others else []
            margin = data.options.get("face_margin")
            return Images(data.splits["train"].source, [*describe_labelled(data), *unused], margin)
        notes = [f"warning: {data.title} has no training split: all images below it are used"]
    if face_margin is not None:
        notes.append(f"--face_margin {face_margin:g} has no effect: these images are used whole")
    if is_store(root):
        store = PackedImages(root)
        return Images(store, [*notes, *store.notes()])
    files = list_images(data_path)
    whole = root.is_dir() and files.root == os.path.abspath(root)
    notes += wrapped_notes(Path(files.root)) if whole and not name else _which(root, files)
    return Images(ImageFiles(files), [*notes, *skipped_line(files.skipped)])


def _which(root: Path, files: FileList) -> list[str]:
    """Notes on which images of a folder or list are used."""
    if root.is_file() or files.root == os.path.abspath(root):
        return files.notes
    used = os.path.basename(files.root)
    unused = unused_beside(root, [used])
    beside = f"; not used: {unused}" if unused else ""
    return [f"only the images in {printable(used)} are used{beside}"]


def build_pretrain_dataset(
    data_path: str = "synthetic",
    input_size: int = 224,
    num_patches: int | None = None,
    seed: int = 0,
    face_margin: float | None = None,
    size_at: Callable[[int], int] | None = None,
) -> PretrainDataset:
    """Build the data set for masked pre-training; `ds[i][0]` is an augmented image (3, S, S) uint8.

    `num_patches` is the length of the mask noise that comes with each image; the default is the
    number of 16-pixel patches. `size_at(epoch)` gives the side length in each epoch, if it changes.
    Raises BadInput for a path that holds no images.
    """
    images = open_images(data_path, synthetic_size(input_size), face_margin)
    patches = num_patches or (input_size // 16) ** 2
    return PretrainDataset(images.source, input_size, patches=patches, seed=seed, size_at=size_at)


def build_finetune_dataset(
    data_path: str = "synthetic",
    input_size: int = 224,
    split: str = "train",
    augment: Augment | None = None,
    seed: int = 0,
    **options: object,
) -> FinetuneDataset:
    """Build a labelled data set; `ds[i]` -> image (3, S, S) uint8, target (K,) float, problem.

    `augment` comes from `face_augment`, `random_augment` or `plain` (the default, the whole image);
    `options` are passed on to `open_labelled`. Raises BadInput.
    """
    data = open_labelled(data_path, size=synthetic_size(input_size), **options)
    if split not in data.splits:
        raise BadInput(
            f"--data_path {data_path}: has no {split} split, only {', '.join(data.splits)}"
        )
    augment = augment or plain(input_size)
    return FinetuneDataset(data.splits[split], len(data.classes), augment, seed)


def synthetic_size(input_size: int) -> int:
    """Side length of synthetic faces: above the input's, so that they are scaled, as photos are."""
    return max(16, round(input_size * 8 / 7))
