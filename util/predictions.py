"""Predictions as rows: of faces, as CSV or JSON lines while they come; of an evaluation, as CSV."""

import csv
import io
import json
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from util.errors import BadInput, Fault
from util.files import unusable, write_file

if TYPE_CHECKING:
    import numpy as np

COLUMNS = ("path", "face", "left", "top", "width", "height", "score", "label", "status")
OK, NO_FACE, UNREADABLE = "ok", "no_face", "unreadable"
DIGITS = 6  # of scores and probabilities

Cell = str | int | float | None


class RowWriter:
    """Writes rows to a file, whole lines at a time, so that an interrupted file is readable."""

    def __init__(self, file: BinaryIO, kind: str, classes: Sequence[str], name: str) -> None:
        """`kind`: csv or jsonl; `name`: of the file, for messages."""
        self.columns = [*COLUMNS, *(f"p_{one}" for one in classes)]
        self._file, self._kind, self._name = file, kind, name
        if kind == "csv":
            self._put(csv_line(self.columns))

    def picture(self, path: str, status: str) -> None:
        """Write the row of a picture without faces."""
        self.write([[path, *[None] * (len(COLUMNS) - 2), status]])

    def write(self, rows: Sequence[Sequence[Cell]]) -> None:
        """Write rows; missing cells at the end of a row are empty."""
        full = ([*row, *[None] * (len(self.columns) - len(row))] for row in rows)
        line = csv_line if self._kind == "csv" else self._json_line
        self._put("".join(map(line, full)))

    def _json_line(self, row: Sequence[Cell]) -> str:
        cells = (round(cell, DIGITS) if isinstance(cell, float) else cell for cell in row)
        return json.dumps(dict(zip(self.columns, cells, strict=True))) + "\n"

    def _put(self, text: str) -> None:
        data = text.encode("utf-8", "surrogateescape")
        try:
            before = self._file.tell() if self._file.seekable() else None
            written = 0
            try:
                while written < len(data):
                    count = self._file.write(data[written:])
                    if count is None:  # a full, non-blocking pipe
                        select.select([], [self._file], [])
                    written += count or 0
                self._file.flush()
            except OSError:
                if before is not None:  # leave no partial line
                    with suppress(OSError):
                        self._file.truncate(before)
                raise
        except OSError as error:
            raise Fault(f"{self._name}: cannot be written ({error.strerror})") from None


def csv_line(row: Sequence[Cell]) -> str:
    """One row; non-UTF-8 bytes in a file name remain the escapes of `os.fsdecode`."""
    text = io.StringIO()
    # With this line ending, both line feeds and carriage returns are quoted.
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow([f"{cell:.{DIGITS}f}" if isinstance(cell, float) else cell for cell in row])
    return text.getvalue().removesuffix("\r\n") + "\n"


@contextmanager
def open_rows(output: str | None, kind: str, classes: Sequence[str]) -> Iterator[RowWriter]:
    """A writer to a file, whose folder is created, or to standard output. Raises BadInput."""
    if output is None:
        sys.stdout.flush()
        # Unbuffered, so that a failed write leaves nothing to be flushed at exit.
        raw = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)
        yield RowWriter(raw, kind, classes, "standard output")
        return
    with ExitStack() as stack:
        try:
            path = Path(output).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "wb", buffering=0))
        except OSError as error:
            raise BadInput(f"--output {output}: {unusable(error)}") from None
        yield RowWriter(file, kind, classes, output)


def inert(path: str) -> str:
    """The same path, written so that no spreadsheet takes it for a formula."""
    return f"./{path}" if path[:1] in "=+-@\t\r" else path


def write_predictions(
    path: str | Path,
    names: Sequence[str],
    labels: "np.ndarray",
    probabilities: "np.ndarray",
    classes: Sequence[str],
) -> None:
    """Write an evaluation's `predictions.csv`: path, label, prediction, p_CLASS; one row per image.

    Non-UTF-8 bytes in a file name are written as they are. Raises OSError if the disk fails.
    """
    lines = [csv_line(["path", "label", "prediction", *(f"p_{name}" for name in classes)])]
    columns = names, labels.tolist(), probabilities.argmax(axis=1).tolist(), probabilities.tolist()
    for name, label, prediction, row in zip(*columns, strict=True):
        lines.append(csv_line([name, classes[label], classes[prediction], *row]))
    write_file(path, "".join(lines).encode("utf-8", "surrogateescape"))
