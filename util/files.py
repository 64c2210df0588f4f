"""Writing files so that a reader sees the old one or the whole new one, never a part."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends without an exception.

    Written beside it, flushed to the disk, then renamed. Raises OSError as the disk does (full,
    read-only, …), leaving what was there.
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
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def write_file(path: str | Path, data: bytes | str) -> None:
    """`replacing` for content that is at hand."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: object) -> None:
    """`value` as readable JSON; what JSON cannot say is written as its `str`."""
    write_file(path, json.dumps(value, indent=2, default=str) + "\n")


def flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
