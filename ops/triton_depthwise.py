"""Triton kernels of the 7×7 depthwise convolution of packed patches: see `ops.fused`.

No map of the whole image is built. `rows` is the table of `ops.packed.Tiles`: it says in which row
of the packed matrix (R, C) each cell of an image lies, -1 for masked cells and outside the image.

A *column* is the b cells of a patch below each other. A program holds COLUMNS of them side by side,
of one patch and then the next, and CHANNELS of their channels. It walks from top to bottom and uses
each value that it loads for all (up to seven) cells whose filters reach it. Sums are fp32 (fp64 for
fp64), in a fixed order and without atomics, so results are the same each time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import tuning
from ops.fused import cdiv


@triton.jit
def load_cells(x, row, c, C: tl.constexpr, SUM: tl.constexpr):
    """Rows (K,), -1 for zeros, and channels (c,) of x (R, C) -> (K, c) as SUM."""
    here = (row >= 0)[:, None] & (c < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    return tl.load(x + at, mask=here, other=0).to(SUM)


@triton.jit
def find_columns(corners, column, patches, B: tl.constexpr):
    """Columns (K,) -> the row of the first cell, the place of the first neighbour, and which exist.

    The row of cell i is B*i further. Neighbours are in the table of rows, from the upper left one.
    """
    patch, across = column // B, column % B
    exists = patch < patches
    first = patch * (B * B) + across
    return first, tl.load(corners + patch, mask=exists, other=0) + across, exists


@triton.jit
def convolve_kernel(
    x,  # (R, C)
    taps,  # (49, C)
    bias,  # (C,), or None: flip the filter, for the gradient of the input
    y,  # (R, C)
    rows,  # (N * side * side,)
    corners,  # (patches,)
    side,
    patches,
    C: tl.constexpr,
    B: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
):
    """y[row] = bias + the sum over 49 taps of x[the row that the table names] * tap."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first, corner, exists = find_columns(corners, column, patches, B)
    sums = (tl.zeros((COLUMNS, CHANNELS), SUM),) * B  # of each cell of the columns
    for right in range(7):
        filters = ()  # the seven taps of this column of the filter
        for down in tl.static_range(7):
            tap = 7 * down + right
            if bias is None:
                tap = 48 - tap
            filters += (tl.load(taps + tap * C + c, mask=c < C, other=0).to(SUM)[None, :],)
        for i in tl.static_range(B + 6):
            row = tl.load(rows + corner + i * side + right, mask=exists, other=-1)
            value, updated = load_cells(x, row, c, C, SUM=SUM), ()
            for j in tl.static_range(B):
                if i - j >= 0 and i - j < 7:
                    updated += (sums[j] + value * filters[i - j],)
                else:
                    updated += (sums[j],)
            sums = updated
    for j in tl.static_range(B):
        total = sums[j]
        if bias is not None:
            total += tl.load(bias + c, mask=c < C, other=0).to(SUM)[None, :]
        at = (first + B * j).to(tl.int64)[:, None] * C + c[None, :]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=exists[:, None] & (c < C)[None, :])


@triton.jit
def correlate_kernel(
    x,  # (R, C)
    g,  # (R, C)
    sums,  # (chunks, 50, C)
    rows,  # (N * side * side,)
    corners,  # (patches,)
    side,
    patches,
    C: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
):
    """sums[chunk, tap] = the sum over the chunk's cells of x[the row that the table names] * g.

    A program computes seven taps below each other. Place 49 gets the sum of g.
    """
    # Programs that read the same cells run at the same time: the cache serves six of seven.
    right, chunk = tl.program_id(0) % 7, tl.program_id(0) // 7
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    products = (tl.zeros((COLUMNS, CHANNELS), SUM),) * 7
    total = tl.zeros((COLUMNS, CHANNELS), SUM)
    for step in range(STEPS):
        column = (chunk * STEPS + step) * COLUMNS + tl.arange(0, COLUMNS)
        first, corner, exists = find_columns(corners, column, patches, B)
        upstream = ()
        for j in tl.static_range(B):
            value = load_cells(g, tl.where(exists, first + B * j, -1), c, C, SUM=SUM)
            upstream += (value,)
            total += value
        for i in tl.static_range(B + 6):
            row = tl.load(rows + corner + i * side + right, mask=exists, other=-1)
            value, updated = load_cells(x, row, c, C, SUM=SUM), ()
            for down in tl.static_range(7):
                if i - down >= 0 and i - down < B:
                    updated += (products[down] + value * upstream[i - down],)
                else:
                    updated += (products[down],)
            products = updated
    sums += chunk * (50 * C) + c
    for down in tl.static_range(7):
        tl.store(sums + (7 * down + right) * C, tl.sum(products[down], 0), mask=c < C)
    if right == 0:
        tl.store(sums + 49 * C, tl.sum(total, 0), mask=c < C)


def fill_convolve_tiles(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    corners: Tensor,
    side: int,
    b: int,
    y: Tensor,
) -> None:
    """See `ops.fused.convolve_tiles`."""
    c, tile = x.shape[1], tuning.DEPTHWISE[b]
    grid = cdiv(len(x), b * tile.rows), cdiv(c, tile.channels)
    sizes = side, len(corners), c, b
    convolve_kernel[grid](x, taps, bias, y, rows, corners, *sizes, **options(x, tile))


def fill_correlate_tiles(
    x: Tensor, g: Tensor, rows: Tensor, corners: Tensor, side: int, b: int, sums: Tensor
) -> None:
    """See `ops.fused.correlate_tiles`."""
    c, tile = x.shape[1], tuning.DEPTHWISE[b]
    steps = cdiv(len(x), len(sums) * b * tile.rows)
    grid = 7 * len(sums), cdiv(c, tile.channels)
    sizes = side, len(corners), c, b, steps
    correlate_kernel[grid](x, g, sums, rows, corners, *sizes, **options(x, tile))


def options(x: Tensor, tile: tuning.Tile) -> dict[str, Any]:
    """The last arguments of both kernels."""
    how = {"num_warps": tile.warps, "enable_fp_fusion": True}
    return {"COLUMNS": tile.rows, "CHANNELS": tile.channels, "SUM": sum_dtype(x), **how}


def sum_dtype(x: Tensor) -> tl.dtype:
    """The dtype for accumulating sums of x."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
