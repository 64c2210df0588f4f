"""AffectNet (Mollahosseini et al. 2017), in each of the three layouts its owners have shipped.

2017 lists: `training.csv`, `validation.csv`, photographs with a face box each. npy: images cropped
by the owners, with `annotations/<id>_exp.npy`. AffectNet+ (2024): the same, with
`annotations/<id>.json`. The test split is the owners' validation set, as in all publications.
"""

import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import chain, compress
from pathlib import Path

import numpy as np

from datasets.annotation_files import (
    bad_row,
    by_stem,
    columns,
    csv_rows,
    evenly_spaced,
    files_exist,
    find_repeats,
    integer,
    listing,
    missing_note,
    repeated_note,
    same_stem_note,
)
from datasets.fer.affectnet_layouts import (
    CSV,
    ENDINGS,
    EXPRESSION,
    FEW,
    HEADER,
    IMAGE_FOLDERS,
    NPY,
    PATH,
    FoundLayout,
    described,
    find,
    is_header,
    whats_missing,
)
from datasets.fer.class_folder import child, subfolders
from datasets.filetypes import is_hidden, is_image
from datasets.folder import FileList, ImageFiles
from datasets.labelled import FaceFiles, LabelledImages, LabelledSet
from datasets.labels import ORDERS
from datasets.layout import Layout
from datasets.listfile import BOX
from datasets.split_names import split_called
from util.errors import BadInput
from util.wording import printable

# Our choice, not a published value. A detector's box ends close to brows and chin: this margin
# keeps both in the crop under small shifts and rotations, and the box still fills three quarters of
# the crop's side length.
DEFAULT_MARGIN = 0.15
IDS = 11  # 0–7 are the expressions in the order of ORDERS, then None, Uncertain, No-face

READERS = 16  # threads, so that the delays of a network disk overlap

# Folders of its layouts; other data sets have SPLIT_FOLDERS, too.
SPLIT_FOLDERS = {"train_set", "val_set", "validation_set"}
PARTS = {"manually_annotated_images", "manually_annotated_compressed", "human_annotated"}
PARTS |= SPLIT_FOLDERS


def recognise(root: Path) -> list[str]:
    """Short descriptions of AffectNet's layouts in `root` or one folder below; often []."""
    return [described(found, Path(root)) for found in find(Path(root))]


def read(root: Path, nb_classes: int | None = None, margin: float | None = None) -> LabelledSet:
    """Read AffectNet's 8 classes, or 7 without Contempt, in the one layout in or just below `root`.

    `margin`: see FaceFiles; only the photographs of the 2017 lists are cropped here. Raises
    BadInput for a label outside 0 to 10, naming file and row, and for a folder that is not in an
    owners' layout.
    """
    root = Path(os.path.abspath(root))
    if nb_classes not in (None, 7, 8):
        raise BadInput(f"--nb_classes {nb_classes}: AffectNet has 7 or 8 classes")
    if margin is not None and not 0 <= margin < math.inf:
        raise BadInput(f"--face_margin {margin}: give a share of the face box, such as 0.15")
    layouts = find(root)
    if not layouts:
        raise BadInput(f"--data_path {printable(str(root))}: {whats_missing(root)}")
    if len(layouts) > 1:
        several = "; ".join(described(found, root) for found in layouts)
        what = f"AffectNet more than once: {several}; give the folder of one of them"
        raise BadInput(f"--data_path {printable(str(root))} holds {what}")
    found, classes = layouts[0], ORDERS["affectnet"][: nb_classes or 8]
    options: dict[str, object] = {"nb_classes": len(classes)}
    if found.kind == CSV:
        options["face_margin"] = DEFAULT_MARGIN if margin is None else margin
    parts, crop = _parts(found, classes, options.get("face_margin", 0))
    notes = [note for _, told in parts.values() for note in told]
    if "test" in parts:
        notes.append("test is AffectNet's validation set, on which results are published")
    return LabelledSet(
        name="affectnet",
        title=f"AffectNet-{len(classes)} ({found.kind}, {crop})",
        classes=classes,
        splits={split: images for split, (images, _) in parts.items()},
        notes=tuple(notes),
        published=published(len(classes)),
        options=options,
    )


def published(classes: int) -> dict[str, int | tuple[int, ...]]:
    """The owners' counts of images by split, for 7 or 8 classes."""
    return {"train": {8: 287_651, 7: 283_901}[classes], "test": (500,) * classes}


def _parts(
    found: FoundLayout, classes: Sequence[str], margin: float
) -> tuple[dict[str, tuple[LabelledImages, list[str]]], str]:
    """The images of each split of a layout, with notes; and how the faces were cropped."""
    places = found.splits.items()
    if found.kind == CSV:
        parts = {s: _by_list(path, found.base, classes, margin) for s, path in places}
        return parts, f"faces cropped with margin {margin:g}"
    parts = {s: _by_folder(folder, found.kind, classes) for s, folder in places}
    return parts, "cropped by its owners"


