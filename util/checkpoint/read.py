"""Reads checkpoints without trust: tensors and plain values, and no code that they may hold."""

import argparse
import json
import os
import pickle
import re
import warnings
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from torch import Tensor, nn

from util.checkpoint.container import Damaged, check_container, holds_program, parsing
from util.errors import BadInput
from util.files import read_patiently

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

# What torch warns of while it loads tensors that are refused afterwards.
for text in ("Validating sparse", "Sparse CSR", "TypedStorage is deprecated", "torch.quantize"):
    warnings.filterwarnings("ignore", text)


def read_checkpoint(path: str | Path, peek: bool = False) -> dict[str, Any]:
    """Load a checkpoint, or a safetensors file, onto the CPU without running any code in it.

    `peek`: only to see what it holds; the weights stay on disk, and damage in them goes unnoticed.
    Raises Damaged for an empty, truncated or altered file; BadInput for a missing one, one that is
    not a checkpoint, and one that holds more than plain tensors, plain and NumPy values, paths and
    an argparse.Namespace; ReadFault if memory runs out, or if the disk fails and retrying does not
    help.
    """
    path = Path(path)
    return read_patiently(path, lambda: _read(path, peek))


def _read(path: Path, peek: bool) -> dict[str, Any]:
    kind = check_container(path, checksums=not peek)
    with parsing(path):
        if kind == "safetensors":
            checkpoint = _read_safetensors(path)
        else:
            checkpoint = _read_torch(path, mapped=peek and kind == "zip")
        check_tensors(path, checkpoint)
    return checkpoint


def _read_torch(path: Path, mapped: bool) -> dict[str, Any]:
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
    except RuntimeError as error:
        if "weights_only" not in str(error):
            raise
        raise holds_program(path) from None
    if not isinstance(checkpoint, dict):
        raise BadInput(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file; of one of ours, a checkpoint with the metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        notes = file.metadata() or {}
    tensors = load_file(path)
    known = {name: parsed(notes[name]) for name in DESCRIBED if name in notes}
    return {"model": tensors, **known} if "preprocessing" in known else tensors


def parsed(text: str) -> object:
    """The value of a JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_tensors(path: Path, checkpoint: dict[str, Any]) -> None:
    """Check the tensors in nested dicts and lists.

    Raises BadInput for one that is not plain, Damaged for one that repeats its values beyond the
    size of the file: a copy of it could fill the memory.
    """
    size, todo, seen = os.path.getsize(path), [("", checkpoint)], set()
    while todo:
        name, value = todo.pop()
        if isinstance(value, Tensor):
            if kind := unusual_kind(value):
                raise BadInput(f"{path}: {name} is {kind}; save it again as a plain tensor")
            if value.nbytes > size:
                what = f"{name} claims {value.nbytes:,} bytes, but the file has only {size:,}"
                raise Damaged(f"{path}: damaged ({what})")
        elif id(value) not in seen:  # pickles may hold themselves
            seen.add(id(value))
            todo += [(f"{name}.{key}".strip("."), inner) for key, inner in contents(value)]


def contents(value: object) -> list[tuple[object, object]]:
    """The named or numbered values in a dict, a list or the like; [] for anything else."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple | set) else []


def unusual_kind(tensor: Tensor) -> str:
    """What keeps a tensor from being plain, in words; "" for a dense one of numbers."""
    kinds = {
        f"a {type(tensor).__name__}": type(tensor) not in (Tensor, nn.Parameter),
        "nested": tensor.is_nested,
        "sparse": tensor.layout != torch.strided,
        "quantised": tensor.is_quantized,
        "without values": tensor.is_meta,
        f"of {tensor.dtype}": not tensor.is_quantized and not holds_numbers(tensor.dtype),
    }
    return next((kind for kind, found in kinds.items() if found), "")


@cache
def holds_numbers(dtype: torch.dtype) -> bool:
    """Whether each element is a number: types of 4 bits and less pack several into one."""
    try:
        torch.empty(1, dtype=dtype).to(torch.complex64)
    except RuntimeError:
        return False
    return True
