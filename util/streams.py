"""Standard input, output and error that a program outlives, however they are closed or broken."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


class Lasting:
    """A text stream that drops what cannot be written, instead of raising OSError.

    The terminal may have been closed, the reader of a pipe may have ended, a disk may be full.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, if possible; -> its length."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, if possible."""
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within the block, standard output and error exist, take any text, and never raise OSError."""
    open_closed()
    out, error = sys.stdout, sys.stderr
    for stream in (out, error):
        stream.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    try:
        with redirect_stdout(Lasting(out)), redirect_stderr(Lasting(error)):
            yield
    finally:
        for stream in (out, error):
            flush_or_drop(stream)


def open_closed() -> None:
    """Open /dev/null for each standard stream that is closed (`>&-`), which Python shows as None.

    Otherwise the next file opened, perhaps a checkpoint, would get the number of that stream, and
    with it the output of libraries and child processes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest free one: that of the stream
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode))  # noqa: SIM115 – as long as the program runs


def flush_or_drop(stream: TextIO) -> None:
    """Flush a stream; a failure, as on a full disk, must not change the exit code."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