# The 2017 lists


def _by_list(
    path: Path, base: Path, classes: Sequence[str], margin: float
) -> tuple[LabelledImages, list[str]]:
    """The images that a list names, cropped to their faces, and notes."""
    names, labels, boxes, told = _once(path)
    kept, notes = _of_classes(labels, classes, path)
    notes = [*told, *notes]
    names = [names[i] for i in kept]
    root = _image_folder(path, base, names)
    there = files_exist(root, names)
    notes += missing_note(path, root, names, there)
    kept, files = kept[there], FileList.of(str(root), map(os.fsencode, compress(names, there)))
    whole = int((boxes[kept, 2] == 0).sum())
    if whole:
        some = f"{whole:,} of {len(files):,} images"
        notes.append(f"{path.name}: {some} have no usable face box and are used whole")
    return LabelledImages(FaceFiles(files, boxes[kept], margin), labels[kept]), notes


def _once(path: Path) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """The rows of a list without repeated ones, and notes on these and on contradicting labels."""
    names, labels, boxes, rows = _read_list(path)
    faces = list(zip(names, map(tuple, boxes.tolist()), strict=True))
    again, differ = find_repeats(faces, labels.tolist())
    told = repeated_note(path, rows, again)
    if differ:
        first = f"first: row {rows[differ[0][1]]}, unlike row {rows[differ[0][0]]}"
        count = f"{len(differ):,} rows of {path.name} label a face differently from an earlier row"
        told.append(f"{count} and are kept ({first})")
    return list(compress(names, ~again)), labels[~again], boxes[~again], told


def _read_list(path: Path) -> tuple[list[str], np.ndarray, np.ndarray, list[int]]:
    """All rows of a list: names, expression ids (n,), boxes (n, 4) int32 with width 0 for none, and
    line numbers.
    """
    names, labels, boxes, rows, places = [], [], [], [], None
    for row, cells in csv_rows(path):
        if places is None:
            headed = is_header(cells)
            places = columns(path, cells if headed else HEADER, (PATH, EXPRESSION, *BOX))
            if headed:
                continue
        if len(cells) <= max(places):
            raise bad_row(path, row, f"only {len(cells)} cells")
        name, expression, *box = (cells[i].strip() for i in places)
        if not name:
            raise bad_row(path, row, "names no image")
        names.append(name)
        rows.append(row)
        try:
            labels.append(_id(expression))
        except ValueError as e:
            raise bad_row(path, row, str(e)) from None
        boxes.append(_box(box))
    return names, np.array(labels, np.int64), np.array(boxes, np.int32).reshape(-1, 4), rows


def _id(value: object) -> int:
    """An expression's id, 0..10. Raises ValueError for anything else."""
    label = integer(value)
    if label is None or not 0 <= label < IDS:
        raise ValueError(f"its expression must be an id from 0 to {IDS - 1}")
    return label


def _box(cells: Sequence[str]) -> tuple[int, int, int, int]:
    """Left, top, width, height in pixels; all 0 if they are not numbers or the box is empty."""
    try:
        left, top, width, height = (round(float(cell)) for cell in cells)
    except (ValueError, OverflowError):  # empty, NULL, NaN, infinite
        return 0, 0, 0, 0
    if min(width, height) <= 0 or max(map(abs, (left, top, width, height))) >= 2**31:
        return 0, 0, 0, 0
    return left, top, width, height


def _image_folder(path: Path, base: Path, names: Sequence[str]) -> Path:
    """The folder that a list's names are relative to: the first of the usual ones with some."""
    some = [names[i] for i in evenly_spaced(len(names))]
    folders = [*(base / folder for folder in IMAGE_FOLDERS), base]
    for folder in folders:
        if any(os.path.exists(folder / name) for name in some):
            return folder
    places = ", ".join(printable(str(folder)) for folder in folders)
    raise BadInput(
        f"{printable(str(path))}: none of {len(some)} images it names exists, such as "
        f"{printable(some[0])}; looked in {places}; unpack the images into one of them"
    )


# Folders with an annotation file for each image


def _by_folder(folder: Path, kind: str, classes: Sequence[str]) -> tuple[LabelledImages, list[str]]:
    """The images of a split folder that have annotations, in numerical order, and notes."""
    ending, value = ENDINGS[kind], _npy_value if kind == NPY else _json_value
    images, other_images = _by_stem(folder / "images")
    annotations, others = _by_stem(folder / "annotations", ending)
    notes = same_stem_note(folder.name, [*other_images, *others])
    notes += _alone(folder, images, annotations, f"images have no annotations/<id>{ending}")
    notes += _alone(folder, annotations, images, "annotations have no image")
    stems = sorted(images.keys() & annotations.keys(), key=_number)
    labels = _read_labels([f"{folder}/annotations/{annotations[stem]}" for stem in stems], value)
    kept, left_out = _of_classes(labels, classes, folder)
    # Names begin with the split's folder, because train and test images have the same numbers.
    names = (os.fsencode(f"{folder.name}/images/{images[stems[i]]}") for i in kept)
    source = ImageFiles(FileList.of(str(folder.parent), names))
    return LabelledImages(source, labels[kept]), notes + left_out


