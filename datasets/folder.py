"""Which image files there are: in a folder nested at will, in a list of files, in a CSV.

A folder's names are sorted as bytes, so that every machine and file system has one order. They
can be kept in a cache file, with which a restart only looks at each folder's time of change.
"""

import csv
import hashlib
import heapq
import io
import json
import os
import stat
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from datasets.decode import load_rgb, printable
from util.errors import BadInput

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
IMAGE_ENDINGS = tuple(map(os.fsencode, EXTENSIONS))
COLUMNS = ("path", "file", "filename", "image", "img", "image_path", "subdirectory_filepath")
CACHE_VERSION = 1
# A folder changed this shortly before the scan may have changed once more within the same tick
# of the file system's clock, which its time of change would not show.
RACY_NS = 2_000_000_000


class FileList:
    """The paths of a data set: one bytes blob and where each name starts in it.

    270,000 names cost some 20 MB once, and worker processes share them: there are no Python
    objects per name whose reference counts would copy the pages. `digest` identifies the names
    and their order, wherever the data set lies.
    """

    def __init__(self, root: str, blob: bytes) -> None:
        """`root`: an absolute folder; `blob`: names relative to it, each ended by a NUL."""
        self.root, self._blob = root, blob
        ends = np.flatnonzero(np.frombuffer(blob, np.uint8) == 0)
        self._starts = np.concatenate(([0], ends + 1))  # (len + 1,) int64
        self.digest = hashlib.sha256(blob).hexdigest()

    @classmethod
    def of(cls, root: str, names: Iterable[bytes]) -> "FileList":
        return cls(root, b"".join(name + b"\0" for name in names))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def relative(self, i: int) -> str:
        """Name i as found below `root` (absolute if a list said so)."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"file {i} of {len(self)}")
        i %= len(self)
        return os.fsdecode(self._blob[self._starts[i] : self._starts[i + 1] - 1])

    def __getitem__(self, i: int) -> str:
        return os.path.join(self.root, self.relative(i))


class ImageFiles:
    """A source of images: the files of a list, decoded when asked for."""

    def __init__(self, files: FileList) -> None:
        self.files, self.digest = files, files.digest

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> np.ndarray:
        """Image i -> (H, W, 3) uint8. Raises UnreadableImage."""
        return load_rgb(self.files[i])

    def name(self, i: int) -> str:
        return self.files[i]


def list_images(data_path: str | os.PathLike, cache: str | os.PathLike | None = None) -> FileList:
    """The images of a folder (of its `train/` if there are some in it), a text list or a CSV.

    `cache`: a file to keep the answer in; it is believed while no folder (or the list) changed.
    Raises BadInput, saying what was found instead of images.
    """
    given = os.fsdecode(data_path)
    if not given:
        raise BadInput("--data_path is empty: give a folder of images or a list of files")
    path = os.path.abspath(os.path.expanduser(given))
    mode = _mode_of(path)
    files = _read_cache(cache, path) if cache else None
    if files is None:
        scanned_ns = time.time_ns()  # before the scan: what changes during it is newer
        files, stamps = _scan(path) if stat.S_ISDIR(mode) else _read_list(path)
        if cache:
            _write_cache(cache, path, scanned_ns, files, stamps)
    if not stat.S_ISDIR(mode):
        _check_entries(path, files)
    return files


def images_below(folder: str) -> list[str]:
    """The images of a folder nested at will, relative to it, sorted; perhaps none.

    Raises BadInput for a folder that may not be read.
    """
    try:
        return [os.fsdecode(name) for name in sorted(_walk(os.path.abspath(folder))[0])]
    except BadInput as error:
        raise BadInput(str(error).removeprefix("--data_path ")) from None


def _bad(path: str, what: str) -> BadInput:
    return BadInput(f"--data_path {printable(path)}: {what}")


def _mode_of(path: str) -> int:
    """The kind of file at a path that has to be a folder or a regular file."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            target = printable(os.readlink(path))
            raise _bad(path, f"is a link to {target}, which does not exist") from None
        parent = os.path.dirname(path)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        tail = printable(os.path.relpath(path, parent).split(os.sep)[0])
        what = f"does not exist; {printable(parent)} does, but there is no {tail} in it"
        raise _bad(path, f"{what}: check the spelling") from None
    except (OSError, ValueError) as e:
        raise _bad(path, f"cannot be read ({getattr(e, 'strerror', None) or e})") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise _bad(path, "is neither a folder nor a file; give a folder of images or a list")
    return mode


