"""Which of the passes in this package are used, and the tables that they need."""

import os
import sys
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ops.packed import (
    DenseCanvas,
    Neighbours,
    Tiles,
    WholeImages,
    in_tiles,
    in_windows,
    on_canvas,
)
from ops.trial import failure
from util.errors import BadInput

VARIABLE = "SFER_KERNELS"
KINDS = ("reference", "cpu", "triton")


def kernels_for(device: torch.device) -> str:
    """One of KINDS: torch's kernels, the passes for CPUs, or Triton's for Nvidia GPUs.

    By default the last two, each on its own device, where they can run and pass a trial.
    SFER_KERNELS chooses another kind, for tests and benchmarks. Raises BadInput for other values,
    and for a kind that does not run on the device.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", *KINDS):
        raise BadInput(f"{VARIABLE}={wanted}: give {', '.join(KINDS)}, or leave it unset")
    if wanted == "triton" and (missing := without_triton(device)):
        raise BadInput(f"{VARIABLE}=triton: {missing}; unset it")
    if wanted == "cpu" and device.type != "cpu":
        raise BadInput(f"{VARIABLE}=cpu: these kernels do not run on {device.type}; unset it")
    if wanted:
        return wanted
    if device.type == "cpu":
        return "cpu"
    interpreted = device.type != "cuda" or is_interpreted()  # correct, but far too slow
    usable = not interpreted and not without_triton(device) and passes_trial(device)
    return "triton" if usable else "reference"


def find_neighbours(visible: Tensor, grid: int, b: int) -> DenseCanvas | Neighbours | Tiles:
    """Patch indices (N, V) on a grid×grid image, b×b cells per patch -> tables for the convolution.

    Each kind of kernels has its own.
    """
    tables = {"reference": on_canvas, "cpu": in_windows, "triton": in_tiles}
    return tables[kernels_for(visible.device)](visible, grid, b)


def whole_images(x: Tensor) -> Neighbours | WholeImages | None:
    """Whole images (N, 1, H, W, C) -> as `find_neighbours`, with each image as one patch.

    None where torch's kernels are used, which includes images that are not square on CPUs.
    """
    kind = kernels_for(x.device)
    if kind == "cpu" and x.shape[2] == x.shape[3]:
        return in_windows(torch.zeros(len(x), 1, dtype=torch.long), 1, x.shape[2])
    return WholeImages() if kind == "triton" else None


@cache
def passes_trial(device: torch.device) -> bool:
    """Whether Triton's kernels give right results on this device; says so if they do not."""
    if problem := failure(device):
        print(f"warning: torch's kernels replace ours on {device}: {problem}", file=sys.stderr)
    return not problem


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def without_triton(device: torch.device) -> str:
    """Why Triton's kernels cannot run on this device; empty if they can."""
    if not has_triton():
        return "Triton is not installed"
    if is_interpreted():
        return ""
    if device.type != "cuda":
        return f"these kernels run on {device.type} only with TRITON_INTERPRET=1, slowly"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "these kernels need an Nvidia GPU of compute capability 8.0 or newer"
    return ""


@cache
def has_triton() -> bool:
    """Whether Triton is installed; importing it takes a second."""
    return find_spec("triton") is not None
