"""Triton kernels for what lies between the matrix products of a block: see `ops.fused.FusedMLP`.

Each reads its inputs once. Statistics are fp32 (fp64 for fp64), whatever the dtype of the tensors,
and summed in two passes, without atomics: a program writes the sum over its cells, and the next
kernel, or torch, adds these sums up in a fixed order. H is the width of the hidden layer.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ops import tuning
from ops.fused import cdiv
from ops.triton_depthwise import sum_dtype

EPSILON = tl.constexpr(1e-6)  # of LayerNorm and GRN


@triton.jit
def gelu(h):
    """-> h Φ(h), and its derivative Φ(h) + h φ(h)."""
    below = 0.5 * (1 + tl.math.erf(h * 0.7071067811865476))
    return h * below, below + h * tl.exp(-0.5 * h * h) * 0.3989422804014327


@triton.jit
def standardise(y, here, C: tl.constexpr):
    """Rows (K, c), zero outside `here` -> with mean 0 and variance 1, and their factor (K, 1)."""
    centred = tl.where(here, y - tl.sum(y, 1, keep_dims=True) / C, 0)
    factor = 1 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / C + EPSILON)
    return centred * factor, factor


@triton.jit
def layer_norm_kernel(
    y,  # (R, C)
    weight,  # (C,)
    bias,  # (C,)
    z,  # (R, C)
    count,  # R
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # C, rounded up to a power of two
    SUM: tl.constexpr,
):
    """z = LayerNorm(y)."""
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    here = (row < count)[:, None] & (c < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    unit, _ = standardise(tl.load(y + at, mask=here, other=0).to(SUM), here, C)
    w = tl.load(weight + c, mask=c < C, other=0).to(SUM)
    b = tl.load(bias + c, mask=c < C, other=0).to(SUM)
    tl.store(z + at, (unit * w[None, :] + b[None, :]).to(z.dtype.element_ty), mask=here)


@triton.jit
def layer_norm_backward_kernel(
    dz,  # (R, C)
    y,  # (R, C)
    weight,  # (C,)
    bias,  # (C,)
    dy,  # (R, C)
    z,  # (R, C)
    sums,  # (chunks, 2, C)
    count,  # R
    C: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM: tl.constexpr,
):
    """The gradient dy, z = LayerNorm(y) once more, and sums of the gradients of weight and bias.

    A program handles STEPS * ROWS rows.
    """
    c = tl.arange(0, WIDTH)
    w = tl.load(weight + c, mask=c < C, other=0).to(SUM)[None, :]
    b = tl.load(bias + c, mask=c < C, other=0).to(SUM)[None, :]
    dweight, dbias = tl.zeros((ROWS, WIDTH), SUM), tl.zeros((ROWS, WIDTH), SUM)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        here = (row < count)[:, None] & (c < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        unit, factor = standardise(tl.load(y + at, mask=here, other=0).to(SUM), here, C)
        tl.store(z + at, (unit * w + b).to(z.dtype.element_ty), mask=here)
        g = tl.load(dz + at, mask=here, other=0).to(SUM)
        dweight += g * unit
        dbias += g
        g *= w
        mean = tl.sum(g, 1, keep_dims=True) / C
        along = tl.sum(g * unit, 1, keep_dims=True) / C
        tl.store(dy + at, (factor * (g - mean - unit * along)).to(dy.dtype.element_ty), mask=here)
    sums += tl.program_id(0) * (2 * C) + c
    tl.store(sums, tl.sum(dweight, 0), mask=c < C)
    tl.store(sums + C, tl.sum(dbias, 0), mask=c < C)


@triton.jit
def hidden_cells(step, m, c, H: tl.constexpr, K: tl.constexpr):
    """K cells and channels (c,) -> their places in (N, M, H), and which exist, (K, c) each."""
    cell = step * K + tl.arange(0, K)
    row = tl.program_id(2).to(tl.int64) * m + cell
    return row[:, None] * H + c[None, :], (cell < m)[:, None] & (c < H)[None, :]


@triton.jit
def store_sums(sums, total, c, H: tl.constexpr):
    """(K, c) summed over cells -> this program's place in (N, chunks, H)."""
    chunk = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + chunk * H + c, tl.sum(total, 0), mask=c < H)


