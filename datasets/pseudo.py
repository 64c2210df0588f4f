"""Pseudo-labels: a classifier's predictions for unlabelled images, as additional training data.

Self-training with soft labels, as in Self-training with Noisy Student (Xie et al. 2020, arXiv
1911.04252). After pre-training and fine-tuning, it is the last step of Big Self-Supervised Models
are Strong Semi-Supervised Learners (Chen et al. 2020, arXiv 2006.10029), section 2.
"""

import os
from collections.abc import Sequence
from itertools import compress

import numpy as np

from datasets.annotation_files import csv_rows, files_exist, missing_note
from datasets.folder import FileList, ImageFiles
from datasets.labelled import Concatenated, LabelledImages
from datasets.labels import shared_classes
from datasets.unreadable import check_readable
from util.errors import BadInput
from util.wording import printable

COLUMN = "p_"  # the prefix of a class's name
BOX = {"face", "left", "top", "width", "height", "score"}  # columns about a detected face
START = "paths are relative to the folder of the file, or else to the current folder"
CUT = "crop the faces first, then predict the crops with main_predict.py --detector none"


def read_pseudo_labels(path: str, classes: Sequence[str]) -> tuple[LabelledImages, list[str]]:
    """Read what `main_predict.py --detector none` writes -> images with targets, and notes.

    The columns are `path` and a `p_CLASS` for each of `classes`, matched by name. Paths are
    relative to the folder of the file, or else to the current folder. Rows without probabilities
    are left out, and those whose most probable class is not among `classes`. Raises BadInput.
    """
    where = f"--pseudo_labels {printable(path)}"
    try:
        rows = list(csv_rows(path))
    except BadInput as error:
        raise BadInput(f"--pseudo_labels {error}") from None
    header = rows[0][1] if rows else []
    if "path" not in header:
        raise BadInput(f"{where}: no column `path`; create the CSV file with main_predict.py")
    known = [name[len(COLUMN) :] for name in header if name.startswith(COLUMN)]
    ours, theirs = shared_classes(classes, known)
    if lacking := [name for k, name in enumerate(classes) if k not in ours]:
        shown = printable(", ".join(COLUMN + name for name in lacking))
        raise BadInput(f"{where}: no column {shown}; the classifier must know all classes")
    names, targets, empty, strange = [], [], 0, 0
    for number, cells in rows[1:]:
        row = dict(zip(header, cells, strict=False))
        place = f"{where}, row {number}"
        p = _probabilities(row, known, place)
        if p is None:
            empty += 1
        elif p.argmax() not in theirs:
            strange += 1
        else:
            names.append(_name(row, place))
            targets.append(p[theirs] / p[theirs].sum())
    notes = []
    if empty:
        notes.append(f"{where}: {empty:,} rows without probabilities are left out")
    if strange:
        notes.append(f"{where}: {strange:,} images of other classes are left out")
    if not names:
        raise BadInput("; ".join([f"{where}: no row with probabilities of these classes", *notes]))
    if len(set(names)) < len(names):
        raise BadInput(f"{where}: several faces in one picture; {CUT}")
    files, there, missing = _present(path, names)
    p = np.array(targets, np.float32)[there]
    images = LabelledImages(ImageFiles(files), p.argmax(axis=1), p)
    check_readable(images.source, where)
    return images, [_described(where, images, classes), *missing, *notes]


def _probabilities(row: dict[str, str], known: list[str], where: str) -> np.ndarray | None:
    """The probabilities of the classes `known`, in their order; None for a row without any."""
    texts = [row.get(COLUMN + name, "").strip() for name in known]
    if not any(texts):
        return None
    p = np.array([_number(text) for text in texts])
    for name, value in zip(known, p, strict=True):
        if not 0 <= value <= 1:
            raise BadInput(f"{where}: {COLUMN}{printable(name)} must be a probability")
    if not p.any():
        raise BadInput(f"{where}: all probabilities are 0")
    return p


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _name(row: dict[str, str], where: str) -> str:
    """The path in a row. Raises BadInput for a missing one, and for a face in a larger picture."""
    if not row.get("path"):
        raise BadInput(f"{where}: has no path")
    if set(row) >= BOX and _number(row["score"]) != 1:
        raise BadInput(f"{where}: a face detected in a picture; {CUT}")
    return os.path.normpath(row["path"])


def _present(path: str, names: list[str]) -> tuple[FileList, np.ndarray, list[str]]:
    """The files that exist, which of the names these are (n,) bool, and a note on the others."""
    folders = [os.path.abspath(os.path.dirname(path)), os.getcwd()]
    found = [files_exist(folder, names) for folder in folders]
    k = int(found[1].sum() > found[0].sum())
    folder, there = folders[k], found[k]
    files = FileList.of(folder, map(os.fsencode, compress(names, there)))
    try:
        return files, there, missing_note(path, folder, names, there, advice=START)
    except BadInput as error:
        raise BadInput(f"--pseudo_labels {error}") from None


def _described(where: str, images: LabelledImages, classes: Sequence[str]) -> str:
    counts = images.counts(len(classes))
    listed = ", ".join(f"{n} {c:,}" for n, c in zip(classes, counts, strict=True))
    sure = 100 * images.targets.max(axis=1).mean()
    return f"{where}: {len(images):,} images ({listed}), mean confidence {sure:.0f} %"


def with_pseudo_labels(images: LabelledImages, more: LabelledImages) -> LabelledImages:
    """The labelled images, followed by those with pseudo-labels."""
    known = images.targets
    if known is None:
        known = np.eye(more.targets.shape[1], dtype=np.float32)[images.labels]
    labels = np.concatenate([images.labels, more.labels])
    source = Concatenated(images.source, more.source)
    return LabelledImages(source, labels, np.concatenate([known, more.targets]))
