"""Reads lists of images: one path per line, perhaps with a label, or a CSV with named columns."""

import csv
import io
import os
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from datasets.annotation_files import evenly_spaced
from datasets.filetypes import is_image
from datasets.split_names import split_called
from util.errors import BadInput
from util.wording import printable

PATHS = ("path", "file", "filename", "image", "img", "image_path", "subdirectory_filepath")
LABELS = ("label", "class", "expression", "emotion", "category", "class_name", "target")
SPLITS = ("split", "usage", "subset")
BOX = ("face_x", "face_y", "face_width", "face_height")  # AffectNet's; its own reader crops by them
FORMAT = "a line is read as `path label`, the path first"
FEW = 5  # columns to name in a note


class ListEntries(NamedTuple):
    """The entries of a list; `labels` and `splits` are empty if the list has none."""

    names: list[str]  # relative to the list's folder, or absolute
    labels: list[str]
    splits: list[str]
    guessed: bool  # whether the paths were taken from the first of several columns
    rows: list[int]  # line number of each entry, from 1
    unused: list[str]  # columns of the header that are not used
    turned: bool = False  # whether \ between folders was replaced by /

    def training(self) -> list[str]:
        """The names of the training split; all names if there is none."""
        pairs = zip(self.names, self.splits, strict=False)
        return [name for name, split in pairs if split_called(split) == "train"] or self.names

    def boxed(self) -> bool:
        """Whether it has columns of face boxes, as AffectNet's own lists do."""
        return {*BOX} <= {name.lower() for name in self.unused}

    def notes(self) -> list[str]:
        """Notes on how the list was read."""
        told = ["paths are read with / instead of \\"] if self.turned else []
        if self.unused:
            more = ", …" if len(self.unused) > FEW else ""
            some = f"columns not used: {printable(', '.join(self.unused[:FEW]))}{more}"
            hint = "; to crop faces by their boxes, give AffectNet's folder instead"
            told.append(some + hint * self.boxed())
        return told


def read_list(path: str) -> ListEntries:
    """Read the entries of a text list or CSV, in order. Raises BadInput for anything else."""
    if is_image(path):
        raise bad(path, "is a single image; give its folder, or a list of images")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as e:
        raise bad(path, f"cannot be read ({e.strerror})") from None
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # the "Unicode text" of spreadsheets
    try:
        # fsdecode, as for file names: fsencode restores bytes that are not valid UTF-8.
        text = data.decode("utf-16") if utf16 else os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
        if "\0" in text:
            raise ValueError
        listed = _parsed(text, path)
        for name in listed.names:
            os.fsencode(name)
    except BadInput:  # is a ValueError, too
        raise
    except csv.Error as e:
        raise bad(path, f"is not valid CSV ({e})") from None
    except ValueError:
        what = "is a binary file; give a folder of images, or a text list or CSV of their paths"
        raise bad(path, f"{what} (an archive has to be unpacked first)") from None
    if not listed.names:
        raise bad(path, "is a list without entries; write one image path per line")
    return _turned(listed, path)


def bad(path: str, what: str) -> BadInput:
    """A BadInput about the file or folder given as `--data_path`."""
    return BadInput(f"--data_path {printable(path)}: {what}")


def check_entries(path: str, names: Sequence[str], listed: ListEntries) -> None:
    """Raise BadInput if none of a sample of names, from all over the list at `path`, exists.

    Then they are relative to another folder, or the paths are in another column. The message quotes
    none of them: a file that is no list, such as a key, may have been given by mistake.
    """
    some = [names[i] for i in evenly_spaced(len(names))]
    if _any_file(path, some):
        return
    if listed.guessed:
        what = f"its header names no column of paths; name it one of {', '.join(PATHS)}"
        raise bad(path, what)
    tried = f"{len(some)} of its" * (len(some) < len(names)) or "its"
    row, folder = listed.rows[listed.names.index(some[0])], printable(os.path.dirname(path))
    where = f"the first, in row {row}, was looked for in {folder}"
    what = f"none of {tried} {len(names)} entries exists; {where}; "
    if listed.boxed():
        raise bad(path, f"{what}for AffectNet's own lists, give the folder of the data set")
    form = f"; {FORMAT}" if any(set(name) & set(" \t,;") for name in some) else ""
    raise bad(path, f"{what}paths are relative to the list's own folder, or absolute{form}")


def _any_file(path: str, names: Sequence[str]) -> bool:
    """Whether any name is a file, relative to the list's folder; labels may be names of folders."""
    return any(os.path.isfile(os.path.join(os.path.dirname(path), name)) for name in names)


def _turned(listed: ListEntries, path: str) -> ListEntries:
    r"""Replace \ by / if only that finds the files, as in lists that were written on Windows."""
    written = [name for name in listed.names if "\\" in name]
    some = [written[i] for i in evenly_spaced(len(written))]
    if _any_file(path, some) or not _any_file(path, [n.replace("\\", "/") for n in some]):
        return listed
    return listed._replace(names=[n.replace("\\", "/") for n in listed.names], turned=True)


