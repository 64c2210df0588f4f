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

from datasets.annotation_files import listing
from datasets.fer.class_names import few, name_classes
from datasets.filetypes import is_hidden, is_image, skipped_line
from datasets.folder import FileList, ImageFiles, list_images
from datasets.labelled import LabelledImages, LabelledSet
from datasets.labels import expression
from datasets.split_names import split_called
from util.errors import BadInput
from util.wording import printable

# Names of data sets, without case, blanks and signs: a folder called so is no class.
DATA_SETS = re.compile(
    r"(raf(db|ml|au)?|affectnet\w*|fer(plus|13|2013\w*|v39k)?|ck(plus)?|jaffe|expw|[sa]few|kdef|"
    r"oulucasia|caers?|dfew|mafw|affwild2?|celeba|vggface2?|lfw)(basic|aligned|dataset)?"
)


def recognise(root: Path) -> list[str]:
    """What labelled folders lie in `root`, a short description each; [] if there are none."""
    splits = [path for name, path in subfolders(root).items() if split_called(name)]
    if max(len(subfolders(folder)) for folder in splits or [root]) < 2:
        return []
    return [f"class folders in {', '.join(f.name for f in splits)}" if splits else "class folders"]


def read(
    root: Path,
    label_order: str | None = None,
    cache: str | os.PathLike | None = None,
    usual: str | None = None,
) -> LabelledSet:
    """The splits of a labelled folder; a folder without splits has one, called "all".

    `label_order` is that of `--label_order`: see `parse_order`; `usual` is one for numbers where
    none is given. `cache`: a file to keep the listings in, `.SPLIT` added; see `list_images`.
    Raises BadInput for numbers without a label order, an empty class folder, classes that only
    some splits have, folders that are splits or data sets rather than classes, …
    """
    folders, notes = _splits(root)
    lists = {s: _list(f, f"{cache}.{s}" if cache else None) for s, f in folders.items()}
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
    """The folders in a folder by name, in byte order, without hidden ones; {} if it is none."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not is_hidden(e.name)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as e:
        raise BadInput(f"{printable(str(folder))} cannot be read ({e.strerror})") from None
    return {name: folder / name for name in sorted(names, key=os.fsencode)}


def child(folder: Path, *names: str) -> Path | None:
    """What `folder` holds under the first of these names, written in any case; None if nothing."""
    there = {name.lower(): name for name in sorted(listing(folder))}
    return next((folder / there[n.lower()] for n in names if n.lower() in there), None)


def unused_beside(folder: Path, used: Collection[str]) -> str:
    """What a folder holds beside those of its folders that are used; "" if nothing.

    Its other folders by name, and how many images.
    """
    folders = subfolders(folder)
    images = sum(is_image(n) and not is_hidden(n) and n not in folders for n in listing(folder))
    others = few([name for name in folders if name not in used])
    count = f"{images:,} image{'s' * (images > 1)}" if images else ""
    return ", ".join(filter(None, [others, count]))


def _splits(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, and what to tell of them."""
    folders, splits = subfolders(root), {}
    for name, folder in folders.items():
        split = split_called(name)
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
    if unused := unused_beside(root, [folder.name for folder in splits.values()]):
        notes.append(f"not used, beside the splits: {unused}")
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}, notes


def _list(folder: Path, cache: str | None) -> tuple[FileList, list[str], list[str]]:
    """A split's images, the class folder of each, and what to tell."""
    files = list_images(folder, cache)
    names = [files.relative(i) for i in range(len(files))]
    inside = [name for name in names if os.sep in name]
    notes = [f"{printable(folder.name)}: {line}" for line in skipped_line(files.skipped)]
    if len(inside) < len(names):
        first = next(name for name in names if os.sep not in name)
        count = f"{len(names) - len(inside):,} images of {printable(folder.name)}"
        notes.append(f"{count} lie in no class folder and are left out (first: {printable(first)})")
        files = FileList.of(files.root, map(os.fsencode, inside), files.skipped)
    found = [name.partition(os.sep)[0] for name in inside]
    for name in subfolders(folder).keys() - set(found):
        where = printable(str(folder / name))
        raise BadInput(f"{where}: a class folder without images; fill it or remove it")
    if not found:
        raise BadInput(f"{printable(str(folder))}: images, but no folder a class to label them")
    return files, found, notes


# What of them can be used


def _check_classes(folder: Path, names: Sequence[str], files: FileList) -> None:
    """Raises BadInput for folders that are data sets, or that hold splits or classes."""
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
            "themselves; give one of them, or call them train, val and test"
        )


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
                f"{printable(str(folders[split]))}: class {few(new)}, which "
                f"{printable(str(folders[whole]))} lacks; splits need the same classes"
            )
        lacking = [name for name in there[whole] if name not in there[split]]
        if lacking:
            notes.append(f"{split} has no images of {few(lacking)}")
    return notes
