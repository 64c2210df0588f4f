"""Randomness as a function of position.

Nothing random depends on hidden generator state: every random number comes from a generator made
for its position – (seed, epoch) for an epoch's order, (seed, epoch, index) for a sample's crop,
flip and mask noise. A run can therefore stop anywhere and resume bit for bit, and workers,
prefetching and the number of processes never change a result.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

# One independent stream per purpose, so that equal positions never share random numbers.
ORDER, SAMPLE, FACE, IDENTITY, FIGURE, STEP, BOOTSTRAP, SPLIT, AUGMENT = range(9)


def generator(stream: int, seed: int, major: int = 0, minor: int = 0) -> np.random.Generator:
    """The generator of position (major, minor), e.g. (epoch, index), in one stream of a seed.

    Philox is counter-based: the position *is* the counter, so nothing is hashed, no two positions
    overlap, and making one costs microseconds. All arguments are integers in [0, 2**64).
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, minor, major, 0]))


def seed_globals(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed the global generators of Python, NumPy and torch for one step of one rank.

    For library code that takes no generator (drop-path, mixup); called just before use.
    """
    import torch

    rng = generator(STEP, seed, epoch, step << 20 | rank)
    random.seed(int(rng.integers(2**63)))
    np.random.seed(int(rng.integers(2**32)))
    torch.manual_seed(int(rng.integers(2**63)))


@contextmanager
def borrowed_globals(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU) from `rng` within the block.

    Afterwards their states are restored: random numbers for a sample must not affect those for a
    step, whether both are in one process or not.
    """
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(rng.integers(2**63)))
    np.random.seed(int(rng.integers(2**32)))
    torch.default_generator.manual_seed(int(rng.integers(2**63)))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