# Text and CSV


def _parsed(text: str, path: str) -> ListEntries:
    numbered = enumerate(io.StringIO(text, newline=None), 1)
    lines = ((row, line.strip()) for row, line in numbered if not _skipped(line))
    begin = list(islice(lines, 2))
    first = begin[0][1] if begin else ""
    delimiter = max(",;\t", key=first.count)
    is_csv = path.lower().endswith((".csv", ".tsv")) or (
        delimiter in first
        and (
            _column(first.split(delimiter), PATHS) is not None
            or any(_begins_with_path(line, delimiter) for _, line in begin)
        )
    )
    if not is_csv:
        return _of_lines([*begin, *lines])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    filled = (cells for cells in reader if "".join(cells).strip())
    return _of_rows([(reader.line_num, c) for c in filled if c[0].lstrip()[:1] != "#"], path)


def _begins_with_path(line: str, delimiter: str) -> bool:
    """Whether a line is a path and further columns, not a path that contains the delimiter."""
    return not is_image(line) and is_image(line.split(delimiter)[0].strip().strip('"'))


def _of_lines(lines: list[tuple[int, str]]) -> ListEntries:
    """Parse lines that are paths, or `path label` if the first one after a header is that."""
    texts = [line for _, line in lines]
    begin = [is_image(line) or _is_labelled(line) for line in texts[:2]]
    known_header = bool(texts) and texts[0].lower() in PATHS
    lines = lines[known_header or begin == [False, True] :]
    rows, texts = [row for row, _ in lines], [line for _, line in lines]
    if texts and _is_labelled(texts[0]):
        parts = [[line] if is_image(line) else line.rsplit(maxsplit=1) for line in texts]
        labels = [part[1] if len(part) > 1 else "" for part in parts]
        return ListEntries(
            [part[0] for part in parts], labels, splits=[], guessed=False, rows=rows, unused=[]
        )
    return ListEntries(texts, [], splits=[], guessed=False, rows=rows, unused=[])


def _is_labelled(line: str) -> bool:
    return not is_image(line) and is_image(line.rsplit(maxsplit=1)[0])


def _of_rows(numbered: list[tuple[int, list[str]]], path: str) -> ListEntries:
    """Parse a CSV by the column names in its header; without a known one, paths come first."""
    rows, lines = [cells for _, cells in numbered], [row for row, _ in numbered]
    first = rows[0] if rows else []
    column = _column(first, PATHS)
    if column is None and _column(first, ("pixels",)) is not None:
        raise bad(path, _pixels(path))
    at = column or 0
    headed = column is not None or _is_header(rows)
    header, rows, lines = (first, rows[1:], lines[1:]) if headed else ([], rows, lines)
    for row, cells in zip(lines, rows, strict=True):
        if not _cell(cells, at):
            where = f"column {first[at].strip()!r}" if column is not None else "first column"
            raise bad(path, f"row {row} has no path in its {where}; fill it in, or remove the row")
    label, split = _column(header, LABELS), _column(header, SPLITS)
    others = [i for i in range(len(first)) if i not in (at, label, split)]
    if split is None and rows:
        split = next((i for i in others if all(split_called(_cell(r, i)) for r in rows)), None)
    others = [i for i in others if i != split]
    if not headed and len(others) == 1:
        label = others[0]
    labels, splits = (
        [] if place is None else [_cell(cells, place) for cells in rows] for place in (label, split)
    )
    unused = [header[i].strip() for i in others if headed and header[i].strip()]
    return ListEntries(
        [_cell(cells, at) for cells in rows],
        labels,
        splits=splits,
        guessed=column is None and len(first) > 1,
        rows=lines,
        unused=unused,
    )


def _is_header(rows: list[list[str]]) -> bool:
    """Whether the first row names columns, though none of paths; then paths come first."""
    if len(rows) < 2:
        return False
    begin = [is_image(cells[0].strip()) for cells in rows[:2]]
    if rows[0][0].strip():
        return begin == [False, True]
    # The first column has no name, so it is a table's index: numbers, or the paths themselves.
    return not begin[1] or _column(rows[0], (*LABELS, *SPLITS)) is not None


def _pixels(path: str) -> str:
    """The message about a CSV of pixels, and what to do with it."""
    named = os.path.basename(path).lower() == "fer2013.csv"
    name = "" if named else ", with the file renamed to fer2013.csv"
    return f"holds pixels: give its folder{name}"


def _cell(cells: Sequence[str], at: int) -> str:
    """The cell at an index; "" if the row is too short."""
    return cells[at].strip() if len(cells) > at else ""


def _skipped(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _column(header: Sequence[str], known: Sequence[str]) -> int | None:
    """The index of the header cell that names one of the known columns; None if there is none."""
    cells = [cell.strip().strip('"').lower() for cell in header]
    return next((cells.index(name) for name in known if name in cells), None)
