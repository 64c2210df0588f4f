"""Opens labelled data sets: recognises which one a path holds, and reads its images and labels."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.annotation_files import listing
from datasets.fer.affectnet import DEFAULT_MARGIN
from datasets.fer.affectnet import published as affectnet_counts
from datasets.fer.affectnet import read as read_affectnet
from datasets.fer.affectnet import recognise as recognise_affectnet
from datasets.fer.class_folder import child, subfolders
from datasets.fer.class_folder import read as read_folder
from datasets.fer.class_folder import recognise as recognise_folder
from datasets.fer.ferplus import DEFAULT_RULE, FOLDERS, read_fer2013, recognise_fer2013
from datasets.fer.ferplus import read as read_ferplus
from datasets.fer.ferplus import recognise as recognise_ferplus
from datasets.fer.labelled_list import has_labels
from datasets.fer.labelled_list import read as read_list
from datasets.fer.rafdb import LISTS
from datasets.fer.rafdb import read as read_rafdb
from datasets.fer.rafdb import recognise as recognise_rafdb
from datasets.filetypes import is_hidden, is_image
from datasets.labelled import LabelledImages, LabelledSet
from datasets.labels import EXPRESSIONS
from datasets.packed.store import PackedImages, is_store, read_manifest
from datasets.split_names import split_called
from datasets.synthetic.generator import SyntheticFaces, parse_synthetic
from util.errors import BadInput
from util.wording import printable

# Data sets with a layout of their own. Class folders can be anything, so they are tried last.
OWNERS: dict[str, Callable[[Path], list[str]]] = {
    "rafdb": recognise_rafdb,
    "affectnet": recognise_affectnet,
    "ferplus": recognise_ferplus,
    "fer2013": recognise_fer2013,
}
NAMES = ("auto", *OWNERS, "folder", "list", "synthetic")  # values of --data_set
OFFICIAL = {"IMNET": "folder", "image_folder": "folder"}  # ConvNeXt V2's names of class folders
# The option that determines what is read from a set, and its default.
SETTINGS = {
    "ferplus": ("label_rule", DEFAULT_RULE),
    "folder": ("label_order", None),
    "list": ("label_order", None),
    "affectnet": ("face_margin", DEFAULT_MARGIN),
}
AFFECTNET_PARTS = {
    "manually_annotated_images",
    "manually_annotated_compressed",
    "human_annotated",
    *("train_set", "val_set", "validation_set"),
}
SPLIT_FOLDERS = {"train_set", "val_set", "validation_set"}  # other data sets have these, too
LAYOUTS = (
    "RAF-DB (EmoLabel/ and Image/aligned/), AffectNet (training.csv and "
    "Manually_Annotated_Images/; train_set/annotations/), FERPlus (fer2013new.csv and "
    "fer2013.csv; FER2013Train/label.csv), FER2013 (fer2013.csv), class folders (train/CLASS/ and "
    "test/CLASS/), lists of `path label` lines"
)


def open_labelled(
    data_path: str,
    data_set: str = "auto",
    *,
    nb_classes: int | None = None,
    label_rule: str | None = None,
    label_order: str | None = None,
    face_margin: float | None = None,
    trained: Mapping[str, object] | None = None,
    size: int = 256,
    cache: str | os.PathLike | None = None,
    counts: tuple[int, int] = (2000, 800),
) -> LabelledSet:
    """Open the labelled images of `--data_path`; `synthetic[-lab][:TRAIN[:TEST]]` generates faces.

    `nb_classes` chooses AffectNet's 7 or 8 classes; for other sets it must be the number they have.
    `label_rule` is for FERPlus, `label_order` for class folders and lists, `face_margin` for
    AffectNet. Options that are not given come from `trained`, the options that a model was trained
    with, if this set has them. `size` is the side length of synthetic faces in pixels, `counts`
    their number if the path gives none; `cache` is a file that keeps a folder's listing.

    A packed store gives the set that was packed, and these options must be those of packing; a
    store of AffectNet's 8 classes also gives 7. Raises BadInput.
    """
    name = OFFICIAL.get(data_set, data_set)
    if name not in NAMES:
        raise BadInput(f"--data_set {data_set}: choose from {', '.join((*NAMES, *OFFICIAL))}")
    store, root = _open_store(data_path), None
    if store:
        name = _packed_set(store, name)
    elif parse_synthetic(data_path) or name == "synthetic":
        name = "synthetic"
        _check_synthetic(data_path, data_set)
    else:
        root = _root(data_path, name)
        name = _only_one(root) if name == "auto" else name
    if label_rule is not None and name != "ferplus":
        raise BadInput(f"--label_rule {label_rule}: is for the votes of FERPlus; this is {name}")
    if label_order is not None and name not in ("folder", "list"):
        what = f"is for class folders and lists; this is {name}, which has an order of its own"
        raise BadInput(f"--label_order {label_order}: {what}")
    if store:
        given = {"label_rule": label_rule, "label_order": label_order, "face_margin": face_margin}
        _check_settings(store, given)

    def usual(option: str, given: object) -> object:
        return (trained or {}).get(option) if given is None else given

    classes = usual("nb_classes", nb_classes) if name == "affectnet" else nb_classes
    order = label_order, usual("label_order", None)
    readers: dict[str, Callable[[], LabelledSet]] = {
        "rafdb": lambda: read_rafdb(root, cache),
        "affectnet": lambda: read_affectnet(root, classes, usual("face_margin", face_margin)),
        "ferplus": lambda: read_ferplus(root, usual("label_rule", label_rule)),
        "fer2013": lambda: read_fer2013(root),
        "folder": lambda: read_folder(root, order[0], cache, order[1]),
        "list": lambda: read_list(root, *order),
        "synthetic": lambda: _draw(data_path, size, counts),
    }
    data = store.labelled() if store else readers[name]()
    if store and name == "affectnet" and classes == 7:
        data = _without_contempt(data)
    if classes not in (None, len(data.classes)):
        listed = ", ".join(map(printable, data.classes))
        what = f"{data.title} has {len(data.classes)} classes ({listed})"
        raise BadInput(f"--nb_classes {classes}: {what}; leave it out, or give that number")
    if face_margin is not None and "face_margin" not in data.options:
        told = f"--face_margin {face_margin:g} has no effect: these images are used whole"
        data = replace(data, notes=(*data.notes, told))
    return data


def recognised(root: str | os.PathLike) -> str | None:
    """The name of the packed set, or of the only owner's layout, at a path; None if there is none.

    None also for a folder that fits more than one layout.
    """
    root = Path(os.path.abspath(os.path.expanduser(root)))
    if is_store(root):
        known = read_manifest(root)["set"]
        return known["name"] if known else None
    found = layouts(root) if os.path.isdir(root) else {}
    return next(iter(found)) if len(found) == 1 else None


def labelled_as(data_path: str) -> str | None:
    """What `--data_set auto` means for a path if labels are optional; None for images alone.

    Raises BadInput if the path holds more than one data set.
    """
    root = Path(os.path.abspath(os.path.expanduser(data_path)))
    if parse_synthetic(data_path):
        return "synthetic"
    if is_store(root):
        return recognised(root)
    if os.path.isfile(root):
        return "list" if has_labels(root) else None
    if not os.path.isdir(root):
        return None
    if layouts(root):
        return _only_one(root)
    return "folder" if recognise_folder(root) else None


# Packed stores


def settings(name: str | None, given: Mapping[str, str | float | None]) -> dict[str, object]:
    """Those of the options in `given` that a set of this name has, with defaults filled in."""
    if name not in SETTINGS:
        return {}
    option, default = SETTINGS[name]
    return {option: default if given[option] is None else given[option]}


def _open_store(data_path: str) -> PackedImages | None:
    """The packed store at a path; None if it is not one."""
    root = Path(os.path.abspath(os.path.expanduser(data_path)))
    named = data_path and not parse_synthetic(data_path)
    return PackedImages(root) if named and is_store(root) else None


def _packed_set(store: PackedImages, data_set: str) -> str:
    """The name of the set in a store. Raises BadInput if `data_set` is another."""
    name = store.labelled().name
    if data_set not in ("auto", name):
        raise BadInput(f"--data_set {data_set}: {store.folder} is a packed store of {name}")
    return name


def _check_settings(store: PackedImages, given: Mapping[str, str | float | None]) -> None:
    """Raise BadInput for an option that does not match the images or labels in a store."""
    for option, packed in store.manifest["settings"].items():
        if given[option] not in (None, packed):
            was = f"with {packed}" if packed is not None else "without it"
            what = f"{store.folder} was packed {was}; leave the option out, or pack again"
            raise BadInput(f"--{option} {given[option]}: {what}")


def _without_contempt(data: LabelledSet) -> LabelledSet:
    """AffectNet's 7 classes from its 8."""
    classes = data.classes[:7]
    splits = {
        split: images.take(np.flatnonzero(images.labels < len(classes)))
        for split, images in data.splits.items()
    }
    left = {split: int((part.labels >= len(classes)).sum()) for split, part in data.splits.items()}
    told = [f"{split}: left out {count:,} Contempt" for split, count in left.items() if count]
    if told and data.notes:
        told[0] += f"; the lines above are about all {len(data.classes)} classes"
    title = data.title.replace("AffectNet-8", "AffectNet-7", 1)
    counts, options = affectnet_counts(len(classes)), {**data.options, "nb_classes": len(classes)}
    return replace(
        data,
        title=title,
        classes=classes,
        splits=splits,
        notes=(*data.notes, *told),
        published=counts,
        options=options,
    )


