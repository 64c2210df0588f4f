"""ConvNeXt V2 blocks on packed cells: finding neighbours, and forward and backward for CPUs.

Those for CUDA devices are in `ops.fused`.

`Depthwise` and `MLP` equal `models_convnextv2.Block` up to the order of sums. On a CPU, torch's
gradient of a depthwise convolution is by far the slowest part, and autograd stores about fourteen
tensors of the block's width per block; this stores six.

Each cell is a row of an (R, C) matrix, R = N*V*b*b, ordered by image, then patch. A *window* is a
square of cells with a border of the three cells that a 7×7 filter reaches. Tables of row numbers,
built once per batch and stage, list the cells of each window; a row of zeros, appended after the
last, stands for cells that are masked or outside the image.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

REACH = 3  # cells that a 7×7 filter reaches on each side
# Bytes of upstream gradient that `correlate` uses as filters at a time: small enough that they and
# their windows stay in the cache.
CHUNK = 400_000


class DenseCanvas(NamedTuple):
    """For torch's convolution: where each row lies on the full map, whose masked cells are zero."""

    cells: Tensor  # (R,): flat index of each row into (N, side, side)
    side: int


class Windows(NamedTuple):
    rows: Tensor  # (W, s + 6, s + 6): row numbers of the cells of each window and its border
    inner: Tensor  # (W, s, s): the same without the border
    places: Tensor | None  # (R,): index of each row among the windows' cells; None: same order


class Neighbours(NamedTuple):
    """The windows that `Depthwise` works on."""

    convolved: Windows  # for the output and the gradient of the input
    correlated: Windows  # for the gradient of the filters


class Tiles(NamedTuple):
    """For Triton's kernels: where the neighbours of each cell lie."""

    # (N * side * side,), int32: the row of each cell of each image, with a border of three cells;
    # -1 for masked cells and the border.
    rows: Tensor
    corners: Tensor  # (N*V,), int32: the place in `rows` where each patch's border begins
    side: int
    b: int


class WholeImages(NamedTuple):
    """For Triton's kernels: torch convolves, as every cell is there."""


def on_canvas(visible: Tensor, grid: int, b: int) -> DenseCanvas:
    """See `ops.choice.find_neighbours`."""
    top, left = corners(visible, grid, b)
    cell = torch.arange(b, device=visible.device)
    image = torch.arange(len(visible), device=visible.device).view(-1, 1, 1, 1)
    cells = (image * grid * b + top + cell.view(b, 1)) * grid * b + left + cell
    return DenseCanvas(cells.flatten(), grid * b)


def in_windows(visible: Tensor, grid: int, b: int) -> Neighbours:
    """See `ops.choice.find_neighbours`."""
    n, v = visible.shape
    cells, side = on_canvas(visible, grid, b)
    own = torch.arange(len(cells))
    table = torch.full((n * side * side,), len(cells)).index_copy(0, cells, own)
    table = F.pad(table.view(n, side, side), 4 * (REACH,), value=len(cells))
    top, left = corners(visible, grid, b)
    cell = torch.arange(b + 2 * REACH)
    around = table[torch.arange(n).view(n, 1, 1, 1), top + cell.view(-1, 1), left + cell]
    patches = Windows(around.flatten(0, 1), own.view(n * v, b, b), None)
    images = Windows(table, table[:, REACH:-REACH, REACH:-REACH].contiguous(), cells)
    # A window of a small patch is mostly border: there whole images are less work.
    return Neighbours(patches if b > 2 else images, patches if b > 1 else images)


def in_tiles(visible: Tensor, grid: int, b: int) -> Tiles:
    """See `ops.choice.find_neighbours`."""
    n, width = len(visible), grid * b
    cells = on_canvas(visible, grid, b).cells
    own = torch.arange(len(cells), dtype=torch.int32, device=cells.device)
    rows = own.new_full((n * width * width,), -1).index_copy(0, cells, own)
    rows = F.pad(rows.view(n, width, width), 4 * (REACH,), value=-1)
    side = width + 2 * REACH
    top, left = corners(visible, grid, b)
    image = torch.arange(n, device=cells.device).view(n, 1, 1, 1)
    first = (image * side + top) * side + left
    return Tiles(rows.flatten(), first.flatten().int(), side, b)


def corners(visible: Tensor, grid: int, b: int) -> tuple[Tensor, Tensor]:
    """The first row and column of cells of each patch, (N, V, 1, 1) each."""
    visible = visible[:, :, None, None]
    return visible // grid * b, visible % grid * b


class Depthwise(torch.autograd.Function):
    """7×7 depthwise convolution, (R, C), filters (C, 1, 7, 7), bias (C,) -> (R, C).

    The gradient of the input is the convolution with flipped filters. The gradient of the filters
    is a convolution as well: the windows are its channels and the upstream gradient its filters.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, near: Neighbours) -> Tensor:
        x, weight = with_zero_row(x), weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.near = near
        return convolve_windows(x, weight, bias.to(x.dtype), near.convolved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dbias, g = g.sum(0), with_zero_row(g)
        dx = convolve_windows(g, weight.flip(2, 3), None, ctx.near.convolved)
        return dx, correlate(x, g, ctx.near.correlated), dbias, None


def with_zero_row(x: Tensor) -> Tensor:
    """(R, C) -> (R + 1, C), with a last row of zeros."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def convolve_windows(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows) -> Tensor:
    """(R + 1, C), filters (C, 1, 7, 7) -> (R, C)."""
    count, side, _ = windows.rows.shape
    x = x.index_select(0, windows.rows.view(-1)).view(count, side, side, -1).permute(0, 3, 1, 2)
    y = F.conv2d(x, weight, bias, groups=len(weight)).permute(0, 2, 3, 1).flatten(0, 2)
    return y if windows.places is None else y.index_select(0, windows.places)


