"""FER2013 (Goodfellow et al. 2013) and its relabelling FERPlus (Barsoum et al. 2016).

FER2013 is one file, `fer2013.csv` (`emotion,pixels,Usage`): 48 × 48 grey values per row. FERPlus
adds `fer2013new.csv`, which has ten people's votes for each of these rows. Or it consists of the
folders `FER2013{Train,Valid,Test}/` that the owners' tool writes, with PNG files and a `label.csv`:
image name, a box as one cell (it is the whole image, and may be absent) and ten counts of votes. If
`label.csv` has a header, its columns are found by the names in `fer2013new.csv`.

Five rules for making labels from votes are in use, and results depend on them: `--label_rule`, see
datasets/fer/votes.py.
"""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from datasets.annotation_files import (
    bad_row,
    columns,
    csv_rows,
    files_exist,
    find_repeats,
    integer,
    listing,
    missing_note,
    repeated_note,
)
from datasets.fer.class_folder import child, subfolders
from datasets.fer.votes import DEFAULT_RULE, RULES
from datasets.folder import FileList, ImageFiles
from datasets.labelled import LabelledImages, LabelledSet, Source, Subset, digest_of
from datasets.labels import ORDERS
from datasets.layout import Layout
from util.errors import BadInput
from util.wording import printable

CLASSES = ORDERS["ferplus"]
COLUMNS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
COLUMNS += ("unknown", "NF")  # NF: not a face
USAGES = {"training": "train", "publictest": "val", "privatetest": "test"}
FOLDERS = {"train": "FER2013Train", "val": "FER2013Valid", "test": "FER2013Test"}
FER2013_PUBLISHED = {"train": 28_709, "val": 3_589, "test": 3_589}
SIDE = 48
MOST_VOTES = 10**6  # ten people voted, but other counts may be larger


# Pixels in a CSV


class PixelFaces:
    """A Source: grey images from the rows of a CSV file, kept in memory."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, file: str) -> None:
        """`pixels` (n, 48, 48) uint8; `rows` (n,) are their line numbers, from 1."""
        self.pixels, self.rows, self.file = pixels, rows, file
        self.digest = digest_of(pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, i: int) -> np.ndarray:
        """Image i -> (48, 48, 3) uint8."""
        return np.repeat(self.pixels[i][..., None], 3, axis=2)

    def name(self, i: int) -> str:
        """File and row, such as `fer2013.csv:2`."""
        return f"{self.file}:{self.rows[i]}"


def _read_pixels(path: Path) -> tuple[PixelFaces, list[str], list[int]]:
    """The images of `fer2013.csv`, the split of each, and its FER2013 label."""
    rows = csv_rows(path)
    _, header = next(rows, (1, []))
    places = columns(path, header, ("emotion", "pixels", "Usage"))
    pixels, numbers, splits, labels = [], [], [], []
    for row, cells in rows:
        emotion, grey, usage = _cells(path, row, cells, places)
        label = integer(emotion)
        if label is None or not 0 <= label < len(ORDERS["fer2013"]):
            raise bad_row(path, row, "its emotion must be an id from 0 to 6")
        pixels.append(_grey(path, row, grey))
        splits.append(_split(path, row, usage))
        labels.append(label)
        numbers.append(row)
    if not pixels:
        raise BadInput(f"{printable(str(path))} has no rows")
    stack = np.stack(pixels).reshape(-1, SIDE, SIDE)
    return PixelFaces(stack, np.array(numbers), path.name), splits, labels


def _grey(path: Path, row: int, text: str) -> np.ndarray:
    """The pixels of a row -> (2304,) uint8."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # older NumPy versions only warn
            values = np.fromstring(text, np.int64, sep=" ")
    except (ValueError, DeprecationWarning):
        raise bad_row(path, row, "its pixels are not numbers separated by spaces") from None
    if len(values) != SIDE * SIDE:
        what = f"{len(values):,} pixels; there must be {SIDE} × {SIDE} = {SIDE**2:,}"
        raise bad_row(path, row, what)
    if values.min() < 0 or values.max() > 255:
        what = f"pixels from {values.min()} to {values.max()}; they must be 0 to 255"
        raise bad_row(path, row, what)
    return values.astype(np.uint8)


def _split(path: Path, row: int, usage: str) -> str:
    """The split that a cell of the column Usage stands for."""
    split = USAGES.get(usage.lower())
    if split is None:
        raise bad_row(path, row, "its Usage must be Training, PublicTest or PrivateTest")
    return split


def _cells(path: Path, row: int, cells: list[str], places: list[int]) -> list[str]:
    """The cells of a row at some indices. Raises BadInput for a row that is too short."""
    if len(cells) <= max(places):
        raise bad_row(path, row, f"only {len(cells)} cells")
    return [cells[i].strip() for i in places]


# FER2013


