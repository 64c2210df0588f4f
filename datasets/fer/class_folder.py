"""Labelled image folders: one folder per class, below one folder per split or without splits.

`root/train/CLASS/…` and `root/test/CLASS/…`, or only `root/CLASS/…`; images may be at any depth.
Names decide which class a folder is. The meaning of numbers is never guessed, because repackaged
data sets number their expressions in different orders.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets.annotation_files import listing
from datasets.fer.class_names import few, name_classes
from datasets.filetypes import is_hidden, is_image, skipped_line
from datasets.folder import FileList, ImageFiles, list_images
from datasets.labelled import LabelledImages, LabelledSet
from datasets.labels import expression
from datasets.layout import Layout
from datasets.split_names import split_called
from util.errors import BadInput
from util.wording import printable

# Names of data sets, in lower case without blanks and punctuation: such a folder is not a class.
DATA_SETS = re.compile(
    r"(raf(db|ml|au)?|affectnet\w*|fer(plus|13|2013\w*|v39k)?|ck(plus)?|jaffe|expw|[sa]few|kdef|"
    r"oulucasia|caers?|dfew|mafw|affwild2?|celeba|vggface2?|lfw)(basic|aligned|dataset)?"
)


def recognise(root: Path) -> list[str]:
    """A short description of the labelled folders in `root`, in a list; [] if there are none."""
    splits = [path for name, path in subfolders(root).items() if split_called(name)]
    if max(len(subfolders(folder)) for folder in splits or [root]) < 2:
        return []
    return [f"class folders in {', '.join(f.name for f in splits)}" if splits else "class folders"]


def read(root: Path, label_order: str | None = None, usual: str | None = None) -> LabelledSet:
    """Read the splits of a labelled folder; a folder without splits has a single one, "all".

    `label_order` is that of `--label_order`, see `parse_order`; `usual` is the one for numbers if
    none is given. Raises BadInput for numbers without a label order, an empty class folder, classes
    that training lacks, folders that are splits or data sets rather than classes, …
    """
    folders, notes = _splits(root)
    lists = {split: _list(folder) for split, folder in folders.items()}
    names = {split: sorted(set(found), key=os.fsencode) for split, (_, found, _) in lists.items()}
    for split, folder in folders.items():
        _check_classes(folder, names[split], lists[split][0])
    every = sorted(set().union(*names.values()))
    classes, called, told, order = name_classes(printable(str(root)), every, label_order, usual)
    there = {split: {called[name]: name for name in names[split]} for split in names}
    for split, found in names.items():
        _check_different(folders[split], found, called)
    notes += [*told, *_compare(folders, there)]
    place = {folder: classes.index(name) for folder, name in called.items()}
    return LabelledSet(
        name="folder",
        title=f"class folders {printable(root.name)}",
        classes=classes,
        options={"label_order": order} if order else {},
        splits={
            split: LabelledImages(ImageFiles(files), np.array([place[name] for name in found]))
            for split, (files, found, _) in lists.items()
        },
        notes=(*notes, *(note for _, _, told in lists.values() for note in told)),
    )


# Which folders there are


def subfolders(folder: Path) -> dict[str, Path]:
    """The folders in a folder by name, in byte order, except hidden ones; {} if it is no folder."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not is_hidden(e.name)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as e:
        raise BadInput(f"{printable(str(folder))} cannot be read ({e.strerror})") from None
    return {name: folder / name for name in sorted(names, key=os.fsencode)}


def child(folder: Path, *names: str) -> Path | None:
    """The entry of `folder` with the first of these names that exists, in any case; else None."""
    there = {name.lower(): name for name in sorted(listing(folder))}
    return next((folder / there[n.lower()] for n in names if n.lower() in there), None)


def unused_beside(folder: Path, used: Collection[str]) -> str:
    """What a folder holds besides the `used` ones of its folders; "" if nothing.

    The text names the other folders and counts the images.
    """
    folders = subfolders(folder)
    images = sum(is_image(n) and not is_hidden(n) and n not in folders for n in listing(folder))
    others = few([name for name in folders if name not in used])
    count = f"{images:,} image{'s' * (images > 1)}" if images else ""
    return ", ".join(filter(None, [others, count]))


