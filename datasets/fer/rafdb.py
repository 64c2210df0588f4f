"""RAF-DB, the part with basic expressions (Li, Deng and Du 2017).

Its owners ship `basic/EmoLabel/list_patition_label.txt` with lines such as `train_00001.jpg 5`, or
`train_label.txt` and `test_label.txt`, and images in `basic/Image/aligned` (100 × 100, the usual
choice) or `basic/Image/original`. A common repackaging is `DATASET/{train,test}/{1..7}`.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.annotation_files import (
    bad_row,
    by_stem,
    integer,
    listing,
    missing_note,
    same_stem_note,
)
from datasets.fer.class_folder import child, subfolders
from datasets.fer.class_folder import read as read_folder
from datasets.filetypes import is_hidden, is_image
from datasets.folder import FileList, ImageFiles
from datasets.labelled import LabelledImages, LabelledSet
from datasets.labels import ORDERS
from datasets.layout import Layout
from util.errors import BadInput
from util.wording import printable

CLASSES = ORDERS["rafdb"]  # the owners' ids are the indices here plus one
PUBLISHED = {
    "train": (1290, 281, 717, 4772, 1982, 705, 2524),
    "test": (329, 74, 160, 1185, 478, 162, 680),
}
LISTS = ("list_patition_label.txt", "list_partition_label.txt")  # the owners' spelling first
SPLIT_LISTS = ("train_label.txt", "test_label.txt")
SYNTHETIC = "synthetic.txt"  # beside the list: the faces are not RAF-DB's, see synthetic/export.py
IDS = [str(i + 1) for i in range(len(CLASSES))]


def recognise(root: Path) -> list[str]:
    """Short descriptions of RAF-DB's layouts in `root`; [] if there are none."""
    lists, folders = _lists(root), _folders(root)
    found = [f"RAF-DB, {_below(root, lists[0])} and Image/"] if lists else []
    return found + ([f"RAF-DB, {_below(root, folders / 'train')}/1…7"] if folders else [])


def read(root: Path) -> LabelledSet:
    """Read RAF-DB's train and test splits. Its lists take precedence over class folders.

    Raises BadInput naming file and row.
    """
    lists, folders = _lists(root), _folders(root)
    if lists:
        data = _read_lists(lists)
    elif folders:
        data = read_folder(folders, "rafdb")
        data = replace(data, name="rafdb", title="RAF-DB basic, class folders", options={})
    else:
        raise BadInput(
            f"--data_path {printable(str(root))}: no RAF-DB; looked for EmoLabel/{LISTS[0]}, here "
            "and in basic/, and for train/1…7 with images called train_…"
        )
    unused = [f"{folders} is not used"] if lists and folders else []
    data = replace(data, notes=(*data.notes, *unused))
    if lists and lists[0].with_name(SYNTHETIC).is_file():
        return replace(data, title="synthetic faces in RAF-DB's layout")
    return replace(data, published=PUBLISHED)


def _below(root: Path, path: Path) -> str:
    return printable(str(path.relative_to(root)))


# The owners' layout


def _lists(root: Path) -> list[Path]:
    """The one label file, or those of both splits; [] if there are none."""
    for base in (root, root / "basic"):
        for folder in (child(base, "EmoLabel"), base):
            if folder and (whole := child(folder, *LISTS)):
                return [whole]
            parts = [child(folder, name) for name in SPLIT_LISTS] if folder else []
            if any(parts):
                return [part or folder / SPLIT_LISTS[i] for i, part in enumerate(parts)]
    return []


def _read_lists(lists: list[Path]) -> LabelledSet:
    """Read the images that label files name."""
    rows = [row for path in lists for row in _labels(path)]
    seen: dict[str, str] = {}
    for path, row, name, _ in rows:
        place = f"{path.name}, row {row}"
        if seen.setdefault(name.lower(), place) != place:
            what = f"the same image as in {seen[name.lower()]}; remove one of them"
            raise bad_row(path, row, what)
    folder, notes = _image_folder(lists[0])
    splits = {}
    for split in ("train", "test"):
        part = [row for row in rows if row[2].lower().startswith(f"{split}_")]
        if not part:
            what = f"no image called {split}_…; RAF-DB's lists name both splits"
            raise BadInput(f"{printable(str(lists[0]))}: {what}")
        splits[split], missing = _images(folder, part)
        notes += missing
    title = f"RAF-DB basic, {folder.name.lower()}"
    return LabelledSet("rafdb", title, CLASSES, splits, notes=tuple(notes))


