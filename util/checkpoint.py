"""Checkpoints: tensors and plain values, written completely or not at all, read without trust."""

import argparse
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy._core.multiarray import scalar
from torch import Tensor

from util.errors import BadInput
from util.files import replacing
from util.rundir import BEST, LAST

# Metadata of our exported safetensors files, as JSON text.
DESCRIBED = ("args", "classes", "preprocessing")

# What official checkpoints hold besides tensors and plain values, by the names in pickles. All only
# hold data: a path becomes one that cannot touch the disk.
SAFE_GLOBALS = [
    (argparse.Namespace, "argparse.Namespace"),
    (scalar, "numpy._core.multiarray.scalar"),
    (scalar, "numpy.core.multiarray.scalar"),  # before numpy 2
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
    (PurePosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),  # Python 3.13
    (PurePosixPath, "pathlib.PurePosixPath"),
]


class Damaged(BadInput):
    """The file exists, but it is damaged."""


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
    scratch.
    """
    last = [folder / LAST] if (folder / LAST).exists() else []
    damaged = []
    for path in last + [path for _, path in numbered_checkpoints(folder)]:
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


def read_checkpoint(path: str | Path, peek: bool = False) -> dict[str, Any]:
    """Load a checkpoint, or a safetensors file, onto the CPU without running any code in it.

    `peek`: only to see what it holds; the weights stay on disk, and damage in them goes unnoticed.
    Raises Damaged for an empty, truncated or altered file; BadInput for a missing one, one that is
    not a checkpoint, and one that holds more than tensors, plain and NumPy values, paths and an
    argparse.Namespace.
    """
    path = Path(path)
    if check_container(path, checksums=not peek) == "safetensors":
        return read_safetensors(path)
    mapped = peek and zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|class|type) '?([\w.]+)'?", str(error))
        named = f" ({what[1]})" if what else ""
        raise BadInput(
            f"{path}: holds Python objects{named} that could run code, and was not loaded; "
            "save it again as tensors and plain values"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if "weights_only" in str(error):
            raise BadInput(
                f"{path}: is in a format that may contain code (TorchScript, or torch's old tar), "
                "and was not loaded; save its state_dict() with torch.save"
            ) from None
        raise Damaged(f"{path}: damaged ({first_line(error)})") from None
    if not isinstance(checkpoint, dict):
        raise BadInput(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file; of one of ours, a checkpoint with the metadata.

    Raises Damaged.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise Damaged(f"{path}: truncated or damaged ({first_line(error)})") from None
    known = {name: parsed(notes[name]) for name in DESCRIBED if name in notes}
    return {"model": tensors, **known} if "preprocessing" in known else tensors


def parsed(text: str) -> object:
    """The value of a JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_container(path: Path, checksums: bool = True) -> str:
    """Check the first bytes, and the checksums of a zip archive: torch.load does neither.

    Otherwise a flipped byte would load as a wrong weight. -> "torch" or "safetensors".
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except IsADirectoryError:
        what = "is a folder; name a checkpoint in it, such as checkpoint-last.pth"
        raise BadInput(f"{path}: {what}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    # A safetensors file starts with the length of its header in 8 bytes, which may look like
    # anything, followed by the header, which is JSON.
    if head[5:9] == b"\0\0\0{":
        return "safetensors"
    if not head.strip(b"\0"):
        raise Damaged(f"{path}: {'empty' if not head else 'damaged (starts with zeros)'}")
    if head.lstrip()[:1] == b"<":
        raise BadInput(f"{path}: a web page, not a checkpoint; download the file itself")
    if head[:2] == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip() if checksums else None
        except MemoryError:
            raise
        except Exception as error:  # damaged sizes, methods or flags can raise anything
            raise Damaged(f"{path}: truncated or damaged ({first_line(error)})") from None
        if wrong:
            raise Damaged(f"{path}: damaged (checksum of {wrong})")
    elif path.suffix == ".safetensors":
        raise Damaged(f"{path}: damaged (no safetensors header)")
    elif head[:1] != b"\x80" and head[257:262] != b"ustar":  # torch's two older formats
        raise BadInput(f"{path}: not a PyTorch checkpoint (starts with {head[:8]!r})")
    return "torch"


def first_line(error: Exception) -> str:
    """An exception's message as one short line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
