"""Which of the passes in this package are used."""

import os

import torch

from util.errors import BadInput

VARIABLE = "SFER_KERNELS"


def uses_custom_kernels(device: torch.device) -> bool:
    """Whether the passes of this package are used: on CPUs. Other devices use torch's kernels.

    SFER_KERNELS=reference uses torch's kernels on a CPU as well, for tests and benchmarks. Raises
    BadInput for other values, and for `cpu` on another device.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "reference", "cpu"):
        raise BadInput(f"{VARIABLE}={wanted}: give reference or cpu, or leave it unset")
    if wanted == "cpu" and device.type != "cpu":
        raise BadInput(f"{VARIABLE}=cpu: these kernels do not run on {device.type}; unset it")
    return device.type == "cpu" and wanted != "reference"