def _labels(path: Path) -> Iterator[tuple[Path, int, str, int]]:
    """Yield (list, row from 1, image name, index in CLASSES) of every row that is not blank."""
    try:
        lines = os.fsdecode(path.read_bytes().removeprefix(b"\xef\xbb\xbf")).splitlines()
    except OSError as e:
        raise BadInput(f"{printable(str(path))} cannot be read ({e.strerror})") from None
    for row, line in enumerate(lines, 1):
        name, *cells = line.split() or [""]
        if not name:
            continue
        label = integer(cells[0]) if len(cells) == 1 else None
        if label is None or not 1 <= label <= len(CLASSES):
            raise bad_row(path, row, "must be the name of an image and a label from 1 to 7")
        if not name.lower().startswith(("train_", "test_")):
            raise bad_row(path, row, "its image is called neither train_… nor test_…")
        yield path, row, name, label - 1


def _image_folder(labels: Path) -> tuple[Path, list[str]]:
    """The folder of images that belongs to a label file, and notes."""
    for base in (labels.parent.parent, labels.parent):
        images = child(base, "Image")
        kinds = [child(images, kind) for kind in ("aligned", "original")] if images else []
        if all(kinds) and kinds:
            return kinds[0], ["Image/aligned is used, Image/original is not"]
        if any(kinds):
            return kinds[0] or kinds[1], []
    where = printable(str(labels.parent.parent / "Image"))
    raise BadInput(f"{printable(str(labels))}: has no images; unpack them to {where}/aligned")


def _images(
    folder: Path, rows: list[tuple[Path, int, str, int]]
) -> tuple[LabelledImages, list[str]]:
    """The images of one split that exist, and notes on missing and unused ones."""
    images = ((_stem(name), name) for name in listing(folder) if _is_image(name))
    first, others = by_stem(images)
    stems = [os.path.splitext(name)[0] for _, _, name, _ in rows]
    end = "_aligned" if folder.name.lower() == "aligned" else ""
    files = [first.get(f"{s}{end}".lower(), first.get(s.lower())) for s in stems]
    there = np.array([file is not None for file in files])
    missing = missing_note(rows[0][0], folder, [f"{stem}{end}.jpg" for stem in stems], there)
    used = {_stem(name) for name in filter(None, files)}
    told = same_stem_note(folder.name, [name for name in others if _stem(name) in used])
    source = ImageFiles(FileList.of(str(folder.absolute()), map(os.fsencode, filter(None, files))))
    labels = np.array([label for *_, label in rows])[there]
    return LabelledImages(source, labels), [*missing, *told]


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].lower()


def _is_image(name: str) -> bool:
    return is_image(name) and not is_hidden(name)


# Class folders


def _folders(root: Path) -> Path | None:
    """The folder with RAF-DB's splits as class folders; None if they may be another data set's.

    Folders called 1 to 7 can be anything: the images' names, or a list beside them, must agree.
    """
    for base in (root, child(root, "DATASET")):
        train = child(base, "train") if base else None
        if not train or not child(base, "test", "valid") or [*subfolders(train)] != IDS:
            continue
        owners = any(n.lower().startswith("train_") for n in listing(train / "1") if _is_image(n))
        if owners or any(child(beside, "train_labels.csv") for beside in (base, root)):
            return base
    return None


def _missing(root: Path) -> str:
    """See `Layout.missing`."""
    for base in (root, root / "basic"):
        inside = subfolders(child(base, "Image") or base)
        folders = [path for name, path in inside.items() if name.lower() in ("aligned", "original")]
        names = (name.lower() for folder in folders for name in listing(folder))
        if any(name.startswith(("train_", "test_")) for name in names):  # not another's `aligned/`
            return f"RAF-DB's images, but not EmoLabel/{LISTS[0]}; give the folder with both"
    return ""


LAYOUT = Layout(
    title="RAF-DB",
    shape="EmoLabel/ and Image/aligned/",
    recognise=recognise,
    read=lambda root, asked: read(root),
    missing=_missing,
)