def _splits(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, and notes."""
    folders, splits = subfolders(root), {}
    for name, folder in folders.items():
        split = split_called(name)
        if split in splits:
            both = f"{printable(splits[split].name)} and {printable(name)}"
            what = f"{both} are the same split; move one of them out"
            raise BadInput(f"{printable(str(root))}: {what}")
        if split:
            splits[split] = folder
    if not splits:
        return {"all": root}, []
    notes = []
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
        notes.append(f"{splits['test'].name} is used as test: there is no folder called test")
    if unused := unused_beside(root, [folder.name for folder in splits.values()]):
        notes.append(f"not in any split, so not used: {unused}")
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}, notes


def _list(folder: Path) -> tuple[FileList, list[str], list[str]]:
    """A split's images, the class folder of each, and notes."""
    files = list_images(folder)
    names = [files.relative(i) for i in range(len(files))]
    inside = [name for name in names if os.sep in name]
    notes = [f"{printable(folder.name)}: {line}" for line in skipped_line(files.skipped)]
    if len(inside) < len(names):
        first = next(name for name in names if os.sep not in name)
        count = f"{len(names) - len(inside):,} images of {printable(folder.name)}"
        notes.append(f"{count} are in no class folder and are left out (first: {printable(first)})")
        files = FileList.of(files.root, map(os.fsencode, inside), files.skipped)
    found = [name.partition(os.sep)[0] for name in inside]
    for name in subfolders(folder).keys() - set(found):
        where = printable(str(folder / name))
        raise BadInput(f"{where}: a class folder without images; fill it or remove it")
    if not found:
        raise BadInput(f"{printable(str(folder))}: images, but no class folders to label them")
    return files, found, notes


# Which of them can be used


def _check_classes(folder: Path, names: Sequence[str], files: FileList) -> None:
    """Raise BadInput for folders that are data sets, or that hold splits or classes."""
    where = printable(str(folder))
    sets = [n for n in names if DATA_SETS.fullmatch(re.sub(r"[\W_]", "", n).lower())]
    if sets:
        raise BadInput(
            f"{where}: {few(sets)} look like data sets, not classes; give the folder of one"
        )
    inner: dict[str, set[str]] = {name: set() for name in names}
    for i in range(len(files)):
        name, *below = files.relative(i).split(os.sep)
        if len(below) > 1:
            inner[name].add(below[0])
    if splits := {one for found in inner.values() for one in found if split_called(one)}:
        what = f"its class folders hold {few(sorted(splits))}: put the splits above the classes"
        raise BadInput(f"{where}: {what}, as in train/{printable(names[0])}/")
    if all(len(found) > 1 and all(map(expression, found)) for found in inner.values()):
        below = few(sorted(set().union(*inner.values())))
        raise BadInput(
            f"{where}: {few(names)} each hold class folders ({below}), so they are not classes "
            "themselves; give one of them, or rename them to train, val and test"
        )


def _check_different(folder: Path, names: Sequence[str], called: Mapping[str, str]) -> None:
    """Raise BadInput if two folders of a split are the same class."""
    first = {}
    for name in names:
        other = first.setdefault(called[name], name)
        if other != name:
            both = f"{printable(other)} and {printable(name)} are both {printable(called[name])}"
            raise BadInput(f"{printable(str(folder))}: {both}; merge them into one folder")


def _compare(folders: Mapping[str, Path], there: Mapping[str, Collection[str]]) -> list[str]:
    """Notes on the splits' classes. Raises BadInput for a class that cannot be learned."""
    notes, whole = [], next(iter(there))  # train, unless there is none
    for split in list(there)[1:]:
        new = [name for name in there[split] if name not in there[whole]]
        if new:
            raise BadInput(
                f"{printable(str(folders[split]))}: class {few(new)}, not in "
                f"{printable(str(folders[whole]))}; splits need the same classes"
            )
        lacking = [name for name in there[whole] if name not in there[split]]
        if lacking:
            notes.append(f"{split} has no images of {few(lacking)}")
    return notes


LAYOUT = Layout(
    title="class folders",
    shape="train/CLASS/ and test/CLASS/",
    recognise=recognise,
    read=lambda root, asked: read(root, asked.label_order, asked.usual_order),
    setting="label_order",
)
