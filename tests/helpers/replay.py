"""The rules of CUDA graphs on the CPU: recording does nothing, and replays use fixed memory."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten

# What cannot be recorded: results that the host waits for, and data that it copies to the device.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh")


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class Recorder(TorchDispatchMode):
    """Records operators, and replays them on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.given, self.made = [], {}, {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.name.split("::")[1] in FORBIDDEN:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for storage in map(Tensor.untyped_storage, tensors((args, kwargs))):
            if storage.data_ptr() not in self.made:
                self.given.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = operator(*args, **kwargs)
        for storage in map(Tensor.untyped_storage, tensors(out)):
            if storage.data_ptr() not in self.given:
                self.made[storage.data_ptr()] = storage
        # Aliases, since operators such as unsqueeze_ change a tensor's shape later.
        self.calls.append(tree_map_only(Tensor, aten.alias, (operator, args, kwargs, out)))
        return out

    def undo(self):
        """Leave what was there before as it was, and NaN in what was computed."""
        for storage, before in self.given.values():
            storage.copy_(before)
        for storage in self.made.values():
            storage.fill_(255)

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # where it was recorded
            for operator, args, kwargs, out in self.calls:
                again = operator(*args, **kwargs)
                for place, value in zip(tensors(out), tensors(again), strict=True):
                    if place.data_ptr() != value.data_ptr():
                        place.copy_(value)


def capture(compute):
    """Replaces `training.graphed.capture`."""
    with torch.random.fork_rng([]), Recorder() as recorder:
        result = compute()
    recorder.undo()
    return result, recorder.replay
