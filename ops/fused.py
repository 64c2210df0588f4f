"""ConvNeXt V2 blocks on packed cells: forward and backward for CUDA devices, with Triton kernels.

`TiledDepthwise` and `FusedMLP` equal `models_convnextv2.Block` up to the order of sums, and store
six tensors of the block's width, as the passes for CPUs in `ops.packed` do. Matrix products are
torch's; everything between them is one kernel, which is limited by memory and reads and writes as
little as possible.

Kernels are operators of torch's, `torch.ops.sfer`, so that torch.compile treats them as units. They
are defined here by the tensors that they return; `ops/triton_*.py`, imported at the first use, hold
the functions that fill these.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops import tuning
from ops.packed import Tiles, accumulation_dtype


def filled_by(module: str, changes: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Define an operator whose outputs are filled by `fill_<name>` in ops/<module>.py.

    The decorated function returns the outputs, unfilled. `changes`: the inputs written to.
    """

    def define(allocate: Callable) -> Callable:
        name = f"sfer::{allocate.__name__}"

        def run(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
            outputs = allocate(*inputs)
            fill = getattr(import_module(f"ops.{module}"), f"fill_{allocate.__name__}")
            fill(*inputs, *(outputs if isinstance(outputs, tuple) else (outputs,)))
            return outputs

        # torch.library.custom_op would do the same at three times the cost per call.
        torch.library.define(name, torch.library.infer_schema(allocate, mutates_args=changes))
        torch.library.impl(name, "default")(run)
        torch.library.register_fake(name)(allocate)
        return getattr(torch.ops.sfer, allocate.__name__).default

    return define


@filled_by("triton_depthwise")
def convolve_tiles(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    corners: Tensor,
    side: int,
    b: int,
) -> Tensor:
    """7×7 depthwise convolution, (R, C), taps (49, C), bias (C,), `Tiles` -> (R, C).

    Without a bias, the filters are flipped: this is the gradient of the input.
    """
    return torch.empty_like(x)


@filled_by("triton_depthwise")
def correlate_tiles(
    x: Tensor, g: Tensor, rows: Tensor, corners: Tensor, side: int, b: int
) -> Tensor:
    """Input and upstream gradient, (R, C) each, `Tiles` -> gradients of taps and bias.

    They are (chunks, 50, C), to be summed over chunks; the last of the 50 is that of the bias.
    """
    return sums_like(x, cdiv(len(x), tuning.DEPTHWISE_CHUNK), 50, x.shape[1])


@filled_by("triton_mlp")
def layer_norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(R, C) -> same. Unlike torch's on a GPU, it takes fp32 parameters for any dtype of y."""
    return torch.empty_like(y)


@filled_by("triton_mlp")
def layer_norm_backward(
    dz: Tensor, y: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(R, C) each -> dy, z = layer_norm(y), and gradients of weight and bias.

    These are (chunks, 2, C), to be summed over chunks.
    """
    r, c = y.shape
    chunks = cdiv(r, max(16, tuning.NORM_CHUNK // c))
    return torch.empty_like(y), torch.empty_like(y), sums_like(y, chunks, 2, c)


@filled_by("triton_mlp")
def cell_sums(h: Tensor, da: Tensor | None) -> Tensor:
    """(N, M, H) -> (N, chunks, H): GELU(h) times da, or itself, summed over cells."""
    n, m, width = h.shape
    return sums_like(h, n, cdiv(m, tuning.HIDDEN_CHUNK), width)


@filled_by("triton_mlp")
def grn(sums: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares (N, chunks, H) -> each channel's norm, and its factor, (N, H) each."""
    n, _, width = sums.shape
    return sums.new_empty(n, width), sums.new_empty(n, width)


@filled_by("triton_mlp")
def grn_backward(sums: Tensor, energy: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dfactor (N, chunks, H), norms -> slope and gradients of gamma, (N, H) each.

    By way of the factor, dL/dGELU(h) gets slope * GELU(h).
    """
    return torch.empty_like(energy), torch.empty_like(energy)


@filled_by("triton_mlp")
def respond(h: Tensor, scale: Tensor, beta: Tensor) -> Tensor:
    """(N, M, H), factors (N, H), (H,) -> GELU(h) * scale + beta, the input of the second linear."""
    return torch.empty_like(h)


@filled_by("triton_mlp", changes=("da",))
def respond_backward(
    h: Tensor, da: Tensor, scale: Tensor, slope: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Turns da, the gradient of `respond`'s output, into that of h; -> that output, and sums.

    These are (N, chunks, H), of dL/dh over the cells of a chunk.
    """
    n, m, width = h.shape
    return torch.empty_like(h), sums_like(h, n, cdiv(m, tuning.HIDDEN_CHUNK), width)


def sums_like(x: Tensor, *shape: int) -> Tensor:
    """An unfilled tensor for sums of x's values."""
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


class TiledDepthwise(torch.autograd.Function):
    """7×7 depthwise convolution, (R, C), filters (C, 1, 7, 7), bias (C,) -> (R, C).

    The gradient of the input is the convolution with flipped filters.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, near: Tiles) -> Tensor:
        taps = weight.flatten(1).t().contiguous()  # so that channels are read side by side
        ctx.save_for_backward(x, taps)
        ctx.near = near
        return convolve_tiles(x, taps, bias, *near)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, taps = ctx.saved_tensors
        g = g.contiguous()
        dx = convolve_tiles(g, taps, None, *ctx.near)
        sums = correlate_tiles(x, g, *ctx.near).sum(0)
        return dx, sums[:49].t().reshape(-1, 1, 7, 7), sums[49], None


class FusedMLP(torch.autograd.Function):
    """LayerNorm, linear, GELU, GRN, linear: (N, M, C) -> same, M cells per image.

    Only the inputs of the MLP and of GELU are stored; the backward pass computes the rest again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        w1: Tensor,
        b1: Tensor,
        gamma: Tensor,
        beta: Tensor,
        w2: Tensor,
        b2: Tensor,
    ) -> Tensor:
        n, m, c = y.shape
        y, w1, w2 = y.reshape(-1, c), w1.to(y.dtype), w2.to(y.dtype)
        z = layer_norm(y, norm_weight, norm_bias)
        h = torch.addmm(b1.to(y.dtype), z, w1.t()).view(n, m, -1)
        energy, scale = grn(cell_sums(h, None), gamma)
        ctx.save_for_backward(y, norm_weight, norm_bias, w1, h, energy, scale, gamma, beta, w2)
        a = respond(h, scale, beta).flatten(0, 1)
        return torch.addmm(b2.to(y.dtype), a, w2.t()).view(n, m, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        y, norm_weight, norm_bias, w1, h, energy, scale, gamma, beta, w2 = ctx.saved_tensors
        n, m, c = g.shape
        g = g.reshape(-1, c)
        da = (g @ w2).view_as(h)
        slope, dgamma = grn_backward(cell_sums(h, da), energy, gamma)
        a, db1 = respond_backward(h, da, scale, slope, beta=beta)
        dh, db2 = da.flatten(0, 1), g.sum(0)
        dw2, dbeta = g.t() @ a.flatten(0, 1), db2 @ w2
        dy, z, dnorm = layer_norm_backward(dh @ w1, y, norm_weight, norm_bias)
        dnorm_weight, dnorm_bias = dnorm.sum(0)
        db1, dgamma = db1.sum((0, 1)), dgamma.sum(0)
        return dy.view(n, m, c), dnorm_weight, dnorm_bias, dh.t() @ z, db1, dgamma, dbeta, dw2, db2