def correlate(x: Tensor, g: Tensor, windows: Windows) -> Tensor:
    """Input and upstream gradient, (R + 1, C) each -> gradient of the filters, (C, 1, 7, 7)."""
    c, s = x.shape[1], windows.inner.shape[1]
    total = torch.zeros(49, c, dtype=accumulation_dtype(x.dtype))
    share = max(1, CHUNK // (s * s * c * x.element_size()))
    for rows, inner in zip(windows.rows.split(share), windows.inner.split(share), strict=True):
        # (s + 6, s + 6, W, C) and (s, s, W, C): W*C groups, one per window and channel.
        a = x.index_select(0, rows.permute(1, 2, 0).flatten()).view(1, s + 6, s + 6, -1)
        b = g.index_select(0, inner.permute(1, 2, 0).flatten()).view(s, s, 1, -1)
        y = F.conv2d(a.permute(0, 3, 1, 2), b.permute(3, 2, 0, 1), groups=len(rows) * c)
        # Sums in fp32 and rounds; with `dtype=`, torch would first convert a copy of y.
        total += y.permute(0, 2, 3, 1).reshape(49, len(rows), c).sum(1)
    return total.t().reshape(c, 1, 7, 7)


class MLP(torch.autograd.Function):
    """LayerNorm, linear, GELU, GRN, linear: (N, M, C) -> same, M cells per image.

    GRN multiplies each image's channels by a factor and adds the bias beta. Only the inputs of the
    MLP and of GELU are stored; the backward pass computes GELU again.
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
        w1, narrow_w2 = w1.to(y.dtype), w2.to(y.dtype)
        z, mean, rstd = torch.native_layer_norm(y, [c], norm_weight, norm_bias, 1e-6)
        h = torch.addmm(b1.to(y.dtype), z.view(-1, c), w1.t()).view(n, m, -1)
        a = F.gelu(h)
        energy = (a * a).sum(1).to(w2.dtype).sqrt()
        scale = 1 + gamma * response(energy)
        ctx.save_for_backward(
            y, mean, rstd, norm_weight, norm_bias, h, energy, w1, gamma, beta, w2, narrow_w2
        )
        if by_image(y):
            bias = torch.addmv(b2, w2, beta).to(y.dtype)
            return torch.baddbmm(bias, a, scaled(w2, scale, a).mT)
        a = torch.addcmul(beta.to(a.dtype), a, like(scale, a), out=a)
        return torch.addmm(b2.to(y.dtype), a.flatten(0, 1), narrow_w2.t()).view(n, m, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        y, mean, rstd, norm_weight, norm_bias, h, energy, w1, gamma, beta, w2, narrow_w2 = (
            ctx.saved_tensors
        )
        n, m, c = y.shape
        a, r = F.gelu(h), response(energy)
        scale, dbias = 1 + gamma * r, g.sum((0, 1))
        if by_image(y):
            # dL/dscale is a sum over cells, which is cheaper to take from each image's products.
            products = torch.bmm(g.mT, a).to(w2.dtype)
            dscale, dw2 = (products * w2).sum(1), (products * scale[:, None]).sum(0)
            dw2.addr_(dbias.to(w2.dtype), beta)
            da = torch.bmm(g, scaled(w2, scale, a))
        else:
            da = (g.reshape(-1, c) @ narrow_w2).view(n, m, -1)
            dscale = (da * a).sum(1).to(w2.dtype)
            responded = torch.addcmul(beta.to(a.dtype), a, like(scale, a)).flatten(0, 1)
            dw2 = g.reshape(-1, c).t() @ responded
            da.mul_(like(scale, a))
        dr, mean_energy = dscale * gamma, energy.mean(1, keepdim=True) + 1e-6
        denergy = (dr - (dr * energy).mean(1, keepdim=True) / mean_energy) / mean_energy
        da.addcmul_(a, like(torch.where(energy > 0, denergy / energy, 0), a))
        dh = torch.ops.aten.gelu_backward.grad_input(da, h, grad_input=da).flatten(0, 1)
        z = torch.native_layer_norm(y, [c], norm_weight, norm_bias, 1e-6)[0].view(-1, c)
        dy, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
            (dh @ w1).view(n, m, c), y, [c], mean, rstd, norm_weight, norm_bias, [True] * 3
        )
        dgamma, dbeta = (dscale * r).sum(0), dbias @ narrow_w2
        return dy, dnorm_weight, dnorm_bias, dh.t() @ z, dh.sum(0), dgamma, dbeta, dw2, dbias


def by_image(y: Tensor) -> bool:
    """Whether it is less work to scale the second linear's weights per image than its inputs."""
    return y.shape[1] > 2 * y.shape[2]


def scaled(w2: Tensor, scale: Tensor, a: Tensor) -> Tensor:
    """Weights (C, 4C), factors (N, 4C) -> each image's second linear, (N, C, 4C), in a's dtype."""
    return (w2 * scale[:, None]).to(a.dtype)


def like(x: Tensor, a: Tensor) -> Tensor:
    """(N, 4C) -> (N, 1, 4C) in the dtype of `a`."""
    return x[:, None].to(a.dtype)


def response(energy: Tensor) -> Tensor:
    """GRN: each channel's norm divided by the mean norm over channels, (N, 4C) -> same."""
    return energy / (energy.mean(1, keepdim=True) + 1e-6)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for accumulating sums: at least fp32."""
    return torch.promote_types(dtype, torch.float32)