def _stamp(path: str | bytes, st: os.stat_result | None = None) -> list[int]:
    """[time of change in ns, size; 0 for folders]: differs once a folder or list has changed."""
    st = st or os.stat(path)
    return [st.st_mtime_ns, 0 if stat.S_ISDIR(st.st_mode) else st.st_size]


def _scan(path: str) -> tuple[FileList, dict[str, list[int]]]:
    """The images below a folder or its `train/`, sorted, and the stamp of every folder seen."""
    train = os.path.join(path, "train")
    for root in [train, path] if os.path.isdir(train) else [path]:
        names, stamps, others = _walk(root)
        if names:
            return FileList.of(root, sorted(names)), stamps
    most = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:3]
    kinds = ", ".join(f"{n} {printable(ending)}" for ending, n in most)
    seen = f"but {others.total()} other files: mostly {kinds}" if others else "nor any other file"
    usual = ", ".join(ending[1:] for ending in EXTENSIONS)
    raise _bad(path, f"holds no images, {seen}; give a folder of {usual} files (any depth)")


def _walk(top: str) -> tuple[list[bytes], dict[str, list[int]], Counter]:
    """(image names relative to `top`, stamp of every folder, how many other files by ending).

    A folder reachable twice is listed once: under its real name if that lies below `top`, else
    under the first link in byte order – never by the accident of a file system's own order.
    """
    names, stamps, others = [], {}, Counter()
    above = os.path.realpath(top)
    seen = set()  # (st_dev, st_ino), from the outset those above: links up there are loops
    while above != (above := os.path.dirname(above)):
        with suppress(OSError):
            seen.add(_identity(os.stat(above)))
    folders, links = [b""], []
    while folders or links:
        relative = folders.pop() if folders else heapq.heappop(links)
        folder = os.path.join(os.fsencode(top), relative)
        try:
            st = os.stat(folder)
            if _identity(st) in seen:
                continue
            seen.add(_identity(st))
            stamps[os.fsdecode(folder)] = _stamp(folder, st)  # before the look inside
            with os.scandir(folder) as entries:
                _sort_out(entries, relative, names, folders, links, others)
        except OSError as e:
            where = printable(os.fsdecode(e.filename or folder))
            what = f"cannot read {where} ({e.strerror}); make it readable or move it out"
            raise _bad(top, what) from None
    return names, stamps, others


def _identity(st: os.stat_result) -> tuple[int, int]:
    return st.st_dev, st.st_ino


def _sort_out(
    entries: Iterable[os.DirEntry],
    relative: bytes,
    names: list[bytes],
    folders: list[bytes],
    links: list[bytes],
    others: Counter,
) -> None:
    """Add one folder's entries to the image names, folders, linked folders (a heap) and others.

    Asks the file system about nothing that looks like an image: 270,000 questions take minutes
    on a network disk, and a dangling link will tell when it is read.
    """
    for entry in entries:
        name = entry.name
        if name.startswith(b".") or name == b"__MACOSX":
            continue
        path = os.path.join(relative, name)
        if entry.is_dir(follow_symlinks=False):
            folders.append(path)
        elif name.lower().endswith(IMAGE_ENDINGS):
            names.append(path)
        elif entry.is_symlink() and os.path.isdir(entry.path):
            heapq.heappush(links, path)
        else:
            ending = os.path.splitext(os.fsdecode(name))[1].lower()
            others[ending or "without an ending"] += 1


