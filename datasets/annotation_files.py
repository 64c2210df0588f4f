"""Reading what owners ship: the rows of their CSV files, and which images they name are there."""

import csv
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from util.errors import BadInput
from util.wording import printable


def present(root: str | os.PathLike, names: Sequence[str]) -> np.ndarray:
    """Which of the names, relative to `root`, exist -> (n,) bool.

    Lists each folder once: 414,000 questions one by one take minutes on a network disk. Raises
    BadInput for a folder that may not be read.
    """
    listed: dict[str, frozenset[str]] = {}
    there = np.zeros(len(names), bool)
    for i, name in enumerate(names):
        folder, file = os.path.split(name)
        if folder not in listed:
            listed[folder] = listing(os.path.join(root, folder))
        there[i] = file in listed[folder]
    return there


def spread(count: int, most: int = 100) -> list[int]:
    """Up to `most` of so many places, from all over them, the first and the last included."""
    n = min(count, most)
    return [i * (count - 1) // max(1, n - 1) for i in range(n)]


def repeated(
    keys: Sequence[Hashable], values: Sequence[object]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(n,) bool: which say again what one before has said of their key; (first, later) places of
    those that say otherwise than the first.
    """
    first: dict[Hashable, int] = {}
    again, differ, others = np.zeros(len(keys), bool), [], set()
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        j = first.setdefault(key, i)
        if j == i:
            continue
        if values[j] == value or (key, value) in others:
            again[i] = True
        else:
            others.add((key, value))
            differ.append((j, i))
    return again, differ


def repeated_note(source: str | os.PathLike, rows: Sequence[int], again: np.ndarray) -> list[str]:
    """The line that counts the rows left out because they repeat another one; [] if none does."""
    if not again.any():
        return []
    first, file = rows[int(again.argmax())], printable(os.path.basename(source))
    count = f"{int(again.sum()):,} rows of {file} name an image again"
    return [f"{count} and are left out (first: row {first})"]


def by_stem(stems: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """The first name, in sorted order, of each (stem, name), and the other names."""
    first: dict[str, str] = {}
    others = []
    for stem, name in sorted(stems, key=lambda pair: pair[1]):
        if first.setdefault(stem, name) != name:
            others.append(name)
    return first, others


def twice_note(where: str, others: Sequence[str]) -> list[str]:
    """The line that counts the files left out because another one has their stem."""
    if not others:
        return []
    count = f"{len(others):,} files have the name of another one but for the ending"
    return [f"{printable(where)}: {count} and are left out (first: {printable(others[0])})"]


def listing(folder: str | os.PathLike) -> frozenset[str]:
    """The names in a folder; none if there is no such folder. Raises BadInput if unreadable."""
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return frozenset()
    except OSError as e:
        raise BadInput(f"{printable(os.fspath(folder))} cannot be read ({e.strerror})") from None


def first_entries(folder: str | os.PathLike, n: int) -> list[os.DirEntry]:
    """Some n entries of a folder; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return list(islice(entries, n))
    except OSError:
        return []


def missing_note(
    source: str | os.PathLike,
    root: str | os.PathLike,
    names: Sequence[str],
    there: np.ndarray,
    split: str = "",
    advice: str = "unpack the images, or give the folder they lie in as --data_path",
) -> list[str]:
    """The line that says how many images named in the file `source` are missing; [] if none is.

    `names` were looked for below `root`, `there` (n,) bool is the answer of `present`; `split` is
    theirs, if the file names those of several. Raises BadInput, with the advice, when most are
    missing: the path is wrong then, or the images are not unpacked.
    """
    missing = np.flatnonzero(~there)
    if not len(missing):
        return []
    first, of = names[missing[0]], f"{split} images" if split else "images"
    count = f"{len(missing):,} of {len(names):,} {of}"
    if 2 * len(missing) > len(names):
        raise BadInput(
            f"{printable(os.fspath(source))}: {count} it names are missing; the first was looked "
            f"for at {printable(os.path.join(root, first))}: {advice}"
        )
    file = printable(os.path.basename(source))
    return [f"{count} named in {file} are missing (first: {printable(first)})"]


def csv_rows(path: str | os.PathLike) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, cells) of every row that is not blank, header included.

    Rows come one at a time: an owner's file may hold hundreds of MB. Bytes that are no UTF-8
    survive, as in any file name. Raises BadInput for a file that cannot be read or is no CSV.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
    except OSError as e:
        raise BadInput(f"{printable(os.fspath(path))} cannot be read ({e.strerror})") from None
    except csv.Error as e:
        raise bad_row(path, reader.line_num, f"is no well-formed CSV ({e})") from None


def columns(path: str | os.PathLike, header: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """The places of the wanted columns in a header, written in any case.

    Raises BadInput naming the first that is not there.
    """
    cells = [cell.strip().lower() for cell in header]
    for name in wanted:
        if name.lower() not in cells:
            found = printable(", ".join(header))
            raise bad_row(path, 1, f"no column {name} in the header; it has {found}")
    return [cells.index(name.lower()) for name in wanted]


def integer(cell: object) -> int | None:
    """What a cell holds as a whole number (`3`; `3.0`, as tables are saved anew), else None."""
    try:
        value = float(cell)
    except (ValueError, TypeError, OverflowError):
        return None
    return int(value) if value.is_integer() else None


def bad_row(path: str | os.PathLike, row: int, what: str) -> BadInput:
    """The error that names a file and its row (line number from 1)."""
    return BadInput(f"{printable(os.fspath(path))}, row {row}: {what}")
