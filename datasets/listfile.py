"""Lists of images: a path a line, perhaps with its label after it, or a CSV with named columns."""

import csv
import io
import os
from collections.abc import Sequence
from typing import NamedTuple

from datasets.decode import printable
from datasets.filetypes import is_image
from datasets.splits import split_called
from util.errors import BadInput

PATHS = ("path", "file", "filename", "image", "img", "image_path", "subdirectory_filepath")
LABELS = ("label", "class", "expression", "emotion", "category", "class_name", "target")
SPLITS = ("split", "usage", "subset")


class Listed(NamedTuple):
    """What a list says, row by row; `labels` and `splits` are empty where it says none."""

    names: list[str]  # as written: relative to the list's folder, or absolute
    labels: list[str]
    splits: list[str]
    columns: list[str]  # of a CSV without a known column of paths; else empty

    def training(self) -> list[str]:
        """The names of the training split; all where there are no splits."""
        pairs = zip(self.names, self.splits, strict=False)
        return [name for name, split in pairs if split_called(split) == "train"] or self.names


def read_list(path: str) -> Listed:
    """The entries of a text list or CSV in their order. Raises BadInput for anything else."""
    if is_image(path):
        raise bad(path, "is a single image; give the folder it lies in, or a list of images")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as e:
        raise bad(path, f"cannot be read ({e.strerror})") from None
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # spreadsheets save "Unicode text" so
    try:
        # fsdecode, as for any name: bytes that are no UTF-8 come out of fsencode unchanged.
        text = data.decode("utf-16") if utf16 else os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
        if "\0" in text:
            raise ValueError
        listed = _parsed(text, path)
        for name in listed.names:
            os.fsencode(name)
    except csv.Error as e:
        raise bad(path, f"is no well-formed CSV ({e})") from None
    except ValueError:
        what = "is a binary file; give a folder of images, or a text list or CSV of their paths"
        raise bad(path, f"{what} (an archive has to be unpacked first)") from None
    if not listed.names:
        raise bad(path, "is a list without entries; write one image path a line")
    return listed


def bad(path: str, what: str) -> BadInput:
    """The error about a list given as `--data_path`."""
    return BadInput(f"--data_path {printable(path)}: {what}")


def check_entries(path: str, names: Sequence[str], n: int = 100) -> None:
    """Raises BadInput if none of the first entries of the list at `path` exists.

    It is relative to some other folder then, or the paths stand in another column.
    """
    some, folder = names[:n], os.path.dirname(path)
    if any(os.path.exists(os.path.join(folder, name)) for name in some):
        return
    if columns := read_list(path).columns:
        listed = printable(", ".join(name.strip() or "''" for name in columns))
        what = f"no column of paths among {listed}; name it one of {', '.join(PATHS)}"
        raise bad(path, what)
    first, place = printable(some[0]), printable(os.path.join(folder, some[0]))
    what = f"none of its first {len(some)} entries exists; the first, {first}, was looked for at"
    raise bad(path, f"{what} {place}; paths start at the list's own folder or at /")


def _parsed(text: str, path: str) -> Listed:
    lines = [line for line in io.StringIO(text, newline=None) if not _skipped(line)]
    first = lines[0] if lines else ""
    delimiter = max(",;\t", key=first.count)
    is_csv = path.lower().endswith((".csv", ".tsv"))
    if not is_csv and (delimiter not in first or _column(first.split(delimiter), PATHS) is None):
        return _of_lines([line.strip() for line in lines])
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return _of_rows([row for row in rows if row and not _skipped(row[0] or "".join(row[1:]))])


def _of_lines(lines: list[str]) -> Listed:
    """A path a line; or `path label`, where that is how the first line reads."""
    if lines and not is_image(lines[0]) and is_image(lines[0].rsplit(maxsplit=1)[0]):
        parts = [[line] if is_image(line) else line.rsplit(maxsplit=1) for line in lines]
        labels = [part[1] if len(part) > 1 else "" for part in parts]
        return Listed([part[0] for part in parts], labels, [], [])
    unknown_header = len(lines) > 1 and [is_image(line) for line in lines[:2]] == [False, True]
    known_header = bool(lines) and lines[0].lower() in PATHS
    return Listed(lines[unknown_header or known_header :], [], [], [])


def _of_rows(rows: list[list[str]]) -> Listed:
    """The columns of a CSV, by its header; without one that is known, paths stand first."""
    first = rows[0] if rows else []
    column = _column(first, PATHS)
    at = column or 0
    rows = [row for row in rows if len(row) > at and row[at].strip()]
    cells = [row[at].strip() for row in rows]
    unknown_header = len(cells) > 1 and [is_image(c) for c in cells[:2]] == [False, True]
    headed = column is not None or unknown_header
    header, rows = (rows[0], rows[1:]) if headed and rows else ([], rows)
    places = [_column(header, LABELS), _column(header, SPLITS)]
    if not headed and rows and len(rows[0]) == 2:
        places[0] = 1
    labels, splits = (
        [] if place is None else [row[place].strip() if len(row) > place else "" for row in rows]
        for place in places
    )
    several = first if column is None and len(first) > 1 else []
    return Listed([row[at].strip() for row in rows], labels, splits, several)


def _skipped(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _column(header: Sequence[str], known: Sequence[str]) -> int | None:
    """Which cell of a header names one of the known columns; None if there is none."""
    cells = [cell.strip().strip('"').lower() for cell in header]
    return next((cells.index(name) for name in known if name in cells), None)