# Synthetic faces


def _check_synthetic(data_path: str, data_set: str) -> None:
    """Raise BadInput unless the path is `synthetic…` and `data_set` agrees."""
    if not parse_synthetic(data_path):
        what = "takes --data_path synthetic or synthetic-lab, with :TRAIN or :TRAIN:TEST"
        raise BadInput(f"--data_set synthetic: {what}, not {printable(data_path)}")
    if data_set not in ("auto", "synthetic"):
        what = f"stands for synthetic faces, not a {data_set} data set"
        raise BadInput(f"--data_path {data_path}: {what}")


def _draw(data_path: str, size: int, counts: tuple[int, int]) -> LabelledSet:
    """Generate synthetic faces, with different people in train and test."""
    drawn, splits = parse_synthetic(data_path), {}
    for split, given, usual in zip(("train", "test"), drawn.counts, counts, strict=True):
        count = usual if given is None else given
        if count < len(EXPRESSIONS):
            what = f"only {count} {split} faces; ask for at least {len(EXPRESSIONS)}"
            raise BadInput(f"--data_path {data_path}: {what}, one per expression")
        faces = SyntheticFaces(count, size=size, split=split, lab=drawn.lab)
        splits[split] = LabelledImages(faces, np.array([faces.label(i) for i in range(count)]))
    title = "synthetic faces" + " as in a laboratory" * drawn.lab
    return LabelledSet("synthetic", title, EXPRESSIONS, splits)


