"""The output of a run: log lines, progress bar, log.txt and TensorBoard, all on rank 0 only."""

import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from util.files import append_atomically, write_file

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter


class NullLog:
    """The log of the other ranks: RunLog's methods, doing nothing."""

    def line(self, text: str) -> None:
        """Print one line."""

    def progress(self, done: int, total: int, text: str) -> None:
        """Show the progress of the epoch, as a bar on a terminal."""

    def epoch(self, record: dict[str, object]) -> None:
        """Add a finished epoch to log.txt."""

    def append(self, path: Path, text: str) -> None:
        """Append one line to another file of the run."""

    def catch_up(self) -> None:
        """Write the lines that could not be written before, as on a full disk."""

    def scalars(self, values: dict[str, float], at: float) -> None:
        """Add TensorBoard scalars at a fractional epoch."""

    def picture(self, name: str, image: "np.ndarray", at: float) -> None:
        """Add a TensorBoard image, (h, w, 3) uint8."""

    def close(self) -> None:
        """Write what is still buffered, and close."""


class RunLog(NullLog):
    """Rank 0's log. A failed write, as on a full disk, causes a warning, not the end of the run."""

    def __init__(self, folder: Path, tensorboard: Path, epoch: int, step_share: float) -> None:
        """Continue at `epoch` + `step_share`: log.txt and TensorBoard are truncated to that."""
        from tqdm import tqdm

        self._tqdm = tqdm
        self._bar = tqdm(disable=not sys.stderr.isatty(), leave=False, unit="step")
        self._file = folder / "log.txt"
        cut_log(self._file, epoch)
        self._late: dict[Path, str] = {}  # lines that could not be written yet
        # Created last, since it may call self.line to warn.
        self._events = Events(tensorboard, round(1000 * (epoch + step_share)), self.line)

    def line(self, text: str) -> None:
        self._tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def progress(self, done: int, total: int, text: str) -> None:
        if self._bar.disable:
            return
        self._bar.total, self._bar.n = total, done
        self._bar.set_description_str(text)

    def epoch(self, record: dict[str, object]) -> None:
        self.append(self._file, json.dumps(record))
        if not self._late:
            self._events.reopen()
        self._events.write(lambda writer: writer.flush())

    def append(self, path: Path, text: str) -> None:
        self._late[path] = self._late.get(path, "") + text + "\n"
        self.catch_up()

    def catch_up(self) -> None:
        # Flushed to disk, so that no line is missing before a checkpoint saved after it.
        for path, lines in list(self._late.items()):
            try:
                append_atomically(path, lines)
                del self._late[path]
            except OSError as error:
                self.line(f"warning: {path}: could not be written ({error.strerror}), will retry")

    def scalars(self, values: dict[str, float], at: float) -> None:
        # Epochs × 1000, so that runs of different batch sizes share an axis.
        step = round(1000 * at)

        def write(writer: "SummaryWriter") -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._events.write(write)

    def picture(self, name: str, image: "np.ndarray", at: float) -> None:
        step = round(1000 * at)
        self._events.write(lambda writer: writer.add_image(name, image, step, dataformats="HWC"))

    def close(self) -> None:
        self.catch_up()
        self._bar.close()
        self._events.write(lambda writer: writer.close())


class Events:
    """TensorBoard events; after a failed write, nothing is written until they are reopened."""

    def __init__(self, folder: Path, purge_step: int, warn: Callable[[str], None]) -> None:
        """Continue in `folder` at `purge_step`; later events are dropped."""
        self._folder, self._warn = folder, warn
        self._writer: SummaryWriter | None = None
        threading.excepthook = _quiet_about_disks
        # TensorBoard cannot write to a name that is not text in this locale.
        self._possible = str(folder) == str(folder).encode("utf-8", "ignore").decode()
        if not self._possible:
            what = "is not UTF-8 (or the locale is not), so TensorBoard's events are left out"
            warn(f"warning: {folder}: this name {what}")
        self.reopen(purge_step)

    def reopen(self, purge_step: int | None = None) -> None:
        """Start a new events file, unless the current one is still usable."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None and self._possible:
            try:
                self._writer = SummaryWriter(self._folder, purge_step=purge_step)
            except OSError as error:
                self._failed(error)

    def write(self, action: "Callable[[SummaryWriter], None]") -> None:
        """Call `action` with the writer, if it is usable; warn if the disk fails."""
        if self._writer:
            try:
                action(self._writer)
            except OSError as error:
                self._failed(error)

    def _failed(self, error: OSError) -> None:
        self._writer = None
        self._warn(
            f"warning: {self._folder}: TensorBoard's events could not be written "
            f"({error.strerror}); they continue with a later epoch"
        )


def _quiet_about_disks(failure: threading.ExceptHookArgs) -> None:
    """Print no disk errors from TensorBoard's thread: its writer raises them in ours as well."""
    of_tensorboard = type(failure.thread).__module__.startswith("tensorboard")
    if not (of_tensorboard and issubclass(failure.exc_type, OSError)):
        threading.__excepthook__(failure)


def cut_log(path: Path, epoch: int) -> None:
    """Drop from log.txt the lines of `epoch` and later ones, and truncated or repeated lines."""
    if not path.exists():
        return
    text = path.read_text("utf-8", errors="replace")
    kept: dict[int, str] = {}
    for line in text.splitlines():
        try:
            number = json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError):
            continue
        if number < epoch:
            kept[number] = line
    whole = "".join(line + "\n" for line in kept.values())
    if whole != text:
        write_file(path, whole)


class Meter:
    """Throughput, waiting time and time left, from one log line to the next."""

    def __init__(self, steps_left: int) -> None:
        self._left = steps_left
        self._began = time.perf_counter()
        self._steps, self._seconds, self._waited, self._total = 0, 0.0, 0.0, 0

    def step(self, seconds: float, waited: float) -> None:
        """Count an optimizer step."""
        self._steps += 1
        self._total += 1
        self._seconds += seconds
        self._waited += waited

    def take(self, images_a_step: int) -> dict[str, float]:
        """images_per_s and data_wait (a share) since the last call; left, the seconds left."""
        seconds = max(self._seconds, 1e-9)
        a_step = (time.perf_counter() - self._began) / max(self._total, 1)
        values = {
            "images_per_s": self._steps * images_a_step / seconds,
            "data_wait": self._waited / seconds,
            "left": (self._left - self._total) * a_step,
        }
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return values


def duration(seconds: float) -> str:
    """`2 h 13 min`, `4 min 10 s`, `9 s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def peak_memory(device_type: str) -> int:
    """Peak memory so far, in bytes: of the GPU if there is one, else of this process."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
