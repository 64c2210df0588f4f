"""ResNet stages on the visible cells only, as matrix products, for CPUs.

Equal to `models_resnet` up to the order of sums. Each visible cell of a feature map is a row of an
(R, C) matrix. A convolution gathers the 3×3 inputs of every output cell into one long row and
multiplies by the filters; a row of zeros stands for masked cells and the border. Torch's
convolution computes all cells, and is slow on the small maps of the late stages.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models_masked import matmul_dtype
from ops.packed import DenseCanvas, with_zero_row

Layer = Callable[[Tensor, nn.Conv2d, nn.BatchNorm2d], Tensor]
K = 3  # side length of a filter


class Taps(NamedTuple):
    """Index tables of a 3×3 convolution from one map to another; a tap is one input it reads."""

    inputs: Tensor  # (R_out, 9): the input rows that each output row reads
    outputs: Tensor  # (R_in, 9): the taps, of R_out * 9 in order, that read each input row


def find_taps(fine: DenseCanvas, coarse: DenseCanvas, images: int, stride: int) -> Taps:
    """The taps of a convolution from the map `fine` to `coarse`, zero-padded by one cell."""
    rows, side = len(fine.cells), fine.side
    own = torch.arange(rows, device=fine.cells.device)
    table = own.new_full((images * side**2,), rows).index_copy(0, fine.cells, own)
    table = F.pad(table.view(images, side, side), (1, 1, 1, 1), value=rows)
    image, cell = coarse.cells // coarse.side**2, coarse.cells % coarse.side**2
    top, left = (stride * at[:, None, None] for at in (cell // coarse.side, cell % coarse.side))
    tap = torch.arange(K, device=own.device)
    inputs = table[image[:, None, None], top + tap[:, None], left + tap].flatten(1)
    outputs = inputs.new_full((rows + 1, K * K), inputs.numel())
    number = torch.arange(inputs.numel(), device=own.device)
    outputs[inputs.flatten(), number % (K * K)] = number
    return Taps(inputs, outputs[:-1])


class Convolution(torch.autograd.Function):
    """3×3 convolution, (R_in, C), filters (D, C, 3, 3) -> (R_out, D).

    To save memory, the gathered input is not stored but gathered again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, taps: Taps) -> Tensor:
        matrix = weight.permute(0, 2, 3, 1).flatten(1).to(x.dtype)
        ctx.save_for_backward(x, matrix)
        ctx.taps = taps
        return gather(x, taps) @ matrix.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        r, c = len(g), x.shape[1]
        dweight = (g.T @ gather(x, ctx.taps)).view(-1, K, K, c).permute(0, 3, 1, 2)
        of_taps = g.new_zeros(r * K * K + 1, c)  # the last row, of zeros, stands for absent taps
        torch.mm(g, matrix, out=of_taps[:-1].view(r, -1))
        dx = F.embedding_bag(ctx.taps.outputs, of_taps, mode="sum")
        return dx, dweight, None


def gather(x: Tensor, taps: Taps) -> Tensor:
    """(R_in, C) -> (R_out, 9 C)."""
    return with_zero_row(x).index_select(0, taps.inputs.flatten()).view(len(taps.inputs), -1)


def batch_norm(rows: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """(R, C) -> same: batch norm of each channel over all rows.

    Does not call `norm`, which requires 4-D input: reshaped to an image, torch returns wrong
    gradients for these rows.
    """
    if norm.training:
        norm.num_batches_tracked.add_(1)
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return F.batch_norm(rows, *statistics, norm.training, norm.momentum, norm.eps)


def layer_on_rows(before: DenseCanvas | None, after: DenseCanvas, images: int) -> Layer:
    """A convolution and batch norm for blocks that work on rows, within one stage.

    `before`: the map that the stage's first block downsamples, None if it does not downsample.
    """
    inside = find_taps(after, after, images, 1)
    down = find_taps(before, after, images, 2) if before else None

    def layer(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        reduces = conv.stride == (2, 2)
        if conv.kernel_size == (1, 1):
            if reduces:  # a 1×1 filter reads the centre of each 3×3 window
                x = with_zero_row(x).index_select(0, down.inputs[:, K * K // 2])
            return batch_norm(F.linear(x, conv.weight.flatten(1)), norm)
        x = x.to(matmul_dtype(x))
        return batch_norm(Convolution.apply(x, conv.weight, down if reduces else inside), norm)

    return layer
