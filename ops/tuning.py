"""How the Triton kernels divide their work: the one table to tune.

Any values give right results; nothing here was measured. Tiles are chosen so that a thread loads 8
bytes or more at a time and uses at most 128 registers in bf16, and chunks so that there are several
programs per multiprocessor while the sums they write are few. Sizes do not depend on the GPU, so
neither does the order of sums.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """What a program holds at a time: a power of two each."""

    rows: int
    channels: int
    warps: int


# By b, the cells along the side of a patch; the rows are columns of b cells.
DEPTHWISE = {8: Tile(8, 64, 4), 4: Tile(8, 64, 4), 2: Tile(16, 64, 4), 1: Tile(16, 64, 4)}
HIDDEN = Tile(16, 128, 4)  # between the two linear layers
NORM_ELEMENTS = 2048  # in LayerNorm, which works on whole rows

# Rows whose sum is written at a time.
DEPTHWISE_CHUNK = 256
HIDDEN_CHUNK = 128
NORM_CHUNK = 8192  # divided by the number of channels, but at least 16 rows
