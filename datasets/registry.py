"""Opens labelled data sets: recognises which one a path holds, and reads its images and labels."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.annotation_files import listing
from datasets.fer import affectnet, class_folder, ferplus, labelled_list, rafdb
from datasets.fer.class_folder import subfolders
from datasets.filetypes import is_hidden, is_image
from datasets.labelled import LabelledImages, LabelledSet
from datasets.labels import EXPRESSIONS
from datasets.layout import Asked, Layout
from datasets.packed.store import PackedImages, is_store, read_manifest
from datasets.synthetic.generator import SyntheticFaces, parse_synthetic
from util.errors import BadInput
from util.wording import printable

# Data sets with a layout of their own, by their name in --data_set: one file and one line each.
OWNERS: dict[str, Layout] = {
    "rafdb": rafdb.LAYOUT,
    "affectnet": affectnet.LAYOUT,
    "ferplus": ferplus.LAYOUT,
    "fer2013": ferplus.FER2013,
}
# These can be anything, so they are tried last.
ANY = {"folder": class_folder.LAYOUT, "list": labelled_list.LAYOUT}
ALIASES = {"IMNET": "folder", "image_folder": "folder"}  # ConvNeXt V2's names of class folders


def layout_of(name: str | None) -> Layout | None:
    """The layout with a name; None for synthetic faces and images without labels."""
    return {**OWNERS, **ANY}.get(name)


def setting_of(name: str | None) -> str:
    """The option that determines what is read from a set: label_rule, label_order …; often ""."""
    layout = layout_of(name)
    return layout.setting if layout else ""


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
    counts: tuple[int, int] = (2000, 800),
) -> LabelledSet:
    """Open the labelled images of `--data_path`; `synthetic[-lab][:TRAIN[:TEST]]` generates faces.

    `nb_classes` chooses AffectNet's 7 or 8 classes; for other sets it must be the number they have.
    `label_rule` is for FERPlus, `label_order` for class folders and lists, `face_margin` for
    AffectNet. Options that are not given come from `trained`, the options that a model was trained
    with, if this set has them. `size` is the side length of synthetic faces in pixels, `counts`
    their number if the path gives none.

    A packed store gives the set that was packed, and these options must be those of packing; a
    store of AffectNet's 8 classes also gives 7. Raises BadInput.
    """
    name = ALIASES.get(data_set, data_set)
    names = ("auto", *OWNERS, *ANY, "synthetic")
    if name not in names:
        raise BadInput(f"--data_set {data_set}: choose from {', '.join((*names, *ALIASES))}")
    store, root = _open_store(data_path), None
    if store:
        name = _packed_set(store, name)
    elif parse_synthetic(data_path) or name == "synthetic":
        name = "synthetic"
        _check_synthetic(data_path, data_set)
    else:
        root = _root(data_path, name)
        name = _only_one(root) if name == "auto" else name
    setting = setting_of(name)
    if label_rule is not None and setting != "label_rule":
        raise BadInput(f"--label_rule {label_rule}: is for the votes of FERPlus; this is {name}")
    if label_order is not None and setting != "label_order":
        what = f"is for class folders and lists; this is {name}, which has an order of its own"
        raise BadInput(f"--label_order {label_order}: {what}")
    if store:
        given = {"label_rule": label_rule, "label_order": label_order, "face_margin": face_margin}
        _check_settings(store, given)

    def usual(option: str, given: object) -> object:
        return (trained or {}).get(option) if given is None else given

    layout = layout_of(name)
    chosen = layout.with_classes if layout else None
    classes = usual("nb_classes", nb_classes) if chosen else nb_classes
    if store:
        data = store.labelled()
        data = chosen(data, classes) if chosen and classes else data
    elif layout:
        asked = Asked(
            nb_classes=classes,
            label_rule=usual("label_rule", label_rule),
            label_order=label_order,
            usual_order=usual("label_order", None),
            face_margin=usual("face_margin", face_margin),
        )
        data = layout.read(root, asked)
    else:
        data = _draw(data_path, size, counts)
    if classes not in (None, len(data.classes)):
        listed = ", ".join(map(printable, data.classes))
        what = f"{data.title} has {len(data.classes)} classes ({listed})"
        raise BadInput(f"--nb_classes {classes}: {what}; leave it out, or give that number")
    if face_margin is not None and "face_margin" not in data.options:
        told = f"--face_margin {face_margin:g} has no effect: these images are used whole"
        data = replace(data, notes=(*data.notes, told))
    return data


def detect_layout(root: str | os.PathLike) -> str | None:
    """The name of the packed set, or of the only owner's layout, at a path; None if there is none.

    None also for a folder that fits more than one layout.
    """
    root = Path(os.path.abspath(os.path.expanduser(root)))
    if is_store(root):
        known = read_manifest(root)["set"]
        return known["name"] if known else None
    found = layouts(root) if os.path.isdir(root) else {}
    return next(iter(found)) if len(found) == 1 else None


def detect_data_set(data_path: str) -> str | None:
    """What `--data_set auto` means for a path if labels are optional; None for images alone.

    Raises BadInput if the path holds more than one data set.
    """
    root = Path(os.path.abspath(os.path.expanduser(data_path)))
    if parse_synthetic(data_path):
        return "synthetic"
    if is_store(root):
        return detect_layout(root)
    if os.path.isfile(root):
        return "list" if labelled_list.has_labels(root) else None
    if not os.path.isdir(root):
        return None
    if layouts(root):
        return _only_one(root)
    return "folder" if class_folder.recognise(root) else None


# Packed stores


def settings(name: str | None, given: Mapping[str, str | float | None]) -> dict[str, object]:
    """Those of the options in `given` that a set of this name has, with defaults filled in."""
    option = setting_of(name)
    if not option:
        return {}
    value = given.get(option)
    return {option: layout_of(name).default if value is None else value}


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
        if given.get(option) not in (None, packed):
            was = f"with {packed}" if packed is not None else "without it"
            what = f"{store.folder} was packed {was}; leave the option out, or pack again"
            raise BadInput(f"--{option} {given[option]}: {what}")


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
    found = {name: layout.recognise(root) for name, layout in OWNERS.items()}
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
    if missing := _missing(root):
        raise BadInput(f"{where}: {missing}")
    if class_folder.recognise(root):
        return "folder"
    known = ", ".join(f"{x.title} ({x.shape})" for x in (*OWNERS.values(), *ANY.values()))
    raise BadInput(f"{where}: {_contents(root)}; known layouts: {known}")


def _missing(root: Path) -> str:
    """What is missing from a folder that is part of an owner's layout; "" if it is no such part."""
    return next(filter(None, (layout.missing(root) for layout in OWNERS.values())), "")


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
