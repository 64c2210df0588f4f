"""Warns about labelled sets and splits inside a folder that is used as a whole, test images too.

Often, a data set is a folder or two below the one that is given. Pre-training would treat it as
loose images, so this looks for it and names the folder to give instead.
"""

from pathlib import Path

from datasets.annotation_files import first_entries
from datasets.fer.class_folder import child
from datasets.fer.class_names import few
from datasets.filetypes import is_hidden, is_image
from datasets.registry import OWNERS, layouts
from datasets.split_names import split_called
from util.wording import printable

DEPTH = 2  # levels of folders to search
# A folder with more entries than these is part of a data set rather than a wrapper around one.
# These limits avoid listing 1,000 class folders, or 100,000 images, just for this check.
MOST_FOLDERS, MOST_ENTRIES = 20, 100
MOST_LOOSE = 10_000  # the limit on entries for the folder that is given


def wrapped_notes(root: Path) -> list[str]:
    """Warnings about data sets and splits inside a folder that is used as a whole; often []."""
    here = list(layouts(root))
    if len(here) > 1:
        names = " and ".join(OWNERS[name].title for name in here)
        what = "all images below it are used, test images included; give the folder of one of them"
        return [f"warning: {printable(root.name)} holds {names}: {what}"]
    inside = _folders(root, MOST_LOOSE)
    if splits := [path.name for path in inside if split_called(path.name) and _has_image(path)]:
        what = "has no training split: all its images are used, including those in"
        return [f"warning: {printable(root.name)} {what} {few(splits)}"]
    found = _found(inside, DEPTH)
    lines = [f"warning: {_told(path, what, root)}" for path, what in found[:3]]
    return [*lines, *([f"warning: and {len(found) - 3} more such folders"] if found[3:] else [])]


def _told(path: Path, what: str, root: Path) -> str:
    """The warning about one folder."""
    holds = f"{printable(str(path.relative_to(root)))} holds {what}"
    if child(path, "fer2013.csv"):
        return f"{holds}, whose images in fer2013.csv are not used; give {printable(str(path))}"
    used = f"all images below {printable(root.name)} are used, its test images included"
    return f"{holds}: {used}; give {printable(str(path))}"


def _found(folders: list[Path], depth: int) -> list[tuple[Path, str]]:
    """The labelled sets in some folders and below, with a description each."""
    found = []
    for folder in folders:
        inside = _folders(folder)
        if what := _held(folder, inside):
            found.append((folder, what))
        elif depth > 1:
            found += _found(inside, depth - 1)
    return found


def _held(folder: Path, inside: list[Path]) -> str:
    """A description of the labelled set or the splits that a folder holds; "" if there are none."""
    if len(first_entries(folder, MOST_ENTRIES + 1)) > MOST_ENTRIES:
        return ""
    if here := layouts(folder):
        return " and ".join(OWNERS[name].title for name in here)
    splits = {split_called(path.name): path for path in inside}
    splits.pop(None, None)
    if "train" in splits and len(splits) > 1 and all(map(_has_image, splits.values())):
        return f"the splits {' and '.join(printable(path.name) for path in splits.values())}"
    return ""


def _folders(folder: Path, most: int = MOST_ENTRIES) -> list[Path]:
    """The folders in a folder, sorted; [] if it has too many entries to be a wrapper."""
    entries = first_entries(folder, most + 1)
    inside = sorted(Path(e.path) for e in entries if e.is_dir() and not is_hidden(e.name))
    return [] if len(entries) > most or len(inside) > MOST_FOLDERS else inside


def _has_image(folder: Path, depth: int = 3) -> bool:
    """Whether an image is among the first entries of a folder or of the folders below it."""
    entries = [entry for entry in first_entries(folder, MOST_ENTRIES) if not is_hidden(entry.name)]
    if any(is_image(entry.name) for entry in entries):
        return True
    inside = [Path(entry.path) for entry in entries if depth > 1 and entry.is_dir()]
    return any(_has_image(path, depth - 1) for path in inside[:MOST_FOLDERS])
