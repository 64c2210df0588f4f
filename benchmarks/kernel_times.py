"""Times of the Triton kernels against torch's, for the blocks of an FCMAE's four stages.

    python benchmarks/kernel_times.py [--batch_size 64] [--precision bf16] [--json FILE]

224 px, mask ratio 0.6, by default ConvNeXt V2-Base. Torch's side is what `SFER_KERNELS=reference`
runs: for the convolution, that includes filling a map with the visible patches and reading them
back. Times are those that the GPU needs, without launching, with a cleared L2 cache. Bytes are what
our kernels have to move, counted as in docs/gpu.md; copying a large tensor shows what the
GPU can reach.

The kernels' trial runs first, as before a training. Results and gradients are then compared with
torch's in fp32, beside torch's own in the measured precision.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_convnextv2 import Block, depthwise
from ops import fused
from ops.choice import without_triton
from ops.packed import in_tiles, on_canvas
from ops.trial import failure
from util.patch_counts import visible_patches

GRID, MASK_RATIO = 7, 0.6
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Tensors of the block's width that our kernels move: the table in docs/gpu.md.
UNITS = {
    "convolution": 2,
    "its input's gradient": 2,
    "its filters' gradient": 2,
    "MLP": 24,
    "MLP's gradients": 49,
}
Run = Callable[[], Tensor | tuple[Tensor, ...]]


class Stage(NamedTuple):
    """A block and its inputs: patches of b×b cells with C channels."""

    block: Block
    b: int
    visible: Tensor  # (N, V)
    x: Tensor  # (N, V, b, b, C)
    g: Tensor  # the same, an upstream gradient

    def to(self, dtype: torch.dtype) -> "Stage":
        """With inputs of this dtype; parameters stay fp32."""
        x, g = (t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (self.x, self.g))
        return self._replace(x=x, g=g)


def build(b: int, c: int, batch: int, device: torch.device) -> Stage:
    """A stage in fp32 with random weights and inputs."""
    torch.manual_seed(0)
    block = Block(c).to(device)
    nn.init.normal_(block.grn.gamma, std=0.2)
    visible = torch.rand(batch, GRID**2, device=device).argsort(dim=1)
    visible = visible[:, : visible_patches(GRID**2, MASK_RATIO)]
    x = torch.randn(*visible.shape, b, b, c, device=device, requires_grad=True)
    return Stage(block, b, visible, x, torch.randn_like(x))


def ours(stage: Stage) -> dict[str, Run]:
    """Each part with the Triton kernels."""
    block, x = stage.block, stage.x
    n, c = len(x), x.shape[-1]
    near = in_tiles(stage.visible, GRID, stage.b)
    taps = block.dwconv.weight.detach().flatten(1).t().contiguous()
    bias = block.dwconv.bias.detach()
    rows, g = x.detach().reshape(-1, c), stage.g.reshape(-1, c)

    def filters() -> tuple[Tensor, Tensor]:
        sums = fused.correlate_tiles(rows, g, *near).sum(0)
        return sums[:49].t().reshape(-1, 1, 7, 7), sums[49]

    y = x.view(n, -1, c)
    parameters = [p.flatten() if p.ndim == 4 else p for p in mlp_parameters(block)]
    z = fused.FusedMLP.apply(y, *parameters)
    return {
        "convolution": lambda: fused.convolve_tiles(rows, taps, bias, *near),
        "its input's gradient": lambda: fused.convolve_tiles(g, taps, None, *near),
        "its filters' gradient": filters,
        "MLP": torch.no_grad()(lambda: fused.FusedMLP.apply(y, *parameters)),
        "MLP's gradients": lambda: gradients(z, [x, *parameters], stage.g),
    }


def torchs(stage: Stage) -> dict[str, Run]:
    """Each part with torch's kernels, under autocast if x is not fp32."""
    block, x = stage.block, stage.x
    canvas = on_canvas(stage.visible, GRID, stage.b)
    dtype, device = x.dtype, x.device.type

    def convolve(x: Tensor = x, conv: nn.Conv2d = block.dwconv) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return depthwise(x, conv, canvas)

    def mlp() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return block.pwconv2(block.grn(F.gelu(block.pwconv1(block.norm(x)))))

    # All gradients that a convolution's inputs require are computed, whichever are asked for.
    frozen = copy.deepcopy(block.dwconv).requires_grad_(False)
    of_input, of_filters, z = convolve(conv=frozen), convolve(x.detach()), mlp()
    filters = [block.dwconv.weight, block.dwconv.bias]
    return {
        "convolution": torch.no_grad()(convolve),
        "its input's gradient": lambda: gradients(of_input, [x], stage.g),
        "its filters' gradient": lambda: gradients(of_filters, filters, stage.g),
        "MLP": torch.no_grad()(mlp),
        "MLP's gradients": lambda: gradients(z, [x, *mlp_parameters(block)], stage.g),
    }


