"""Which images every process sees in which micro-batch: a function of (seed, epoch) alone."""

from collections.abc import Iterator

import numpy as np

from util.distributed import Place
from util.errors import BadInput
from util.seeding import ORDER, generator


class GlobalBatchSampler:
    """A batch sampler that yields this process's micro-batches as lists of (epoch, index).

    An epoch's order is a permutation, filled up from its own beginning to whole global batches
    (batch_size × accum × processes), and cut into them before it is shared out: every step is full,
    every image is seen, and with the global batch kept the images of a step do not depend on the
    number of processes.
    """

    def __init__(
        self, count: int, batch_size: int, accum: int = 1, place: Place | None = None, seed: int = 0
    ) -> None:
        """Raises BadInput when `count` images are fewer than one global batch."""
        self.place = place or Place()
        self.count, self.batch_size, self.accum, self.seed = count, batch_size, accum, seed
        self.global_batch = batch_size * accum * self.place.world
        if count < self.global_batch:
            raise BadInput(
                f"--data_path holds {count} images, fewer than one global batch: --batch_size "
                f"{batch_size} × --accum_iter {accum} × {self.place.world} processes = "
                f"{self.global_batch}; lower one of them"
            )
        self.steps = -(-count // self.global_batch)  # optimizer steps an epoch
        self.epoch = self.first_step = 0

    def start_at(self, epoch: int, step: int = 0) -> None:
        """What the next iteration yields: an epoch from one of its optimizer steps on."""
        self.epoch, self.first_step = epoch, step

    def order(self) -> np.ndarray:
        """The epoch's image numbers, (steps * global_batch,)."""
        order = generator(ORDER, self.seed, self.epoch).permutation(self.count)
        return np.concatenate([order, order[: self.steps * self.global_batch - self.count]])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        parts = self.order().reshape(self.steps, self.accum, self.place.world, self.batch_size)
        for micro_batch in parts[self.first_step :, :, self.place.rank].reshape(
            -1, self.batch_size
        ):
            yield [(self.epoch, int(index)) for index in micro_batch]

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accum
