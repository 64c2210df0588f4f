"""A copy of a checkpoint in memory, so that it can be written while training goes on."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copies checkpoints of one run, one after the other, into the same memory.

    Costs as much memory of the host as a checkpoint is long. It is kept from copy to copy: asking
    the system for new pages takes longer than copying. Pinned where it is filled from a GPU; torch
    rounds pinned memory up to powers of two, so that it may be up to twice as much then.
    """

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []  # in the order in which they are met

    def take(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The same tensors and plain values, apart from the originals; valid until the next call.

        Whole storages are copied, so that tensors share memory, and are laid out, as they were:
        a file of the copy is a file of the original, but that GPU tensors have come to the CPU.
        """
        copied: dict[tuple[torch.device, int, int], torch.UntypedStorage] = {}
        copies: dict[int, Tensor] = {}
        for tensor in tensors_of(checkpoint):
            source = tensor.untyped_storage()
            key = (source.device, source.data_ptr(), source.nbytes())
            if key not in copied:
                copied[key] = self._fill(len(copied), source)
            shape = tensor.storage_offset(), tensor.size(), tensor.stride()
            copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(copied[key], *shape)
        if any(device.type == "cuda" for device, _, _ in copied):
            torch.cuda.synchronize()
        return copy.deepcopy(checkpoint, copies)  # takes what is in `copies` for copied

    def _fill(self, k: int, source: torch.UntypedStorage) -> torch.UntypedStorage:
        """The k-th storage of ours, holding what `source` does (on CUDA soon)."""
        cuda = source.device.type == "cuda"
        if k == len(self._storages) or self._storages[k].nbytes() != source.nbytes():
            memory = torch.empty(source.nbytes(), dtype=torch.uint8, pin_memory=cuda)
            self._storages[k : k + 1] = [memory.untyped_storage()]
        return self._storages[k].copy_(source, non_blocking=cuda)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(part)
