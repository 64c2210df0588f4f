"""Data loaders: batches made by worker processes, whose number never changes what is in them."""

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from datasets.reading import RECORD_SIZE, being_read, keep_record
from datasets.sampler import GlobalBatchSampler
from util.distributed import ProcessInfo
from util.errors import BadInput, Lost
from util.process_failures import NO_SHARED_MEMORY, SHARED_MEMORY
from util.stop import shield_worker

MOST_TEST_WORKERS = 4
# Bytes of shared memory that batches leave to others: semaphores of further loaders, NCCL.
SPARE, FEWEST = 2**24, 2**20


class ErrorsAsSamples(Dataset):
    """A data set that returns its errors, as BadInput or Lost, in place of the sample.

    Workers need this because not every exception can be sent to the main process, and because torch
    turns those that can into a page of traceback.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.dataset[item]
        except (BadInput, Lost) as error:
            return error
        except Exception as error:
            traceback.print_exc()
            return Lost(f"a data worker failed: {type(error).__name__}: {error}")

    def __getitems__(self, items: Sequence) -> list:
        """The samples of a batch, up to the first failure: further ones may be slow to fail."""
        samples = []
        for item in items:
            samples.append(self[item])
            if isinstance(samples[-1], Exception):
                break
        return samples


class Loader(DataLoader):
    """A DataLoader that raises the BadInput or Lost that its workers return.

    Errors about workers say which files these are reading.
    """

    def __iter__(self) -> Iterator:
        if self.num_workers and self._iterator is None:
            self._prepare()
        batches = super().__iter__()
        while True:
            try:
                with ending_after(1.05 * self.timeout):
                    batch = next(batches, None)
            except RuntimeError as error:  # torch's, about a worker
                if self.num_workers and (files := being_read(self._records)):
                    error.args = (f"{error}\n{files}",)
                raise
            except (ConnectionError, EOFError, FileNotFoundError):  # the worker is dead
                if not self.num_workers:
                    raise
                time.sleep(1)  # meanwhile torch's handler raises an error that names the signal
                raise Lost("a data worker ended; --num_workers 0 shows why") from None
            if batch is None:
                return
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def _prepare(self) -> None:
        """Prepare for the start of workers."""
        if free_shared_memory() < FEWEST:  # even to start them takes some
            raise Lost(f"data workers cannot start: {NO_SHARED_MEMORY}")
        records = torch.zeros(self.num_workers, RECORD_SIZE, dtype=torch.uint8).share_memory_()
        self._records = [memoryview(record.numpy()) for record in records]
        self.worker_init_fn = partial(start_worker, records)
        # Workers share this process's memory until someone writes to it, and garbage collection
        # would.
        gc.freeze()


def start_worker(records: Tensor, worker: int) -> None:
    """Called in data worker number `worker`; `records`: (workers, RECORD_SIZE) uint8."""
    shield_worker()
    keep_record(memoryview(records[worker].numpy()))


def free_shared_memory() -> int:
    """Bytes of shared memory that are free; 0 if it cannot be used."""
    if sys.platform != "linux":
        return sys.maxsize
    if not os.access(SHARED_MEMORY, os.W_OK):
        return 0
    found = os.statvfs(SHARED_MEMORY)
    return found.f_bavail * found.f_frsize


@contextmanager
def ending_after(seconds: float) -> Iterator[None]:
    """Raise RuntimeError if the block takes longer (main thread only); 0 sets no limit.

    A DataLoader's own time-out does not cover the request for the memory of a finished batch, which
    a worker that has been stopped does not answer.
    """

    def late(_number: int, _frame: FrameType | None) -> None:
        raise RuntimeError(f"DataLoader timed out after {seconds:.3g} seconds")

    if not seconds or current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def build_loader(
    dataset: Dataset,
    sampler: GlobalBatchSampler,
    workers: int,
    pin_memory: bool = False,
    timeout: float = 600,
) -> DataLoader:
    """A loader of the sampler's micro-batches, which do not depend on the number of workers.

    A batch that takes longer than `timeout` seconds raises an error instead of hanging.
    """
    return _loader(dataset, workers, pin_memory, timeout, batch_sampler=sampler)


def build_test_loader(
    dataset: Dataset,
    batch_size: int,
    process: ProcessInfo,
    workers: int,
    pin_memory: bool = False,
    timeout: float = 600,
) -> DataLoader:
    """A loader of this rank's share of the items, every world-th one, without any padding."""
    # Workers are persistent, and there are several of these loaders beside the training loader.
    workers = min(workers, MOST_TEST_WORKERS)
    own = range(process.rank, len(dataset), process.world)
    return _loader(dataset, workers, pin_memory, timeout, batch_size=batch_size, sampler=own)


def _loader(
    dataset: Dataset, workers: int, pin_memory: bool, timeout: float, **batches: object
) -> DataLoader:
    return Loader(
        ErrorsAsSamples(dataset) if workers else dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        timeout=timeout if workers else 0,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # otherwise every epoch would advance the global generator
        collate_fn=collate,
        **batches,
    )


def collate(samples: Sequence[tuple | Exception]) -> list | Exception:
    """Samples, images first -> a batch, (N, 3, S, S) with channels last in memory; or a failure.

    Images come with channels last, so they are stacked without a transpose, and patches can be read
    from the batch without one, too.
    """
    if isinstance(samples[-1], Exception):
        return samples[-1]
    images, *rest = zip(*samples, strict=True)
    images = [image.permute(1, 2, 0) for image in images]
    if not get_worker_info():
        return [torch.stack(images).permute(0, 3, 1, 2), *map(default_collate, rest)]
    return [_sent_images(images), *map(_sent, rest)]


def _sent_images(images: list[Tensor]) -> "Tensor | Piped":
    """Images (H, W, 3) -> a batch, in shared memory if there is room, which needs no copying."""
    if free_shared_memory() - sum(image.nbytes for image in images) > SPARE:
        with suppress(RuntimeError):  # other workers have just taken the room
            return default_collate(images).permute(0, 3, 1, 2)
    return Piped(torch.stack(images), (0, 3, 1, 2))


def _sent(values: Sequence) -> Any:
    if isinstance(values[0], Tensor):
        return Piped(torch.stack(values))
    batch = default_collate(values)
    return Piped(batch) if isinstance(batch, Tensor) else batch


class Piped:
    """A tensor of a worker that reaches the main process through a pipe, and is a tensor there.

    Left to itself, torch uses shared memory, of which containers have little, and takes longer for
    small tensors.
    """

    def __init__(self, tensor: Tensor, order: Sequence[int] | None = None) -> None:
        """`order`: how to permute the tensor once it has arrived."""
        self.tensor, self.order = tensor, order or range(tensor.ndim)

    def __reduce__(self) -> tuple:
        return _arrived, (self.tensor.numpy(), tuple(self.order))


def _arrived(array: Any, order: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(array).permute(order)
