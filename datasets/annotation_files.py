"""Helpers for annotation files: reading CSV rows, and finding which of the named images exist."""

import csv
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from util.errors import BadInput
from util.wording import printable


def files_exist(root: str | os.PathLike, names: Sequence[str]) -> np.ndarray:
    """Find which of the names, relative to `root`, exist -> (n,) bool.

    Lists each folder once, because checking 414,000 files one by one takes minutes on a network
    disk. Raises BadInput for a folder that cannot be read.
    """
    listed: dict[str, frozenset[str]] = {}
    there = np.zeros(len(names), bool)
    for i, name in enumerate(names):
        folder, file = os.path.split(name)
        if folder not in listed:
            listed[folder] = listing(os.path.join(root, folder))
        there[i] = file in listed[folder]
    return there


def evenly_spaced(count: int, most: int = 100) -> list[int]:
    """Up to `most` evenly spaced indices below `count`, including the first and the last."""
    n = min(count, most)
    return [i * (count - 1) // max(1, n - 1) for i in range(n)]


def find_repeats(
    keys: Sequence[Hashable], values: Sequence[object]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Find the entries that repeat an earlier one, and those that contradict it.

    Returns (n,) bool, true where the same key and value came before, and (first, later) index
    pairs, each of a key's first entry and a later one with a new value.
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
    """The note that counts rows left out because they repeat an earlier one; [] if none does."""
    if not again.any():
        return []
    first, file = rows[int(again.argmax())], printable(os.path.basename(source))
    count = f"{int(again.sum()):,} rows of {file} repeat an earlier row"
    return [f"{count} and are left out (first: row {first})"]


def by_stem(stems: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """From (stem, name) pairs: the first name, in sorted order, for each stem; the other names."""
    first: dict[str, str] = {}
    others = []
    for stem, name in sorted(stems, key=lambda pair: pair[1]):
        if first.setdefault(stem, name) != name:
            others.append(name)
    return first, others


def same_stem_note(where: str, others: Sequence[str]) -> list[str]:
    """The note that counts files left out because another has the same stem; [] if none has."""
    if not others:
        return []
    count = f"{len(others):,} files have the name of another one except for the extension"
    return [f"{printable(where)}: {count} and are left out (first: {printable(others[0])})"]


def listing(folder: str | os.PathLike) -> frozenset[str]:
    """The names in a folder; none if it does not exist. Raises BadInput if it cannot be read."""
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return frozenset()
    except OSError as e:
        raise BadInput(f"{printable(os.fspath(folder))} cannot be read ({e.strerror})") from None


def first_entries(folder: str | os.PathLike, n: int) -> list[os.DirEntry]:
    """Up to n entries of a folder, in arbitrary order; none if it cannot be listed."""
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
    advice: str = "unpack the images, or give the folder that contains them as --data_path",
) -> list[str]:
    """The note that counts images named in the file `source` but missing; [] if none is missing.

    `there` (n,) bool: what `files_exist` returned for `names` below `root`; `split`: the split of
    the names, if the file lists several. Raises BadInput, with the advice, if more than half are
    missing: then the path is wrong, or the images have not been unpacked.
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
    """Yield (line number from 1, cells) of every row that is not blank, header included.

    Reads row by row, because files can have hundreds of MB. Bytes that are not valid UTF-8 are
    preserved, as in file names. Raises BadInput for a file that cannot be read or is not valid CSV.
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
        raise bad_row(path, reader.line_num, f"is not valid CSV ({e})") from None


def columns(path: str | os.PathLike, header: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Indices of the wanted columns in a header, ignoring case.

    Raises BadInput naming the first that is missing. The header is not quoted: a data set from
    elsewhere may link its list to any file of this machine.
    """
    cells = [cell.strip().lower() for cell in header]
    for name in wanted:
        if name.lower() not in cells:
            raise bad_row(path, 1, f"no column {name} in the header")
    return [cells.index(name.lower()) for name in wanted]


def integer(cell: object) -> int | None:
    """The integer in a cell (`3`, or `3.0` as some programs save it); None if there is none."""
    try:
        value = float(cell)
    except (ValueError, TypeError, OverflowError):
        return None
    return int(value) if value.is_integer() else None


def bad_row(path: str | os.PathLike, row: int, what: str) -> BadInput:
    """A BadInput that names a file and a row in it (line number from 1)."""
    return BadInput(f"{printable(os.fspath(path))}, row {row}: {what}")
