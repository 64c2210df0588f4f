"""Writes files so that a reader sees the old file or the complete new one, never a part.

Reads files from disks that fail now and then.
"""

import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO, TypeVar

from util.errors import Fault, ReadFault
from util.wording import printable

T = TypeVar("T")

# Network disks fail now and then: a read that the file system refuses is retried after each of
# these pauses in seconds.
RETRY_AFTER = (0.1, 0.5)
# What is wrong with a path rather than with its disk.
OF_PATH = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
OF_PATH |= {errno.EACCES, errno.EPERM}
# What file systems without locks answer: Lustre without `-o flock`, NFS without lockd, and others.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def disk_errors(
    path: str | Path, kind: type[Exception] = Fault, advice: str = ""
) -> Iterator[None]:
    """Turn an OSError raised in the block into `kind`, with a one-line message."""
    try:
        yield
    except OSError as error:
        what = f"{path}: {unusable(error)}"
        raise kind("; ".join(filter(None, (what, advice)))) from None


def unusable(error: OSError) -> str:
    """Why a file or folder cannot be written, and what to do unless that is obvious."""
    path = os.fsdecode(error.filename or "")
    if os.path.islink(path) and not os.path.exists(path):
        what = f"is a link to {printable(os.readlink(path))}, which does not exist"
        return f"{printable(path)} {what}; create that folder, or name another"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "is a file or inside one; name another folder"
    return f"cannot be written ({error.strerror or error})"


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends without an exception.

    It is written beside `path`, flushed to disk, then renamed. Raises OSError (disk full,
    read-only, …) that names `path`, and leaves the old file.
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
    """A temporary folder to fill; the files appear in `folder` when the block ends without error.

    A new folder appears all at once. An empty folder that exists is kept, since it may be in use or
    a mount point: the files are moved into it at the end. Raises OSError if the disk fails.
    """
    there = folder.is_dir()
    beside = folder / folder.name if there else folder
    temporary = beside.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with our id
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
    """Write content that is in memory, as `replacing` does."""
    with replacing(path) as file:
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as readable JSON; what JSON cannot represent is written as its `str`."""
    write_file(path, json.dumps(value, indent=2, default=str) + "\n")


def append_atomically(path: str | Path, text: str) -> None:
    """Append `text` and flush it to disk, or, raising OSError, append nothing."""
    data = text.encode("utf-8", "backslashreplace")
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):  # a full disk may take only a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left of `replacing`; nobody may be writing to the folder."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        path.unlink()


def flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, if its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of some network mounts, which cannot flush folders
            raise
    finally:
        os.close(handle)


def retrying(read: Callable[[], T], pauses: Sequence[float] = RETRY_AFTER) -> T:
    """`read()`, called again after each pause if the file system refuses; raises its last error."""
    for pause in pauses:
        try:
            return read()
        except OSError:
            time.sleep(pause)
    return read()


def read_patiently(path: str | Path, read: Callable[[], T]) -> T:
    """The same for a file. Raises ReadFault if its disk fails, OSError if the path is wrong."""
    try:
        return retrying(read)
    except OSError as error:
        if error.errno in OF_PATH:
            raise
        raise ReadFault(
            f"{path}: could not be read ({error.strerror or error}), although it was tried "
            f"{1 + len(RETRY_AFTER)} times; the file may be good, and nothing was changed: check "
            "the disk, then run the same command again"
        ) from None


def lock(file: IO, take: Callable[[IO, int], None] = fcntl.flock, wait: bool = False) -> None:
    """Lock an open file. Raises BlockingIOError if another process has locked it, unless `wait`.

    On a file system without locks, only warns, once for each file.
    """
    try:
        take(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_unguarded(Path(file.name), error.strerror)


@cache
def _warn_unguarded(path: Path, reason: str) -> None:
    what = f"{path}: this file system cannot lock files ({reason})"
    with suppress(OSError):
        print(
            f"warning: {what}; start no second program that writes to {path.parent}",
            file=sys.stderr,
            flush=True,
        )
