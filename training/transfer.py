"""Moves batches to the device."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or all tensors of a batch, on the device; anything else stays as it is.

    Copies are asynchronous on CUDA only: an Apple GPU might read a source that is already gone.
    """
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(x, device) for x in batch)
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    return batch


def on_device(batches: Iterable, device: torch.device) -> Iterator:
    """Batches on the device; for CUDA, each is copied while the previous one is processed."""
    if device.type == "cuda":
        return _one_ahead(batches, device)
    return (to_device(batch, device) for batch in batches)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The only stream for copies: torch's allocator reuses memory per stream."""
    return torch.cuda.Stream(device)


def _one_ahead(batches: Iterable, device: torch.device) -> Iterator[tuple]:
    """Copy the next batch from pinned memory on a separate stream, during the computation."""
    side, batches = copy_stream(device), iter(batches)

    def send() -> tuple | None:
        batch = next(batches, None)
        if batch is not None:
            with torch.cuda.stream(side):
                batch = to_device(batch, device)
        return batch

    coming = send()
    while coming is not None:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(side)
        batch, coming = coming, None
        for x in batch:
            if isinstance(x, torch.Tensor):
                x.record_stream(computing)  # no copy may reuse its memory before
        coming = send()
        yield batch
