"""Depthwise convolution of whole images with torch's kernels, always channels last.

Its backward pass is an operator of torch's, `torch.ops.sfer`, which torch.compile treats as a unit.
Otherwise it would choose the memory layout itself, by the strides of a filter gradient (C, 1, 7, 7)
which fit both layouts: it takes channels first, that is, transposes whole maps and uses slower
kernels. DDP, too, expects a gradient to have the strides of its parameter.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

GRADIENTS = "sfer::depthwise_gradients"
torch.library.define(
    GRADIENTS, "(Tensor g, Tensor x, Tensor weight, bool[3] wanted) -> (Tensor, Tensor, Tensor)"
)
Three = tuple[Tensor, Tensor, Tensor]


@torch.library.impl(GRADIENTS, "default")
def depthwise_gradients(g: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Three:
    """Upstream gradient and input (N, H, W, C), filters (C, 1, k, k) -> of input, filters, bias.

    Those that are not wanted are empty tensors.
    """
    dx, dweight, dbias = backward(g.contiguous(), x.contiguous(), weight, wanted)
    return (
        dx.permute(0, 2, 3, 1).contiguous() if wanted[0] else x.new_empty(0),
        dweight.flatten(1).contiguous().view(weight.shape) if wanted[1] else x.new_empty(0),
        dbias if wanted[2] else x.new_empty(0),
    )


@torch.library.register_fake(GRADIENTS)
def _(g: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Three:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(s if want else 0) for s, want in zip(shapes, wanted, strict=True))


def backward(g: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    """The same with maps (N, C, H, W), in whichever strides torch's kernels return."""
    c, _, k, _ = weight.shape
    options = ([c], [1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], c, wanted)
    maps = (t.permute(0, 3, 1, 2) for t in (g, x))
    return torch.ops.aten.convolution_backward(*maps, weight, *options)


class DenseDepthwise(torch.autograd.Function):
    """(N, H, W, C), filters (C, 1, k, k), k odd, bias (C,) -> (N, H, W, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return depthwise_forward(x, weight, bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad)
        found = torch.ops.sfer.depthwise_gradients(g, *ctx.saved_tensors, wanted)
        return tuple(x if want else None for x, want in zip(found, wanted, strict=True))


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The forward pass alone, with torch's gradients, such as for exports."""
    y = F.conv2d(
        x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)
    )
    return y.permute(0, 2, 3, 1)