def _read_list(path: str) -> tuple[FileList, dict[str, list[int]]]:
    """The files a text list or CSV names, in its order, and the list's own stamp."""
    if path.lower().endswith(EXTENSIONS):
        raise _bad(path, "is a single image; give the folder it lies in, or a list of images")
    try:
        with open(path, "rb") as file:
            stamp = _stamp(path, os.fstat(file.fileno()))
            data = file.read()
    except OSError as e:
        raise _bad(path, f"cannot be read ({e.strerror})") from None
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # spreadsheets save "Unicode text" so
    try:
        # fsdecode, as for any name: bytes that are no UTF-8 come out of fsencode unchanged.
        text = data.decode("utf-16") if utf16 else os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
        if "\0" in text:
            raise ValueError
        names = [os.fsencode(entry) for entry in _entries(text, path)]
    except csv.Error as e:
        raise _bad(path, f"is no well-formed CSV ({e})") from None
    except ValueError:
        what = "is a binary file; give a folder of images, or a text list or CSV of their paths"
        raise _bad(path, f"{what} (an archive has to be unpacked first)") from None
    if not names:
        raise _bad(path, "is a list without entries; write one image path a line")
    return FileList.of(os.path.dirname(path), names), {path: stamp}


def _entries(text: str, path: str) -> list[str]:
    """The image paths in the text of a list or CSV, without header, blank lines and comments."""
    lines = [line for line in io.StringIO(text, newline=None) if not _skipped(line)]
    first = lines[0] if lines else ""
    delimiter = max(",;\t", key=first.count)
    is_csv = path.lower().endswith((".csv", ".tsv"))
    if is_csv or (delimiter in first and _column(first.split(delimiter)) is not None):
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    else:
        rows = [[line] for line in lines]
    rows = [row for row in rows if row and not _skipped(row[0] or "".join(row[1:]))]
    column = _column(rows[0]) if rows else None
    cells = [row[column or 0].strip() for row in rows if len(row) > (column or 0)]
    unknown_header = len(cells) > 1 and [_is_image(c) for c in cells[:2]] == [False, True]
    return [c for c in cells[column is not None or unknown_header :] if c]


def _skipped(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _column(header: list[str]) -> int | None:
    """Which cell of a header names the column of paths; None if it is no (known) header."""
    cells = [cell.strip().strip('"').lower() for cell in header]
    return next((cells.index(name) for name in COLUMNS if name in cells), None)


def _check_entries(path: str, files: FileList, n: int = 100) -> None:
    """A list whose first entries all lead nowhere is relative to some other folder."""
    n = min(n, len(files))
    if not any(os.path.exists(files[i]) for i in range(n)):
        first, place = printable(files.relative(0)), printable(files[0])
        what = f"none of its first {n} entries exists; the first, {first}, was looked for at"
        raise _bad(path, f"{what} {place}; paths start at the list's own folder or at /")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _read_cache(cache: str | os.PathLike, path: str) -> FileList | None:
    """The kept list, if it is whole and nothing has changed since; None otherwise."""
    try:
        with open(cache, "rb") as file:
            check, _, head = file.readline().partition(b" ")
            if check != _sha256(head):
                return None
            header = json.loads(head)
            if header["version"] != CACHE_VERSION or header["data_path"] != path:
                return None
            newest = header["scanned_ns"] - RACY_NS
            for folder, stamp in header["stamps"].items():
                if stamp[0] > newest or _stamp(folder) != stamp:
                    return None
            files = FileList(header["root"], file.read())
        return files if files.digest == header["digest"] else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _write_cache(
    cache: str | os.PathLike,
    path: str,
    scanned_ns: int,
    files: FileList,
    stamps: dict[str, list[int]],
) -> None:
    """A line `sha256 JSON`, then the names; whole or not at all. Failing, it is not missed."""
    header = {"version": CACHE_VERSION, "data_path": path, "root": files.root}
    header |= {"scanned_ns": scanned_ns, "digest": files.digest, "stamps": stamps}
    head = json.dumps(header).encode() + b"\n"  # ASCII: odd names are escaped
    temporary = f"{os.fspath(cache)}.{uuid.uuid4().hex}.tmp"  # ranks may write at one time
    try:
        with open(temporary, "wb") as file:
            file.write(_sha256(head) + b" " + head + files._blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, cache)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
