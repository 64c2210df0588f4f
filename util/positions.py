"""MAE's fixed position embedding."""

import torch
from torch import Tensor


def sincos_position_embedding(dim: int, grid: int, full: int | None = None) -> Tensor:
    """(1, 1 + grid*grid, dim): zeros for the class token, then the patches row by row.

    Positions are the centres of the patches in units of a grid of `full` (default: `grid`) patches
    per side over the same image: 0 … grid - 1 if both are equal. The first half of the channels
    encodes the column, the second the row (the official code's order); each half is sine then
    cosine of position / 10000^(2i/half).
    """
    quarter = dim // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    places = (torch.arange(grid, dtype=torch.float64) + 0.5) * ((full or grid) / grid) - 0.5
    row, column = torch.meshgrid(places, places, indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim), patches.float()])[None]
