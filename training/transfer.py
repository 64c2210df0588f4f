"""Batches on their way to the device."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or all those in a batch, on the device; what is no tensor stays as it is.

    On CUDA copies are not waited for; an Apple GPU might read a source that is gone by then.
    """
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(x, device) for x in batch)
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    return batch


def on_device(batches: Iterable, device: torch.device) -> Iterator:
    """The batches on the device; to CUDA each is copied while the one before is computed with."""
    if device.type == "cuda":
        return _one_ahead(batches, device)
    return (to_device(batch, device) for batch in batches)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for copies: the allocator gives memory back to the stream it was used by."""
    return torch.cuda.Stream(device)


def _one_ahead(batches: Iterable, device: torch.device) -> Iterator[tuple]:
    """Copies on a stream of their own, from pinned memory beside the computation."""
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
                x.record_stream(computing)  # its memory is not free for the next copy before that
        coming = send()
        yield batch
