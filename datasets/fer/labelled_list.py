"""Labelled lists: `path label` lines as many repositories ship them, or a CSV with such columns.

Labels stand for classes as the names of class folders do: names decide, numbers need
`--label_order`.
"""

import os
import re
from itertools import compress
from pathlib import Path

import numpy as np

from datasets.annotation_files import (
    bad_row,
    files_exist,
    find_repeats,
    missing_note,
    repeated_note,
)
from datasets.fer.class_names import name_classes
from datasets.folder import FileList, ImageFiles
from datasets.labelled import LabelledImages, LabelledSet
from datasets.layout import Layout
from datasets.listfile import LABELS, PATHS, ListEntries, check_entries, read_list
from datasets.split_names import split_called
from util.errors import BadInput
from util.wording import printable


def has_labels(path: Path) -> bool:
    """Whether a list of images has labels. Raises BadInput for a file that is not such a list."""
    return bool(read_list(str(path)).labels)


def read(path: Path, label_order: str | None = None, usual: str | None = None) -> LabelledSet:
    """Read the images of a list: its splits if it has a column of them, else a single one, "all".

    `label_order`, `usual`: see `class_folder.read`. Paths are relative to the list's own folder, or
    absolute. Raises BadInput, naming the entry, for a missing label or an unknown split.
    """
    listed, where = read_list(str(path)), f"--data_path {printable(str(path))}"
    there = files_exist(path.parent, listed.names)
    if listed.guessed or not there.any():
        check_entries(str(path), listed.names, listed)
    if not listed.labels:
        raise BadInput(
            f"{where}: a list of images without labels; write `path label` lines, or a CSV with "
            f"columns such as {PATHS[0]},{LABELS[0]} (also {', '.join(LABELS[1:])})"
        )
    splits = _splits(path, listed)
    given = [_number(label) for label in listed.labels]
    names = sorted(set(given), key=os.fsencode)
    classes, called, notes, order = name_classes(
        where, names, label_order=label_order, usual=usual, what="label"
    )
    place = {name: classes.index(word) for name, word in called.items()}
    labels = np.array([place[label] for label in given])
    again = _repeated(path, listed, splits, labels)
    notes += [*listed.notes(), *repeated_note(path, listed.rows, again)]
    images, several = {}, len(set(splits)) > 1
    for split in dict.fromkeys(splits):
        part = np.flatnonzero(~again & (np.array(splits) == split))
        some, found = [listed.names[i] for i in part], there[part]
        notes += missing_note(
            path, path.parent, names=some, there=found, split=split if several else ""
        )
        files = FileList.of(str(path.parent), map(os.fsencode, compress(some, found)))
        images[split] = LabelledImages(ImageFiles(files), labels[part[found]])
    return LabelledSet(
        name="list",
        title=f"list {printable(path.name)}",
        classes=classes,
        splits=images,
        notes=tuple(notes),
        options={"label_order": order} if order else {},
    )


def _number(label: str) -> str:
    """`3` for `3.0`, as some programs save integers; other labels stay as they are."""
    return re.sub(r"^(\d+)\.0*$", r"\1", label)


def _repeated(path: Path, listed: ListEntries, splits: list[str], labels: np.ndarray) -> np.ndarray:
    """Find the entries that repeat an earlier one of their split -> (n,) bool.

    Raises BadInput if an image has two different labels.
    """
    folder = str(path.parent)
    places = [os.path.normpath(os.path.join(folder, name)) for name in listed.names]
    _, differ = find_repeats(places, labels.tolist())
    if differ:
        one, other = differ[0]
        what = f"another label than in row {listed.rows[one]} for the same image; keep one of them"
        raise bad_row(path, listed.rows[other], what)
    return find_repeats(list(zip(places, splits, strict=True)), labels.tolist())[0]


def _splits(path: Path, listed: ListEntries) -> list[str]:
    """The split of each entry. Raises BadInput for a missing label or an unknown split."""
    for row, label in zip(listed.rows, listed.labels, strict=True):
        if not label:
            raise bad_row(path, row, "has no label; add it, or remove the row")
    if not listed.splits:
        return ["all"] * len(listed.names)
    called = {word: split_called(word) for word in set(listed.splits)}
    for row, word in zip(listed.rows, listed.splits, strict=True):
        if not called[word]:
            raise bad_row(path, row, "its split must be train, val or test")
    return [called[word] for word in listed.splits]


LAYOUT = Layout(
    title="lists",
    shape="`path label` lines",
    recognise=lambda root: [],  # a file, not a folder
    read=lambda path, asked: read(path, asked.label_order, asked.usual_order),
    setting="label_order",
)