# Recognising a data set


def _root(data_path: str, data_set: str) -> Path:
    """The folder or the list that `--data_path` names. Raises BadInput if it does not exist."""
    if not data_path:
        raise BadInput("--data_path is empty: give the folder of a data set with labels")
    path = os.path.abspath(os.path.expanduser(data_path))
    if os.path.isfile(path) if data_set in ("auto", "list") else os.path.isdir(path):
        return Path(path)
    if os.path.isdir(path) and data_set == "auto":
        return Path(path)
    what = "does not exist: check the spelling"
    if os.path.isdir(path):
        what = "is a folder; --data_set list takes a text list or a CSV"
    elif os.path.exists(path):
        what = "is a file; give the folder of the data set (an archive has to be unpacked first)"
    raise BadInput(f"--data_path {printable(path)}: {what}")


def layouts(root: Path) -> dict[str, list[str]]:
    """Descriptions of the owners' layouts that fit, by the data set's name."""
    found = {name: recognise(root) for name, recognise in OWNERS.items()}
    return {name: layouts for name, layouts in found.items() if layouts}


def _only_one(root: Path) -> str:
    """The one data set that fits. Raises BadInput if there is none, or if the user must choose."""
    if root.is_file():
        return "list"
    found, where = layouts(root), f"--data_path {printable(str(root))}"
    if sum(map(len, found.values())) > 1:
        listed = "; ".join(f"{n} ({layout})" for n, layouts in found.items() for layout in layouts)
        choice = " or ".join(f"--data_set {name}" for name in found)
        what = f"choose with {choice}, or give the folder of one of them"
        raise BadInput(f"{where} holds more than one data set: {listed}; {what}")
    if found:
        return next(iter(found))
    if half := _half(root):
        raise BadInput(f"{where}: {half}")
    if recognise_folder(root):
        return "folder"
    raise BadInput(f"{where}: {_contents(root)}; known layouts: {LAYOUTS}")


def _half(root: Path) -> str:
    """What is missing from a folder that is part of an owner's layout; "" if it is no such part."""
    folders = {name.lower() for name in subfolders(root)}
    splits = [root, *(path for path in subfolders(root).values() if split_called(path.name))]
    annotated = any(child(folder, "images", "annotations") for folder in splits)
    parts = AFFECTNET_PARTS if annotated else AFFECTNET_PARTS - SPLIT_FOLDERS
    if parts & {*folders, root.name.lower()}:
        read_affectnet(root)  # raises BadInput, saying what is missing
    for base in (root, root / "basic"):
        if {"aligned", "original"} & {n.lower() for n in subfolders(child(base, "Image") or base)}:
            return f"RAF-DB's images, but not EmoLabel/{LISTS[0]}; give the folder with both"
    if child(root, "fer2013new.csv"):
        return "FERPlus's votes, but no images; put fer2013.csv beside fer2013new.csv"
    if {name.lower() for name in FOLDERS.values()} & folders:
        return "FERPlus's folders, but not both images and label.csv in FER2013Train"
    return ""


def _contents(root: Path) -> str:
    """What is in a folder that is not a labelled data set."""
    names = sorted(name for name in listing(root) if not is_hidden(name))
    if not names:
        return "is empty"
    images = sum(map(is_image, names))
    if images and not subfolders(root):
        return f"holds {images:,} images and nothing that labels them"
    listed = ", ".join(map(printable, names[:5])) + (", …" if len(names) > 5 else "")
    return f"no data set with labels; it holds {listed}"
