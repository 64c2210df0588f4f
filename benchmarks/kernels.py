"""Compile the Triton kernels for GPUs that need not be there, and print what they would use.

    python benchmarks/kernels.py [--capabilities 80 90] [--dtypes bfloat16 float32]

A JSON object per kernel and GPU: registers and spilled bytes per thread, bytes of shared memory per
program. Sizes are those of a real step, by default of ConvNeXt V2-Base with 4 images of 224 px.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ops import fused
from ops.packed import in_tiles

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


def resources(
    kernel: JITFunction, capability: int, arguments: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, int]:
    """What `kernel` would use if it were launched with these arguments on such a GPU."""
    names = [parameter.name for parameter in kernel.params]
    values = {**dict(zip(names, arguments, strict=False)), **options}
    kinds, constants, aligned = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            kinds[parameter.name], constants[place,] = "constexpr", value
        elif isinstance(value, int):
            kinds[parameter.name] = "i32"
        else:
            kinds[parameter.name] = f"*{TYPES[value.dtype]}"
            aligned[place,] = [["tt.divisibility", 16]]
    source, target = ASTSource(kernel, kinds, constants, aligned), GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=values)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return {"registers": registers, "spilled": spilled, "shared": made.metadata.shared}


def launch_all(b: int, c: int, dtype: torch.dtype) -> None:
    """Launch every kernel as in a step of a block of C channels, on tensors that are not filled."""
    n, v = 4, 19
    near = in_tiles(torch.rand(n, 49).argsort()[:, :v], 7, b)
    vector, wide, taps = torch.empty(c), torch.empty(4 * c), torch.empty(c, 1, 7, 7)
    w1, w2 = torch.empty(4 * c, c), torch.empty(c, 4 * c)
    x = torch.empty(n * v * b * b, c, dtype=dtype, requires_grad=True)
    y = fused.TiledDepthwise.apply(x, taps, vector, near).view(n, -1, c)
    parameters = (vector, vector, w1, wide, wide, wide, w2, vector)
    fused.FusedMLP.apply(y, *parameters).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, kind, default, meaning in (
        ("--capabilities", int, [80, 90], "compute capabilities of the GPUs"),
        ("--sides", int, [8, 4, 2, 1], "cells along the side of a patch"),
        ("--dims", int, [128, 256, 512, 1024], "channels, one for each of --sides"),
        ("--dtypes", str, ["bfloat16"], "dtypes of activations"),
    ):
        parser.add_argument(name, type=kind, nargs="+", default=default, help=meaning)
    args = parser.parse_args()
    for capability in args.capabilities:
        for dtype in args.dtypes:
            for b, c in zip(args.sides, args.dims, strict=True):
                where = {"sm": capability, "dtype": dtype, "b": b, "channels": c}

                def run(
                    kernel: JITFunction,
                    *arguments: object,
                    grid: object,
                    warmup: bool,
                    where: dict[str, Any] = where,
                    **options: object,
                ) -> None:
                    used = resources(kernel, where["sm"], arguments, options)
                    print(json.dumps({"kernel": kernel.__name__, **where, **used}), flush=True)

                with mock.patch.object(JITFunction, "run", run):
                    launch_all(b, c, getattr(torch, dtype))


if __name__ == "__main__":
    main()