@triton.jit
def cell_sums_kernel(
    h,  # (N, M, H)
    da,  # (N, M, H), or None
    sums,  # (N, chunks, H)
    m,
    H: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
):
    """sums = GELU(h) squared, or GELU(h) * da, summed over the cells of a chunk."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((CELLS, CHANNELS), SUM)
    for step in range(STEPS):
        at, here = hidden_cells(tl.program_id(1) * STEPS + step, m, c, H, K=CELLS)
        a, _ = gelu(tl.load(h + at, mask=here, other=0).to(SUM))
        if da is None:
            total += a * a
        else:
            total += a * tl.load(da + at, mask=here, other=0).to(SUM)
    store_sums(sums, total, c, H)


@triton.jit
def chunks_added(sums, c, H: tl.constexpr, CHUNKS: tl.constexpr, SUM: tl.constexpr):
    """This program's image of (N, chunks, H), summed over chunks, (c,)."""
    sums += tl.program_id(0) * (CHUNKS * H) + c
    total = tl.load(sums, mask=c < H, other=0).to(SUM)
    for chunk in range(1, CHUNKS):
        total += tl.load(sums + chunk * H, mask=c < H, other=0)
    return total


@triton.jit
def grn_kernel(
    sums,  # (N, chunks, H)
    gamma,  # (H,)
    energy,  # (N, H)
    scale,  # (N, H)
    H: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,  # H, rounded up to a power of two
    SUM: tl.constexpr,
):
    """GRN's statistics: a channel's norm, and 1 + gamma * that norm / its mean over channels."""
    c = tl.arange(0, WIDTH)
    e = tl.sqrt(chunks_added(sums, c, H, CHUNKS, SUM=SUM))
    response = e / (tl.sum(e, 0) / H + EPSILON)
    at = tl.program_id(0) * H + c
    tl.store(energy + at, e, mask=c < H)
    tl.store(scale + at, 1 + tl.load(gamma + c, mask=c < H, other=0) * response, mask=c < H)


@triton.jit
def grn_backward_kernel(
    sums,  # (N, chunks, H): dL/dscale of each chunk
    energy,  # (N, H)
    gamma,  # (H,)
    slope,  # (N, H)
    dgamma,  # (N, H)
    H: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM: tl.constexpr,
):
    """Through the statistics, dL/da gets slope * a. dgamma is the gradient from each image."""
    c = tl.arange(0, WIDTH)
    at = tl.program_id(0) * H + c
    dscale = chunks_added(sums, c, H, CHUNKS, SUM=SUM)
    e = tl.load(energy + at, mask=c < H, other=0)
    mean = tl.sum(e, 0) / H + EPSILON
    dresponse = dscale * tl.load(gamma + c, mask=c < H, other=0)
    denergy = (dresponse - tl.sum(dresponse * e, 0) / H / mean) / mean
    tl.store(slope + at, tl.where(e > 0, denergy / tl.where(e > 0, e, 1), 0), mask=c < H)
    tl.store(dgamma + at, dscale * e / mean, mask=c < H)


@triton.jit
def respond_kernel(
    h,  # (N, M, H)
    scale,  # (N, H)
    beta,  # (H,)
    out,  # (N, M, H)
    m,
    H: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
):
    """out = GRN(GELU(h)) = GELU(h) * scale + beta."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    s = tl.load(scale + tl.program_id(2) * H + c, mask=c < H, other=0)[None, :]
    b = tl.load(beta + c, mask=c < H, other=0).to(SUM)[None, :]
    for step in range(STEPS):
        at, here = hidden_cells(tl.program_id(1) * STEPS + step, m, c, H, K=CELLS)
        a, _ = gelu(tl.load(h + at, mask=here, other=0).to(SUM))
        tl.store(out + at, (a * s + b).to(out.dtype.element_ty), mask=here)


@triton.jit
def respond_backward_kernel(
    h,  # (N, M, H)
    da,  # (N, M, H): dL/dout; becomes dL/dh
    scale,  # (N, H)
    slope,  # (N, H)
    beta,  # (H,)
    out,  # (N, M, H)
    sums,  # (N, chunks, H)
    m,
    H: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
):
    """dL/dh and its sums over the cells of a chunk; and out = GRN(GELU(h)) once more."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    s = tl.load(scale + tl.program_id(2) * H + c, mask=c < H, other=0)[None, :]
    k = tl.load(slope + tl.program_id(2) * H + c, mask=c < H, other=0)[None, :]
    b = tl.load(beta + c, mask=c < H, other=0).to(SUM)[None, :]
    total = tl.zeros((CELLS, CHANNELS), SUM)
    for step in range(STEPS):
        at, here = hidden_cells(tl.program_id(1) * STEPS + step, m, c, H, K=CELLS)
        a, derivative = gelu(tl.load(h + at, mask=here, other=0).to(SUM))
        tl.store(out + at, (a * s + b).to(out.dtype.element_ty), mask=here)
        dh = (tl.load(da + at, mask=here, other=0).to(SUM) * s + a * k) * derivative
        tl.store(da + at, dh.to(da.dtype.element_ty), mask=here)
        total += dh
    store_sums(sums, total, c, H)


