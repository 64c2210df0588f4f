"""Records which file each data worker is reading, so that one that hangs or is killed is named."""

import os
import struct
import time
from collections.abc import Iterable

from util.wording import printable

RECORD_SIZE = 4096  # bytes of a record
HEAD = struct.Struct("dii")  # when reading began, by which process, bytes of the path (0: none)
_own: memoryview | None = None  # this process's record, if it keeps one


def keep_record(record: memoryview) -> None:
    """Keep this process's record in RECORD_SIZE bytes of memory that another process can read."""
    global _own
    _own = record


def begin_reading(path: str | bytes | os.PathLike) -> None:
    """Record that this process begins to read a file."""
    if _own is not None:
        name = os.fsencode(path)[-(RECORD_SIZE - HEAD.size) :]
        _own[HEAD.size : HEAD.size + len(name)] = name
        HEAD.pack_into(_own, 0, time.monotonic(), os.getpid(), len(name))


def end_reading() -> None:
    """Record that this process has read it."""
    if _own is not None:
        HEAD.pack_into(_own, 0, 0, 0, 0)


def being_read(records: Iterable[memoryview]) -> str:
    """What other processes are reading, by their records: a line for each that reads."""
    lines = []
    for record in records:
        began, process, length = HEAD.unpack_from(record)
        if length:
            name = printable(os.fsdecode(bytes(record[HEAD.size : HEAD.size + length])))
            seconds = time.monotonic() - began
            lines.append(f"data worker {process} has been reading {name} for {seconds:.0f} s")
    return "\n".join(lines)
