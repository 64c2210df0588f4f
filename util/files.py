"""Writing files so that a reader sees the old one or the whole new one, never a part."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from util.errors import Fault


@contextmanager
def disk_errors(
    path: str | Path, kind: type[Exception] = Fault, advice: str = ""
) -> Iterator[None]:
    """Raises `kind`, one line, for a disk that does not take what is written in the block."""
    try:
        yield
    except OSError as error:
        what = f"{path}: cannot be written ({error.strerror or error})"
        raise kind("; ".join(filter(None, (what, advice)))) from None


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends without an exception.

    Written beside it, flushed to the disk, then renamed. Raises OSError as the disk does (full,
    read-only, …), naming `path` and leaving what was there.
    """
    path = Path(path)
    # Opened by name rather than through tempfile, whose 0600 would hide the file from colleagues.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        if error.errno:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def creating(folder: Path) -> Iterator[Path]:
    """A place to fill with files, which appear as `folder` when the block has ended well.

    A new folder appears whole. One that is there and empty stays the same, for somebody may be in
    it, or a disk be mounted on it; the files are moved there in the end. Raises OSError as the disk
    does.
    """
    there = folder.is_dir()
    beside = folder / folder.name if there else folder
    temporary = beside.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of our number that was killed
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.iterdir()) if there else ():
            os.replace(path, folder / path.name)
        if not there:
            os.replace(temporary, folder)
        flush_folder(temporary.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: str | Path, data: bytes | str) -> None:
    """`replacing` for content that is at hand."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: object) -> None:
    """`value` as readable JSON; what JSON cannot say is written as its `str`."""
    write_file(path, json.dumps(value, indent=2, default=str) + "\n")


def append_whole(path: str | Path, text: str) -> None:
    """Add `text` to a file, on the disk when this returns; or, raising OSError, nothing of it."""
    data = text.encode("utf-8", "backslashreplace")
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):  # as the last write that a disk has room for
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def remove_unfinished(folder: Path) -> None:
    """Delete what `replacing` has left in a folder because it was killed; nobody may be writing."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        path.unlink()


def flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
