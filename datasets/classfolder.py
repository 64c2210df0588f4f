"""Labelled image folders: one folder a class, with or without a folder a split above them.

`root/train/CLASS/…` and `root/test/CLASS/…`, or `root/CLASS/…` alone; images at any depth.
Names decide which class a folder is. Numbers are never guessed at: re-packs of one data set
number its expressions in different orders.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets.decode import printable
from datasets.folder import FileList, ImageFiles, list_images
from datasets.labelled import LabelledImages, LabelledSet
from datasets.labels import EXPRESSIONS, ORDERS, expression, parse_order
from datasets.present import listing
from util.errors import BadInput

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
FIRST_ID = {"rafdb": 1}  # the other owners number from 0


def recognise(root: Path) -> list[str]:
    """What labelled folders lie in `root`, a short description each; [] if there are none."""
    splits = [path for name, path in subfolders(root).items() if name.lower() in SPLITS]
    if max(len(subfolders(folder)) for folder in splits or [root]) < 2:
        return []
    return [f"class folders in {', '.join(f.name for f in splits)}" if splits else "class folders"]


def read(
    root: Path, label_order: str | None = None, cache: str | os.PathLike | None = None
) -> LabelledSet:
    """The splits of a labelled folder; a folder without splits has one, called "all".

    `label_order` is that of `--label_order`: see `parse_order`. `cache`: a file to keep the
    listings in, `.SPLIT` added; see `list_images`. Raises BadInput for numbers without a
    label order, an empty class folder, classes that only some splits have, …
    """
    folders, notes = _splits(root)
    lists = {s: _list(f, f"{cache}.{s}" if cache else None) for s, f in folders.items()}
    names = {split: sorted(set(found), key=os.fsencode) for split, (_, found, _) in lists.items()}
    classes, called = name_classes(root, sorted(set().union(*names.values())), label_order)
    there = {split: {called[name]: name for name in names[split]} for split in names}
    for split, found in names.items():
        _check_different(folders[split], found, called)
    notes += _compare(folders, there)
    place = {folder: classes.index(name) for folder, name in called.items()}
    return LabelledSet(
        name="folder",
        title=f"class folders {printable(root.name)}",
        classes=classes,
        splits={
            split: LabelledImages(ImageFiles(files), np.array([place[name] for name in found]))
            for split, (files, found, _) in lists.items()
        },
        notes=(*notes, *(note for _, _, told in lists.values() for note in told)),
    )


# Which folders there are


def subfolders(folder: Path) -> dict[str, Path]:
    """The folders in a folder by name, in byte order, without hidden ones; {} if it is none."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not _hidden(e.name)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as e:
        raise BadInput(f"{printable(str(folder))} cannot be read ({e.strerror})") from None
    return {name: folder / name for name in sorted(names, key=os.fsencode)}


