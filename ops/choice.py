"""Which of the passes in this package are used."""

import os
import sys
from functools import cache
from importlib.util import find_spec

import torch

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


@cache
def passes_trial(device: torch.device) -> bool:
    """Whether Triton's kernels give right results on this device; says so if they do not."""
    from ops.trial import failure  # which needs the kernels

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
