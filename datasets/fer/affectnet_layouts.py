"""Finds AffectNet's layouts in a folder, and says what is missing if none is complete."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.annotation_files import csv_rows, first_entries
from datasets.filetypes import is_image
from datasets.listfile import BOX
from util.wording import printable

CSV, NPY, PLUS = "2017 CSV lists", "npy annotations", "AffectNet+ JSON"

LISTS = {"train": "training.csv", "test": "validation.csv"}
LIST_FOLDERS = ("Manually_Annotated_file_lists", "file_lists", "")
IMAGE_FOLDERS = (
    "Manually_Annotated_Images",
    "Manually_Annotated_compressed/Manually_Annotated_Images",
    "Manually_Annotated_compressed",
)
PATH, EXPRESSION = "subDirectory_filePath", "expression"
HEADER = (PATH, *BOX, "facial_landmarks", EXPRESSION, "valence", "arousal")

FOLDERS = {
    NPY: {"train": "train_set", "test": "val_set"},
    PLUS: {"train": "train_set", "test": "validation_set"},
}
ENDINGS = {NPY: "_exp.npy", PLUS: ".json"}

FEW = 100  # entries to look at in a folder that may hold 400,000


@dataclass(frozen=True)
class FoundLayout:
    """One layout: its kind, the folder it is in, and the list or folder of each split."""

    kind: str
    base: Path
    splits: dict[str, Path]


def find(root: Path) -> list[FoundLayout]:
    """The layouts in a folder and its sub-folders, each only once."""
    found, claimed = [], set()
    for base in (root, *_subfolders(root)):
        for kind in (CSV, NPY, PLUS):
            splits = _splits(base, kind)
            places = {(kind, place) for place in splits.values()}
            if splits and not places & claimed:
                found.append(FoundLayout(kind, base, splits))
                claimed |= places
    return found


def _subfolders(folder: Path) -> list[Path]:
    """The sub-folders, sorted; none if there are too many entries for a mere wrapper folder."""
    entries = first_entries(folder, FEW + 1)
    return [] if len(entries) > FEW else sorted(Path(e.path) for e in entries if e.is_dir())


def _lists(base: Path) -> dict[str, Path]:
    """The lists that exist, if one begins like AffectNet's: others ship a `training.csv`, too."""
    beside = _entries(base)
    folders = [base / beside.get(f.lower(), f) if f else base for f in LIST_FOLDERS]
    there = [(f, beside if f == base else _entries(f)) for f in folders]
    lists = {}
    for split, name in LISTS.items():
        files = [folder / names.get(name, name) for folder, names in there]
        if path := next(filter(Path.is_file, files), None):
            lists[split] = path
    return lists if any(map(_begins_like_a_list, lists.values())) else {}


def _entries(folder: Path) -> dict[str, str]:
    """The names in a folder, by their lower-case form; at most FEW."""
    names = [entry.name for entry in first_entries(folder, FEW)]
    return {name.lower(): name for name in sorted(names, key=lambda n: (n == n.lower(), n))}


def _begins_like_a_list(path: Path) -> bool:
    first = next((cells for _, cells in csv_rows(path)), [""])
    return is_header(first) or (len(first) >= 7 and is_image(first[0]))


def is_header(cells: Sequence[str]) -> bool:
    """Whether a row contains names of AffectNet's columns."""
    known = {name.lower() for name in HEADER}
    return any(cell.strip().lower() in known for cell in cells)


def _annotated(base: Path, kind: str) -> dict[str, Path]:
    """The split folders of a layout, if any has annotations of its kind."""
    there = {s: base / f for s, f in FOLDERS[kind].items() if (base / f).is_dir()}
    some = [e.name for f in there.values() for e in first_entries(f / "annotations", FEW)]
    return there if any(name.endswith(ENDINGS[kind]) for name in some) else {}


def _splits(base: Path, kind: str) -> dict[str, Path]:
    """The list or folder of each split, if a layout is in exactly this folder; else {}."""
    if kind == CSV:
        return _lists(base)
    inner = base / "human_annotated"
    return _annotated(inner if kind == PLUS and inner.is_dir() else base, kind)


def described(found: FoundLayout, root: Path) -> str:
    """A layout's description for messages."""
    return found.kind if found.base == root else f"{found.kind} in {printable(found.base.name)}/"


def whats_missing(root: Path) -> str:
    """Why a folder is not one of AffectNet's, for a user who says that it is."""
    if not root.is_dir():
        return "is not a folder; give the one that AffectNet was unpacked into"
    for base in (root, *_subfolders(root)):
        if base.name in IMAGE_FOLDERS or any((base / f).is_dir() for f in IMAGE_FOLDERS):
            places = ", ".join(printable(str(base / f)) for f in LIST_FOLDERS)
            return (
                f"images, but neither training.csv nor validation.csv; looked in {places}; "
                "give the folder that holds the lists and the images"
            )
        for part in ("", "human_annotated", "train_set", "val_set", "validation_set"):
            split = base / part
            if (split / "images").is_dir():
                annotations = printable(str(split / "annotations"))
                if first_entries(split / "annotations", 1) and split == root:
                    return f"is one split; give the folder above it, {printable(str(root.parent))}"
                return f"images, but no annotations <id>_exp.npy or <id>.json in {annotations}"
    return (
        "nothing of AffectNet here or one folder below; looked for training.csv and "
        "validation.csv, for train_set/annotations/<id>_exp.npy, and for "
        "human_annotated/train_set/annotations/<id>.json"
    )