def fill_layer_norm(y: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> None:
    """See `ops.fused.layer_norm`."""
    r, c = y.shape
    rows = rows_at_a_time(c)
    layer_norm_kernel[(cdiv(r, rows),)](y, weight, bias, z, r, c, rows, **whole_rows(y))


def fill_layer_norm_backward(
    dz: Tensor, y: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, z: Tensor, sums: Tensor
) -> None:
    """See `ops.fused.layer_norm_backward`."""
    r, c = y.shape
    rows = rows_at_a_time(c)
    sizes = r, c, cdiv(r, len(sums) * rows), rows
    layer_norm_backward_kernel[(len(sums),)](
        dz, y, weight, bias, dy, z, sums, *sizes, **whole_rows(y)
    )


def rows_at_a_time(c: int) -> int:
    """How many rows of C channels a program of LayerNorm holds."""
    return max(1, tuning.NORM_ELEMENTS // triton.next_power_of_2(c))


def whole_rows(x: Tensor) -> dict[str, Any]:
    """The last arguments of kernels that hold whole rows of x (…, C)."""
    width = triton.next_power_of_2(x.shape[-1])
    warps = min(max(width // 512, 4), 16)
    return {"WIDTH": width, "SUM": sum_dtype(x), "num_warps": warps, "enable_fp_fusion": True}


def fill_grn(sums: Tensor, gamma: Tensor, energy: Tensor, scale: Tensor) -> None:
    """See `ops.fused.grn`."""
    n, chunks, width = sums.shape
    grn_kernel[(n,)](sums, gamma, energy, scale, width, chunks, **whole_rows(sums))


def fill_grn_backward(
    sums: Tensor, energy: Tensor, gamma: Tensor, slope: Tensor, dgamma: Tensor
) -> None:
    """See `ops.fused.grn_backward`."""
    n, chunks, width = sums.shape
    sizes = width, chunks
    grn_backward_kernel[(n,)](sums, energy, gamma, slope, dgamma, *sizes, **whole_rows(sums))


def fill_cell_sums(h: Tensor, da: Tensor | None, sums: Tensor) -> None:
    """See `ops.fused.cell_sums`."""
    over_cells(cell_sums_kernel, h, da, sums)


def fill_respond(h: Tensor, scale: Tensor, beta: Tensor, out: Tensor) -> None:
    """See `ops.fused.respond`."""
    over_cells(respond_kernel, h, scale, beta, out)


def fill_respond_backward(
    h: Tensor,
    da: Tensor,
    scale: Tensor,
    slope: Tensor,
    beta: Tensor,
    out: Tensor,
    sums: Tensor,
) -> None:
    """See `ops.fused.respond_backward`."""
    over_cells(respond_backward_kernel, h, da, scale, slope, beta, out, sums)


def over_cells(kernel: Any, h: Tensor, *tensors: Tensor | None) -> None:
    """Launch a kernel on chunks of cells and blocks of channels of h (N, M, H)."""
    n, m, width = h.shape
    tile, chunks = tuning.HIDDEN, cdiv(m, tuning.HIDDEN_CHUNK)
    kernel[cdiv(width, tile.channels), chunks, n](
        h,
        *tensors,
        m,
        width,
        cdiv(m, chunks * tile.rows),
        CELLS=tile.rows,
        CHANNELS=tile.channels,
        SUM=sum_dtype(h),
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