def mlp_parameters(block: Block) -> list[Tensor]:
    """The parameters of the MLP, in the order of `FusedMLP`, which takes GRN's as vectors."""
    norm, first, second = ((m.weight, m.bias) for m in (block.norm, block.pwconv1, block.pwconv2))
    return [*norm, *first, block.grn.gamma, block.grn.beta, *second]


def gradients(y: Tensor, inputs: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `inputs`; the graph stays, for the next call."""
    return torch.autograd.grad(y, inputs, g.reshape(y.shape).to(y.dtype), retain_graph=True)


def difference(found: Run, truth: Run) -> float:
    """Mean relative difference (norm) over the tensors that both return."""
    a, b = (x if isinstance(x, tuple) else (x,) for x in (found(), truth()))
    off = [
        float((p.float().flatten() - q.flatten()).norm() / q.norm())
        for p, q in zip(a, b, strict=True)
    ]
    return sum(off) / len(off)


def measure(stage: Stage, report: timing.Report, triton: bool, rounds: int) -> list[list[object]]:
    """A row per part of the block; without Triton, of torch's kernels alone."""
    device, n, b, c = stage.x.device, len(stage.x), stage.b, stage.x.shape[-1]
    truth, theirs = torchs(stage.to(torch.float32)), torchs(stage)
    mine, rows = ours(stage) if triton else {}, []
    for part, peer in theirs.items():
        calls, off = {"torch's": peer}, [None, difference(peer, truth[part])]
        if triton:
            calls["ours"] = mine[part]
            off[0] = difference(mine[part], truth[part])
            if not off[0] <= 2 * off[1] + 1e-4:
                report.doubt(f"{part}, b={b}: wrong by {off[0]:.2g}, torch's by {off[1]:.2g}")
        taken = timing.device_times(calls, device, rounds)
        own, moved = taken.get("ours"), UNITS[part] * stage.x.nbytes / 1e9
        times = [1e6 * own if own else None, 1e6 * taken["torch's"]]
        ratios = [taken["torch's"] / own, moved / own] if own else [None, None]
        rows.append([part, n, b, c, *times, *ratios, *off])
    return rows


def main() -> None:
    parser = timing.parser(__doc__.splitlines()[0], rounds=20)
    for name, default, meaning in (
        ("--sides", [8, 4, 2, 1], "cells along the side of a patch, one for each stage"),
        ("--dims", [128, 256, 512, 1024], "channels, one for each of --sides"),
    ):
        parser.add_argument(name, type=int, nargs="+", default=default, help=meaning)
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images per step (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="bf16",
        help="dtype of activations (default: %(default)s)",
    )
    args = parser.parse_args()
    device = timing.settle(args)
    report = timing.Report("Blocks of ConvNeXt V2: the Triton kernels against torch's", args)
    problem = without_triton(device)
    outcome = problem or failure(device)
    if outcome and not problem:
        report.doubt(outcome)
    x = torch.zeros(2**28 if device.type == "cuda" else 2**20, device=device)  # 1 GiB, 4 MiB
    seconds = timing.device_times({"copy": x.clone}, device, args.rounds)["copy"]
    copied = 2 * x.nbytes / seconds / 1e9
    del x
    first = [
        ["trial of the Triton kernels", outcome or "right"],
        ["copying a tensor, GB/s", copied],
    ]
    report.table("Before", ["what", "result"], first)
    rows = []
    for b, c in zip(args.sides, args.dims, strict=True):
        stage = build(b, c, args.batch_size, device).to(PRECISIONS[args.precision])
        rows += measure(stage, report, not outcome, args.rounds)
    columns = ["part", "images", "b", "channels", "ours, µs", "torch's, µs", "× torch's", "GB/s"]
    columns += ["difference from fp32", "torch's"]
    report.table(f"Parts of a block, {args.precision}", columns, rows)
    report.close()


if __name__ == "__main__":
    main()
