"""Checkpoints of runs: written completely or not at all, and found again.

util/checkpoint/read.py reads them, util/checkpoint/container.py recognises and checks files.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.checkpoint.container import Damaged
from util.checkpoint.read import read_checkpoint
from util.files import read_patiently, replacing
from util.rundir import BEST, LAST


class FoundCheckpoint(NamedTuple):
    path: Path
    checkpoint: dict[str, Any]
    damaged: list[str]  # what was wrong with newer files, which were skipped


def save_checkpoint(
    checkpoint: dict[str, Any],
    folder: Path,
    number: int | None = None,
    keep: int = 0,
    best: bool = False,
) -> None:
    """Write `checkpoint-last.pth`, also as `checkpoint-{number}.pth` if a number is given.

    Only the newest `keep` numbered files stay (0: all). `best`: also as `checkpoint-best.pth`.
    Raises OSError if the disk fails, leaving the old files.
    """
    # Write the best first: a run killed in between repeats the epoch and writes it again. The other
    # way round, an older file would remain the best.
    with replacing(folder / (BEST if best else LAST)) as file:
        write_file_or_raise(checkpoint, file)
    if best:
        link_or_copy(folder / BEST, folder / LAST)
    if number is None:
        return
    numbered = folder / f"checkpoint-{number}.pth"
    link_or_copy(folder / LAST, numbered)
    # Higher numbers are of another run that went further, and must not be deleted.
    own = [path for n, path in numbered_checkpoints(folder) if n <= number]
    for path in own[keep:] if keep else []:
        path.unlink()


def write_file_or_raise(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """torch.save, but raising the disk's OSError, which torch hides behind an error of its own."""
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def find_not_finite(checkpoint: dict[str, Any]) -> str:
    """The name of a weight that is not finite everywhere; "" if there is none."""
    for part in ("model", "model_ema"):
        for name, tensor in checkpoint.get(part, {}).items():
            if tensor.is_floating_point() and not is_finite(tensor):
                return f"{part} {name}"
    return ""


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. A single NaN makes both the minimum and the maximum NaN."""
    # With NumPy: torch would start further threads for the saving thread. With more threads than
    # cores, those of OpenMP no longer spin while they wait, which halves the speed of training.
    values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return not values.size or bool(np.isfinite([values.min(), values.max()]).all())


def link_or_copy(existing: Path, new: Path) -> None:
    """Give a file a second name, atomically; copies it if the disk has no hard links."""
    temporary = new.with_name(f".{new.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(existing, temporary)
    except OSError:
        with open(existing, "rb") as source, replacing(new) as file:
            shutil.copyfileobj(source, file)
    else:
        os.replace(temporary, new)


def numbered_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """All (N, `checkpoint-N.pth`), newest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)\.pth", path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest_checkpoint(folder: Path) -> FoundCheckpoint | None:
    """The newest readable checkpoint of a run, or None if there is none.

    Damaged files are skipped. If all are damaged, raises Damaged rather than let a run start from
    scratch. Raises ReadFault if the folder or a file cannot be read although it may be good: an
    older one would overwrite it.
    """

    def find() -> list[Path]:
        last = [path for path in folder.iterdir() if path.name == LAST]
        return last + [path for _, path in numbered_checkpoints(folder)]

    damaged = []
    for path in read_patiently(folder, find):
        try:
            return FoundCheckpoint(path, read_checkpoint(path), damaged)
        except Damaged as error:
            damaged.append(str(error))
    if damaged:
        raise Damaged(
            f"--output_dir {folder}: no checkpoint in it can be read ({'; '.join(damaged)}); "
            "move them away to start from scratch, or name a good one with --resume"
        )
    return None