def recognise_fer2013(root: Path) -> list[str]:
    """A description of `fer2013.csv`, in a list; [] without it or with `fer2013new.csv`."""
    found = child(root, "fer2013.csv")
    return ["FER2013, fer2013.csv"] if found and not child(root, "fer2013new.csv") else []


def read_fer2013(root: Path) -> LabelledSet:
    """Read FER2013's three splits and 7 classes. Raises BadInput naming file and row."""
    path = child(root, "fer2013.csv")
    if path is None:
        raise BadInput(f"--data_path {printable(str(root))}: no fer2013.csv in it")
    source, splits, labels = _read_pixels(path)
    places = _places(splits)
    return LabelledSet(
        name="fer2013",
        title="FER2013",
        classes=ORDERS["fer2013"],
        splits={
            split: LabelledImages(Subset(source, rows), np.array(labels)[rows])
            for split, rows in places.items()
        },
        published=FER2013_PUBLISHED,
    )


def _places(splits: list[str]) -> dict[str, np.ndarray]:
    """The indices of each split's rows."""
    names = np.array(splits)
    return {split: np.flatnonzero(names == split) for split in FOLDERS if split in splits}


# FERPlus


def recognise(root: Path) -> list[str]:
    """Short descriptions of FERPlus's layouts in `root`; [] if there are none."""
    found = ["FERPlus, fer2013new.csv and fer2013.csv"] if _pair(root) else []
    folders = _folders(root)
    return found + ([f"FERPlus, {folders['train'].name}/label.csv and so on"] if folders else [])


def read(root: Path, rule: str | None = None) -> LabelledSet:
    """Read FERPlus's three splits and 8 classes; a rule (by default DEFAULT_RULE) makes the labels.

    If both layouts are present, reads the CSV files. Raises BadInput naming file and row.
    """
    rule = rule or DEFAULT_RULE
    if rule not in RULES:
        raise BadInput(f"--label_rule {rule}: choose from {', '.join(RULES)}")
    pair, folders = _pair(root), _folders(root)
    if not pair and not folders:
        raise BadInput(
            f"--data_path {printable(str(root))}: no FERPlus; looked for fer2013new.csv and "
            "fer2013.csv, and for FER2013Train/label.csv with images beside it"
        )
    parts, notes = _read_pair(*pair) if pair else _read_folders(folders)
    if pair and folders:
        notes.append(f"{folders['train'].name} and so on are not used")
    words, label, of_csv, of_folders = RULES[rule]
    splits = {}
    for split, (source, votes) in parts.items():
        labels, kept, targets = label(votes)
        rows = np.flatnonzero(kept)
        if not len(rows):
            what = f"none of the {len(votes):,} images of {split} gets a label"
            raise BadInput(f"--label_rule {rule}: {what}; choose another of {', '.join(RULES)}")
        some = None if targets is None else targets[rows]
        splits[split] = LabelledImages(Subset(source, rows), labels[rows], some)
        if len(rows) < len(votes):
            count = len(votes) - len(rows)
            notes.append(f"{split}: {count:,} images have no label under this rule")
    return LabelledSet(
        name="ferplus",
        title="FERPlus, CSV files" if pair else "FERPlus, folders",
        classes=CLASSES,
        splits=splits,
        rule=f"{words} (--label_rule {rule})",
        notes=tuple(notes),
        published=dict(zip(FOLDERS, of_csv if pair else of_folders, strict=True)),
        options={"label_rule": rule},
    )


Parts = dict[str, tuple[Source, np.ndarray]]  # by split: images, and their votes (n, 10)


def _pair(root: Path) -> list[Path]:
    """fer2013new.csv and fer2013.csv; [] if one is missing."""
    pair = [child(root, "fer2013new.csv"), child(root, "fer2013.csv")]
    return pair if all(pair) else []


def _read_pair(votes_file: Path, pixels_file: Path) -> tuple[Parts, list[str]]:
    """The images of one CSV with the votes of the other, row by row, and notes."""
    rows = csv_rows(votes_file)
    _, header = next(rows, (1, []))
    places = columns(votes_file, header, ("Usage", "Image name", *COLUMNS))
    source, splits, _ = _read_pixels(pixels_file)
    votes, named = np.zeros((len(source), len(COLUMNS)), np.int64), np.zeros(len(source), bool)
    count = 0
    for count, (row, cells) in enumerate(rows, 1):
        usage, name, *cells = _cells(votes_file, row, cells, places)
        if count > len(source):
            continue
        if _split(votes_file, row, usage) != splits[count - 1]:
            other = f"row {source.rows[count - 1]} of {pixels_file.name}"
            raise bad_row(votes_file, row, f"another Usage than {other}: rows must correspond")
        if name:  # rows without an image name have no face
            named[count - 1], votes[count - 1] = True, _votes(votes_file, row, cells)
    if count != len(source):
        raise BadInput(
            f"{printable(str(votes_file))} has {count:,} rows, but {pixels_file.name} "
            f"{len(source):,}; rows must correspond, so use both as their owners ship them"
        )
    parts = {
        split: (Subset(source, places[named[places]]), votes[places[named[places]]])
        for split, places in _places(splits).items()
    }
    return parts, _nameless_note(int((~named).sum()))


