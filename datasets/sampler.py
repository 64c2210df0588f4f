"""The images of each process's micro-batches, as a function of (seed, epoch) alone."""

from collections.abc import Iterator

import numpy as np

from util.distributed import ProcessInfo
from util.errors import BadInput
from util.seeding import ORDER, generator


class GlobalBatchSampler:
    """A batch sampler that yields this process's micro-batches as lists of (epoch, index).

    The order of an epoch is a permutation of the images, or `repeats` permutations in a row. It is
    padded from its own beginning to whole global batches (batch_size × accum × processes) and cut
    into these before they are shared among the processes. So every step is full, every image is
    seen, and with the same global batch any number of processes sees the same images in each step.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        accum: int = 1,
        process: ProcessInfo | None = None,
        seed: int = 0,
        balance: np.ndarray | None = None,
        repeats: int = 1,
    ) -> None:
        """`balance`: the images' labels (count,), if an epoch is to draw every class equally often.

        Raises BadInput if `count` images are fewer than one global batch.
        """
        self.process, self.balance, self.repeats = process or ProcessInfo(), balance, repeats
        self.count, self.batch_size, self.accum, self.seed = count, batch_size, accum, seed
        self.global_batch = batch_size * accum * self.process.world
        if count < self.global_batch:
            raise BadInput(
                f"--data_path holds {count} images, fewer than one global batch: --batch_size "
                f"{batch_size} × --accum_iter {accum} × {self.process.world} processes = "
                f"{self.global_batch}; lower one of them"
            )
        self.steps = -(-count * repeats // self.global_batch)  # optimizer steps per epoch
        self.epoch = self.first_step = 0

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration begin at an optimizer step of an epoch."""
        self.epoch, self.first_step = epoch, step

    def order(self) -> np.ndarray:
        """The epoch's draws, (steps * global_batch,).

        As in `balanced_order`, draw i + k * count is the k-th repetition of image i.
        """
        rng, passes, drawn = generator(ORDER, self.seed, self.epoch), [], 0
        for _ in range(self.repeats):
            if self.balance is None:
                order = rng.permutation(self.count)
            else:
                order = balanced_order(self.balance, rng)
            passes.append(order + drawn * self.count)
            drawn += 1 + int(order.max()) // self.count
        order = np.concatenate(passes)
        return np.concatenate([order, order[: self.steps * self.global_batch - len(order)]])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        parts = self.order().reshape(self.steps, self.accum, self.process.world, self.batch_size)
        for micro_batch in parts[self.first_step :, :, self.process.rank].reshape(
            -1, self.batch_size
        ):
            yield [(self.epoch, int(index)) for index in micro_batch]

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accum


def balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many draws as there are images (n,), of every class equally many (to within one).

    Large classes are sampled without repetition, small ones are repeated as often as needed. Draw
    i + k * n is the k-th repetition of image i, so that each can be augmented differently.
    """
    n, classes = len(labels), np.unique(labels)
    quotas = np.full(len(classes), n // len(classes))
    quotas[rng.permutation(len(classes))[: n % len(classes)]] += 1
    draws = []
    for label, quota in zip(classes, quotas, strict=True):
        members = np.flatnonzero(labels == label)
        rounds = -(-quota // len(members))
        passes = [rng.permutation(members) + k * n for k in range(rounds)]
        draws.append(np.concatenate(passes)[:quota])
    return rng.permutation(np.concatenate(draws))
