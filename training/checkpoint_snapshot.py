"""A copy of a checkpoint in memory, so that training can continue while it is written."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class CheckpointSnapshot:
    """Copies the checkpoints of a run, one after the other, into the same host memory.

    Takes as much host memory as a checkpoint. The memory is reused from copy to copy, since
    allocating new pages takes longer than copying. Copies from a GPU use pinned memory, which torch
    rounds up to powers of two: up to twice as much.
    """

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []  # in the order in which `take` meets them

    def take(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """A copy of the checkpoint that shares no memory with it; valid until the next call.

        Whole storages are copied, so that tensors keep their layout and share memory as before: a
        file saved from the copy equals one saved from the original, except that GPU tensors are on
        the CPU.
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
        return copy.deepcopy(checkpoint, copies)  # the tensors are in its memo, `copies`

    def _fill(self, k: int, source: torch.UntypedStorage) -> torch.UntypedStorage:
        """Copy `source` into our k-th storage, asynchronously from CUDA; -> that storage."""
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
