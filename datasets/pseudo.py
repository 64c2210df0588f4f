"""Pseudo-labels: what a classifier says of unlabelled images, to train on beside the labels.

Self-training as in Self-training with Noisy Student (Xie et al. 2020, arXiv 1911.04252) with soft
labels; after masked pre-training and fine-tuning, the last step of Big Self-Supervised Models are
Strong Semi-Supervised Learners (Chen et al. 2020, arXiv 2006.10029), section 2.
"""

import os
from collections.abc import Sequence
from itertools import compress

import numpy as np

from datasets.decode import printable
from datasets.folder import FileList, ImageFiles
from datasets.labelled import Joined, LabelledImages
from datasets.labels import shared_classes
from datasets.present import csv_rows, missing_note, present
from datasets.replace import check_readable
from util.errors import BadInput

COLUMN = "p_"  # before a class's name


def read_pseudo_labels(path: str, classes: Sequence[str]) -> tuple[LabelledImages, list[str]]:
    """Rows as `main_predict.py --detector none` writes them -> images with targets, lines to say.

    Columns `path` and a `p_CLASS` for each of `classes`, matched by name; others are not used.
    Paths are those of the folder the file lies in, or else of the current folder. Rows without
    probabilities are left out. Raises BadInput.
    """
    where = f"--pseudo_labels {printable(path)}"
    rows = list(csv_rows(path))
    header = rows[0][1] if rows else []
    if "path" not in header:
        raise BadInput(f"{where}: no column `path`; write it with main_predict.py, as a CSV file")
    columns = {i: name[len(COLUMN) :] for i, name in enumerate(header) if name.startswith(COLUMN)}
    ours, theirs = shared_classes(classes, list(columns.values()))
    if lacking := [name for k, name in enumerate(classes) if k not in ours]:
        shown = printable(", ".join(COLUMN + name for name in lacking))
        raise BadInput(f"{where}: no column {shown}; the classifier must know all classes")
    places = [list(columns)[k] for k in theirs]
    names, targets, empty = [], [], 0
    for number, cells in rows[1:]:
        told = _told(cells, header, places, f"{where}, row {number}")
        empty += told is None
        if told is not None:
            names.append(cells[header.index("path")])
            targets.append(told)
    if not names:
        raise BadInput(f"{where}: no row with probabilities")
    if len(set(names)) < len(names):
        raise BadInput(
            f"{where}: several faces of one picture; cut the faces out, and predict them with "
            "main_predict.py --detector none"
        )
    root, there = _root(path, names)
    notes = missing_note(path, root, names, there)
    files = FileList.of(root, map(os.fsencode, compress(names, there)))
    p = np.array(targets, np.float32)[there]
    images = LabelledImages(ImageFiles(files), p.argmax(axis=1), p)
    check_readable(images.source, where)
    if empty:
        notes.append(f"{where}: {empty:,} rows without probabilities are left out")
    return images, [_described(where, images, classes), *notes]


def _told(cells: list[str], header: list[str], places: list[int], where: str) -> np.ndarray | None:
    """The probabilities of a row, made to sum to 1; None where it has none."""
    texts = [cells[i].strip() if i < len(cells) else "" for i in places]
    if not any(texts):
        return None
    score = dict(zip(header, cells, strict=False)).get("score") or "1"
    try:
        *p, found = map(float, (*texts, score))
    except ValueError:
        p, found = [np.nan], 1
    if found != 1:
        raise BadInput(
            f"{where}: a face that was found in a picture (score {printable(score)}); cut the "
            "faces out, and predict them with main_predict.py --detector none"
        )
    p = np.array(p)
    if not (np.isfinite(p).all() and (p >= 0).all() and p.sum() > 0):
        raise BadInput(f"{where}: {printable(', '.join(texts))} are no probabilities")
    return p / p.sum()


def _root(path: str, names: list[str]) -> tuple[str, np.ndarray]:
    """The folder that the names start from, absolute, and which of them are there."""
    folders = [os.path.abspath(os.path.dirname(path)), os.getcwd()]
    found = [present(folder, names) for folder in folders]
    best = max(range(2), key=lambda k: found[k].sum())  # the first where equal
    return folders[best], found[best]


def _described(where: str, images: LabelledImages, classes: Sequence[str]) -> str:
    counts = images.counts(len(classes))
    listed = ", ".join(f"{n} {c:,}" for n, c in zip(classes, counts, strict=True))
    sure = 100 * images.targets.max(axis=1).mean()
    return f"{where}: {len(images):,} images ({listed}), on average {sure:.0f} % sure"


def with_pseudo_labels(images: LabelledImages, more: LabelledImages) -> LabelledImages:
    """Images with labels, and after them those with pseudo-labels."""
    known = images.targets
    if known is None:
        known = np.eye(more.targets.shape[1], dtype=np.float32)[images.labels]
    labels = np.concatenate([images.labels, more.labels])
    source = Joined(images.source, more.source)
    return LabelledImages(source, labels, np.concatenate([known, more.targets]))
