"""What a run tells: lines, a progress bar, log.txt, TensorBoard. Silent on all ranks but 0."""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from util.files import write_file

if TYPE_CHECKING:
    import numpy as np


class NullLog:
    """The log of the ranks that say nothing; RunLog's methods, doing nothing."""

    def line(self, text: str) -> None:
        """One line for the reader."""

    def progress(self, done: int, total: int, text: str) -> None:
        """How far the epoch is, for a bar on a terminal."""

    def epoch(self, record: dict[str, object]) -> None:
        """One finished epoch, for log.txt."""

    def append(self, path: Path, text: str) -> None:
        """One line at the end of another file of the run."""

    def scalars(self, values: dict[str, float], at: float) -> None:
        """TensorBoard scalars at a fractional epoch."""

    def picture(self, name: str, image: "np.ndarray", at: float) -> None:
        """A TensorBoard picture, (h, w, 3) uint8."""

    def close(self) -> None:
        """Write out what is buffered."""


class RunLog(NullLog):
    """Rank 0's."""

    def __init__(self, folder: Path, tensorboard: Path, epoch: int, step_share: float) -> None:
        """Go on at `epoch` (and a share of it): what lies after in log.txt and TensorBoard goes."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self._file = folder / "log.txt"
        cut_log(self._file, epoch)
        self._writer = SummaryWriter(tensorboard, purge_step=round(1000 * (epoch + step_share)))
        self._bar = tqdm(disable=not sys.stderr.isatty(), leave=False, unit="step")
        self._tqdm = tqdm

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
        self._writer.flush()

    def append(self, path: Path, text: str) -> None:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())  # never behind the checkpoint that is saved after it

    def scalars(self, values: dict[str, float], at: float) -> None:
        for name, value in values.items():
            # Epochs × 1000, so that runs of different batch sizes share an axis.
            self._writer.add_scalar(name, value, round(1000 * at))

    def picture(self, name: str, image: "np.ndarray", at: float) -> None:
        self._writer.add_image(name, image, round(1000 * at), dataformats="HWC")

    def close(self) -> None:
        self._bar.close()
        self._writer.close()


def cut_log(path: Path, epoch: int) -> None:
    """Drop from log.txt the lines of `epoch` and later ones, and what is torn or repeated."""
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
    """Speed, waiting and time left, from one log line to the next."""

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
        """images_per_s, data_wait (share) since the last call; seconds left from the average."""
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
    """Most bytes used so far: of the GPU where there is one, else of this process."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