def child(folder: Path, *names: str) -> Path | None:
    """What `folder` holds under the first of these names, written in any case; None if nothing."""
    there = {name.lower(): name for name in sorted(listing(folder))}
    return next((folder / there[n.lower()] for n in names if n.lower() in there), None)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _splits(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, and what to tell of them."""
    folders, splits = subfolders(root), {}
    for name, folder in folders.items():
        split = SPLITS.get(name.lower())
        if split in splits:
            both = f"{printable(splits[split].name)} and {printable(name)}"
            raise BadInput(f"{printable(str(root))}: {both} are one split; move one of them out")
        if split:
            splits[split] = folder
    if not splits:
        return {"all": root}, []
    notes = []
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
        notes.append(f"{splits['test'].name} is used as test: there is no folder called test")
    unused = [printable(name) for name in folders if name.lower() not in SPLITS]
    if unused:
        notes.append(f"not used, beside the splits: {', '.join(unused)}")
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}, notes


def _list(folder: Path, cache: str | None) -> tuple[FileList, list[str], list[str]]:
    """A split's images, the class folder of each, and what to tell."""
    files = list_images(folder, cache)
    names = [files.relative(i) for i in range(len(files))]
    inside = [name for name in names if os.sep in name]
    notes = []
    if len(inside) < len(names):
        first = next(name for name in names if os.sep not in name)
        count = f"{len(names) - len(inside):,} images of {printable(folder.name)}"
        notes = [f"{count} lie in no class folder and are left out (first: {printable(first)})"]
        files = FileList.of(files.root, map(os.fsencode, inside))
    found = [name.partition(os.sep)[0] for name in inside]
    for name in subfolders(folder).keys() - set(found):
        where = printable(str(folder / name))
        raise BadInput(f"{where}: a class folder without images; fill it or remove it")
    if not found:
        raise BadInput(f"{printable(str(folder))}: images, but no folder a class to label them")
    return files, found, notes


# Which class a folder is


def name_classes(
    root: Path, folders: Sequence[str], label_order: str | None = None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The classes in their order, and the class of each folder name.

    Expressions get their canonical names and order if all folders are some (`7_contempt` is
    Contempt); else the names stay and stand in byte order. `label_order` overrules the order,
    and is needed where all names are numbers. Raises BadInput.
    """
    order = parse_order(label_order) if label_order else ()
    if all(name.isascii() and name.isdigit() for name in folders):
        called = _by_number(root, folders, label_order, order)
    elif label_order:
        called = _by_order(root, folders, label_order, order)
    else:
        words = {name: expression(_name_part(name)) for name in folders}
        called = {name: word if all(words.values()) else name for name, word in words.items()}
        usual = set(called.values()) <= set(EXPRESSIONS)
        order = EXPRESSIONS if usual else sorted(set(called.values()), key=os.fsencode)
    return tuple(name for name in order if name in called.values()), called


def _name_part(folder: str) -> str:
    """`contempt` of `7_contempt` or `7-contempt`."""
    return re.sub(r"^\d+[_-](?=.)", "", folder)


def _by_number(
    root: Path, folders: Sequence[str], label_order: str | None, order: Sequence[str]
) -> dict[str, str]:
    """The class of each folder whose name is a number."""
    where, ids = printable(str(root)), sorted({int(name) for name in folders})
    if label_order is None:
        raise BadInput(
            f"{where}: the class folders are numbers ({_few(map(str, ids))}), which may mean "
            "anything: give --label_order, the names by commas in the order of the numbers, or "
            f"an owner's order ({', '.join(ORDERS)})"
        )
    owner = label_order.strip().lower()
    first = ids[0] if len(ids) == len(order) else FIRST_ID.get(owner, 0)
    expected = range(first, first + len(order))
    complete = len(ids) == len(order) or owner in ORDERS
    if first > 1 or not complete or not set(ids) <= set(expected):
        raise BadInput(
            f"{where}: --label_order {label_order} names {len(order)} classes, but the class "
            f"folders are {_few(map(str, ids))}; name them all, numbers from 0 or 1 on"
        )
    return {name: order[int(name) - first] for name in folders}


def _by_order(
    root: Path, folders: Sequence[str], label_order: str, order: Sequence[str]
) -> dict[str, str]:
    """The class of each named folder where the user gave the classes."""
    called = {}
    for name in folders:
        word = _name_part(name)
        called[name] = next((n for n in (expression(word), word, name) if n in order), "")
        if not called[name]:
            folder = printable(str(root / name) if (root / name).is_dir() else name)
            raise BadInput(f"{folder}: a class folder that --label_order {label_order} lacks")
    lacking = [name for name in order if name not in called.values()]
    if lacking and label_order.strip().lower() not in ORDERS:  # an owner's may name one more
        what = f"--label_order {label_order}, but no class folder {_few(lacking)}"
        raise BadInput(f"{printable(str(root))}: {what}; there are {_few(folders)}")
    return called


def _check_different(folder: Path, names: Sequence[str], called: Mapping[str, str]) -> None:
    """Two folders of a split must not be one class."""
    first = {}
    for name in names:
        other = first.setdefault(called[name], name)
        if other != name:
            both = f"{printable(other)} and {printable(name)} are both {printable(called[name])}"
            raise BadInput(f"{printable(str(folder))}: {both}; make them one folder")


def _compare(folders: Mapping[str, Path], there: Mapping[str, Collection[str]]) -> list[str]:
    """What to tell of the splits' classes. Raises BadInput for one that cannot be learnt."""
    notes, whole = [], next(iter(there))  # train, unless there is none
    for split in list(there)[1:]:
        new = [name for name in there[split] if name not in there[whole]]
        if new:
            raise BadInput(
                f"{printable(str(folders[split]))}: class {_few(new)}, which "
                f"{printable(str(folders[whole]))} lacks; splits need the same classes"
            )
        lacking = [name for name in there[whole] if name not in there[split]]
        if lacking:
            notes.append(f"{split} has no images of {_few(lacking)}")
    return notes


def _few(names: Collection[str], n: int = 12) -> str:
    """Names by commas, the first n of them."""
    names = [printable(name) for name in names]
    return ", ".join(names[:n]) + (", …" if len(names) > n else "")