def _nameless_note(count: int) -> list[str]:
    """The note that counts the rows without an image, which have no face; [] if there are none."""
    return [f"{count:,} rows without an image are left out"] if count else []


def _votes(path: Path, row: int, cells: list[str]) -> list[int]:
    """The ten counts of a row. Raises BadInput for anything but counts."""
    counts = [integer(cell) for cell in cells]
    for column, count in zip(COLUMNS, counts, strict=True):
        if count is None or not 0 <= count <= MOST_VOTES:
            raise bad_row(path, row, f"its votes for {column} must be a count")
    return counts


def _folders(root: Path) -> dict[str, Path]:
    """The split folders of the owners' tool; {} unless there are training images and labels."""
    for base in (root, child(root, "data")):
        found = {s: child(base, name) for s, name in FOLDERS.items()} if base else {}
        train = found.get("train")
        if train and child(train, "label.csv") and any(map(_is_png, listing(train))):
            return {split: folder for split, folder in found.items() if folder}
    return {}


def _is_png(name: str) -> bool:
    return name.lower().endswith(".png")


def _read_folders(folders: dict[str, Path]) -> tuple[Parts, list[str]]:
    """The images and votes in the split folders, and notes."""
    parts, notes, nameless = {}, [], 0
    for split, folder in folders.items():
        path = child(folder, "label.csv")
        if path is None:
            raise BadInput(f"{printable(str(folder))}: no label.csv in it")
        every = list(_label_rows(path))
        rows, told = _once(path, [row for row in every if row[1]])
        nameless += sum(not name for _, name, _ in every)
        names = [f"{folder.name}/{name}" for _, name, _ in rows]
        there = files_exist(folder.parent, names)
        notes += [*told, *missing_note(path, folder.parent, names, there)]
        kept = [os.fsencode(name) for name, found in zip(names, there, strict=True) if found]
        votes = np.array([counts for *_, counts in rows], np.int64).reshape(-1, len(COLUMNS))
        files = FileList.of(str(folder.parent.absolute()), kept)
        parts[split] = ImageFiles(files), votes[there]
    return parts, notes + _nameless_note(nameless)


Row = tuple[int, str, list[int]]  # of a label.csv: line number from 1, image name, ten counts


def _once(path: Path, rows: list[Row]) -> tuple[list[Row], list[str]]:
    """The rows without those that repeat another one, and the note that counts these.

    Raises BadInput if no row names an image, or if two rows give an image different votes.
    """
    if not rows:
        raise BadInput(f"{printable(str(path))} names no image")
    again, differ = find_repeats(
        [name for _, name, _ in rows], [tuple(votes) for *_, votes in rows]
    )
    if differ:
        first, row = (rows[i][0] for i in differ[0])
        what = f"other votes than in row {first} for the same image; keep one of them"
        raise bad_row(path, row, what)
    note = repeated_note(path, [row for row, *_ in rows], again)
    kept = [row for row, skip in zip(rows, again, strict=True) if not skip]
    return kept, [f"{path.parent.name}: {line}" for line in note]


def _label_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a `label.csv`; those without an image name have no counts."""
    places = None
    for row, cells in csv_rows(path):
        if places is None and "neutral" in [cell.strip().lower() for cell in cells]:
            places = columns(path, cells, ("Image name", *COLUMNS))
            continue
        if places is None and len(cells) - len(COLUMNS) not in (1, 2):
            what = f"{len(cells)} cells; there must be a name, perhaps a box, and {len(COLUMNS)} "
            raise bad_row(path, row, what + "votes")
        at = places or [0, *range(len(cells) - len(COLUMNS), len(cells))]
        name, *counts = _cells(path, row, cells, at)
        yield row, name, _votes(path, row, counts) if name else []


def _missing(root: Path) -> str:
    """See `Layout.missing`."""
    if child(root, "fer2013new.csv"):
        return "FERPlus's votes, but no images; put fer2013.csv beside fer2013new.csv"
    if {name.lower() for name in FOLDERS.values()} & {n.lower() for n in subfolders(root)}:
        return "FERPlus's folders, but not both images and label.csv in FER2013Train"
    return ""


LAYOUT = Layout(
    title="FERPlus",
    shape="fer2013new.csv and fer2013.csv; FER2013Train/label.csv",
    recognise=recognise,
    read=lambda root, asked: read(root, asked.label_rule),
    missing=_missing,
    setting="label_rule",
    default=DEFAULT_RULE,
)
FER2013 = Layout(
    title="FER2013",
    shape="fer2013.csv",
    recognise=recognise_fer2013,
    read=lambda root, asked: read_fer2013(root),
)
