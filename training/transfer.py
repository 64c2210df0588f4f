"""Moves batches to the device and results back; on CUDA, while the device computes."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or all tensors of a batch, on the device; anything else stays as it is.

    Copies are asynchronous on CUDA only: an Apple GPU might read a source that is already gone.
    """
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(x, device) for x in batch)
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    return batch


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the host -> a function that waits for the copy and returns it.

    It does not wait for what the device is given to do afterwards.
    """
    if x.device.type != "cuda":
        return x.cpu
    copy = x.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


def on_host(results: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Results on the host; each is waited for only after the device was given the next one."""
    before: list[Callable[[], Tensor]] = []
    for result in results:
        copies = [to_host(x) for x in result]
        if before:
            yield tuple(wait() for wait in before)
        before = copies
    if before:
        yield tuple(wait() for wait in before)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The only stream for copies: torch's allocator reuses memory per stream."""
    return torch.cuda.Stream(device)


class Batches:
    """Batches on the device. On CUDA, each is copied from pinned memory on a separate stream.

    Ask for the next one (`fetch_ahead`) after launching the work on this one: it is copied
    meanwhile, and if it is late, it does not delay that work.
    """

    def __init__(self, source: Iterable, device: torch.device) -> None:
        self.source, self.device = iter(source), device
        self._coming: Any = None
        self._waited = 0.0  # on the host
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self.device.type != "cuda":
            return to_device(self._load(), self.device)
        self.fetch_ahead()
        if self._coming is None:
            raise StopIteration
        batch, self._coming = self._coming, None
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(copy_stream(self.device))
        for x in batch:
            if isinstance(x, Tensor):
                x.record_stream(computing)  # no copy may reuse its memory before
        return batch

    def fetch_ahead(self) -> None:
        """Start copying the next batch, waiting for it if it is late; does nothing without CUDA."""
        if self._coming is not None or self.device.type != "cuda":
            return
        # The device reaches the second event as late as the host if it has nothing else to do.
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        batch = next(self.source, None)
        after.record()
        self._waits.append((before, after))
        with torch.cuda.stream(copy_stream(self.device)):
            self._coming = to_device(batch, self.device)

    def _load(self) -> Any:
        """The next batch on the host."""
        start = time.perf_counter()
        try:
            return next(self.source)
        finally:
            self._waited += time.perf_counter() - start

    def waited(self) -> float:
        """Seconds that the device had nothing to do but wait for batches since the last call.

        On CUDA, a wait that the device has not reached yet is counted in a later call.
        """
        done = [pair for pair in self._waits if pair[1].query()]
        self._waits = self._waits[len(done) :]
        waited = self._waited + sum(a.elapsed_time(b) for a, b in done) / 1000
        self._waited = 0.0
        return waited