def _by_stem(folder: Path, ending: str = "") -> tuple[dict[str, str], list[str]]:
    """The files with an ending in a folder, by stem, and those whose stem another file has, too.

    Without an ending, the images in the folder.
    """
    names = [name for name in listing(folder) if not is_hidden(name)]
    if ending:
        return by_stem((n[: -len(ending)], n) for n in names if n.lower().endswith(ending))
    return by_stem((os.path.splitext(name)[0], name) for name in names if is_image(name))


def _number(stem: str) -> tuple[bool, int, str]:
    """A sort key: numbers by value, and before all other stems."""
    numeric = stem.isascii() and stem.isdigit()
    return not numeric, int(stem) if numeric else 0, stem


def _alone(folder: Path, files: dict[str, str], others: dict[str, str], what: str) -> list[str]:
    """The note on files without a counterpart, or []. Raises BadInput if more than half are."""
    alone = sorted(files.keys() - others.keys(), key=_number)
    if not alone:
        return []
    told = f"{len(alone):,} of {len(files):,} {what} (first: {printable(files[alone[0]])})"
    if 2 * len(alone) > len(files):
        raise BadInput(f"{printable(str(folder))}: {told}; unpack images and annotations")
    return [f"{folder.name}: {told}"]


def _read_labels(paths: Sequence[str], value: Callable[[bytes], object]) -> np.ndarray:
    """Read the expression ids (n,) in annotation files."""

    def some(start: int) -> list[int]:
        return [_read_label(path, value) for path in paths[start : start + FEW]]

    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(some, range(0, len(paths), FEW))
        return np.fromiter(chain.from_iterable(parts), np.int64, len(paths))


def _read_label(path: str, value: Callable[[bytes], object]) -> int:
    """Read the expression id in an annotation file."""
    try:
        with open(path, "rb") as file:
            return _id(value(file.read()))
    except OSError as e:
        raise BadInput(f"{printable(path)} cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise BadInput(f"{printable(path)}: {e}") from None


@lru_cache(1024)  # files have few different contents; parsing one takes longer than reading five
def _npy_value(data: bytes) -> object:
    """The single value in a NumPy file: a number, or one as text. Raises ValueError."""
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception:  # damaged headers raise SyntaxError, tokenize.TokenError, …
        raise ValueError("is not a NumPy file of numbers") from None
    if array.size != 1:
        raise ValueError(f"holds {array.size} values instead of one")
    return array.item()


def _json_value(data: bytes) -> object:
    """The value of `Human-Label`, however the two words are joined. Raises ValueError."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None
    for key, found in record.items() if isinstance(record, dict) else ():
        if re.sub("[-_ ]", "", key).lower() == "humanlabel":
            return found
    raise ValueError("has no Human-Label")


# All layouts


def _of_classes(
    labels: np.ndarray, classes: Sequence[str], source: Path
) -> tuple[np.ndarray, list[str]]:
    """Indices of the images that have one of the classes, and a note on the others."""
    kept = np.flatnonzero(labels < len(classes))
    if not len(kept):
        where = printable(str(source))
        raise BadInput(f"{where} has no image of any of the {len(classes)} classes")
    contempt = int(((labels >= len(classes)) & (labels < 8)).sum())
    others = len(labels) - len(kept) - contempt
    told = [f"{others:,} None, Uncertain or No-face"] if others else []
    told += [f"{contempt:,} Contempt"] if contempt else []
    return kept, [f"{source.name}: left out {' and '.join(told)}"] if told else []


def _with_classes(data: LabelledSet, count: int) -> LabelledSet:
    """The 7 classes without Contempt from all 8."""
    if count != 7:
        return data
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
    counts, options = published(len(classes)), {**data.options, "nb_classes": len(classes)}
    return replace(
        data,
        title=title,
        classes=classes,
        splits=splits,
        notes=(*data.notes, *told),
        published=counts,
        options=options,
    )


def _missing(root: Path) -> str:
    """See `Layout.missing`."""
    folders = {name.lower() for name in subfolders(root)}
    splits = [root, *(path for path in subfolders(root).values() if split_called(path.name))]
    annotated = any(child(folder, "images", "annotations") for folder in splits)
    parts = PARTS if annotated else PARTS - SPLIT_FOLDERS
    if parts & {*folders, root.name.lower()}:
        read(root)  # raises BadInput, saying what is missing
    return ""


LAYOUT = Layout(
    title="AffectNet",
    shape="training.csv and Manually_Annotated_Images/; train_set/annotations/",
    recognise=recognise,
    read=lambda root, asked: read(root, asked.nb_classes, asked.face_margin),
    missing=_missing,
    setting="face_margin",
    default=DEFAULT_MARGIN,
    with_classes=_with_classes,
)
