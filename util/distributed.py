"""Processes, devices and communication between ranks; no-ops in a single process."""

import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from util.errors import BadInput, Fault, Stopped
from util.rendezvous import from_environment, meet, open_store

if TYPE_CHECKING:
    import torch


class ProcessInfo(NamedTuple):
    """The rank of this process, and the number of processes; in all and on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1  # processes on this machine

    @property
    def main(self) -> bool:
        """Rank 0: the one that writes and logs."""
        return self.rank == 0


class Launch(NamedTuple):
    """The options about device and processes, under their own names."""

    device: str
    world_size: int
    local_rank: int
    dist_on_itp: bool
    dist_url: str
    dist_timeout: float  # seconds


def find_process(
    world_size: int = 1, local_rank: int = -1, dist_on_itp: bool = False
) -> ProcessInfo:
    """The place that a launcher gave this process, from the environment; needs no torch.

    Supports torchrun and torch.distributed.launch; Open MPI with `dist_on_itp`; SLURM's srun if
    `world_size` gives the number of tasks (as in the official scripts). Raises BadInput for values
    that cannot be right.
    """
    env = os.environ
    if dist_on_itp:
        defaults = {"RANK": 0, "SIZE": 1, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
        place = [from_environment(f"OMPI_COMM_WORLD_{name}", n) for name, n in defaults.items()]
    elif "RANK" in env and "WORLD_SIZE" in env:
        place = [from_environment("RANK"), from_environment("WORLD_SIZE")]
        place.append(from_environment("LOCAL_RANK", max(local_rank, 0)))
        place.append(from_environment("LOCAL_WORLD_SIZE", 1))
    elif "SLURM_PROCID" in env and world_size > 1:
        # The second, such as 8(x2), is set even if only the total number of tasks was given.
        tasks = env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_STEP_TASKS_PER_NODE", "1")
        place = [from_environment("SLURM_PROCID"), world_size]
        place += [from_environment("SLURM_LOCALID", 0), int(re.match(r"\d+", tasks)[0])]
    else:
        place = []
    process = ProcessInfo(*place)
    if process.rank >= process.world:
        raise BadInput(
            f"rank {process.rank} of {process.world} processes: ranks start at 0; check the "
            "launcher's environment variables, such as RANK and WORLD_SIZE, or --world_size"
        )
    return process


def pick_device(name: str, process: ProcessInfo) -> "torch.device":
    """`auto` is cuda, else mps, else cpu; each rank uses the GPU of its local rank."""
    import torch

    if name == "auto":
        # No backend communicates tensors on Apple GPUs.
        mps = torch.backends.mps.is_available() and process.world == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name}: no such device; use auto, cuda, mps or cpu") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput("--device mps: this machine has none; use --device auto")
    if device.type == "mps" and process.world > 1:
        raise BadInput("--device mps: supports one process only; use --device cpu for several")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = process.local_rank if device.index is None else device.index
        last = max(index, process.local_world - 1) if device.index is None else index
        if count == 1 and device.index is None and "TORCHELASTIC_RUN_ID" not in os.environ:
            # Other launchers than torchrun may show each process only its own GPU. If they do not,
            # NCCL reports a duplicate GPU.
            index = last = 0
        if last >= count:  # raised on all ranks, so also on the one that reports
            raise BadInput(
                f"--device {name}: this machine's processes need GPU {last}, but torch sees "
                f"{count}; start at most {count} processes or use --device cpu"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def join(process: ProcessInfo, device: "torch.device", url: str, timeout: float) -> None:
    """Join the other ranks; `timeout` in seconds for every call.

    Tensors on GPUs are communicated by NCCL; everything else, such as Python objects, by gloo.
    """
    if process.world == 1:
        return
    import torch.distributed as dist

    store = open_store(url, process.rank, process.world, timeout)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(meet(store, process.rank, process.world, timeout), store),
            rank=process.rank,
            world_size=process.world,
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        if "(local) address" not in str(error):
            raise
        hint = "name the network interface to use, such as GLOO_SOCKET_IFNAME=lo on one machine"
        raise Fault(f"{error}; {hint}") from None


def is_distributed() -> bool:
    """Whether `join` has joined other ranks."""
    return "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()


def own_rank(local: bool = False) -> int:
    """This process's rank, or local rank, as far as it is known yet."""
    if is_distributed() and not local:
        return sys.modules["torch.distributed"].get_rank()
    told = os.environ.get("LOCAL_RANK" if local else "RANK", "")
    return int(told) if told.isdecimal() else 0


def leave() -> None:
    """Leave the other ranks, if any were joined; the model's DDP wrapper must be gone by then."""
    if is_distributed():
        sys.modules["torch.distributed"].destroy_process_group()


def sum_over_ranks(x: "torch.Tensor") -> "torch.Tensor":
    """Sum `x` over all ranks, in place."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def broadcast_from_main(tensors: Iterable["torch.Tensor"]) -> None:
    """Overwrite tensors with rank 0's values, in place."""
    if is_distributed():
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in order of ranks."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def own_cores() -> int:
    """This process's share of the CPU cores that it may use; all ranks must call this together.

    srun and containers may restrict each rank to cores of its own. A core that k ranks may use
    counts as 1/k.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = affinity(0) if affinity else range(os.cpu_count() or 1)
    machine = _machine()
    everyone = gather_objects((machine, set(cores)))
    users = Counter(core for place, theirs in everyone if place == machine for core in theirs)
    return int(sum(Fraction(1, users[core]) for core in cores))


def _machine() -> str:
    """Equal for all processes on a machine, in whichever containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return platform.node()


def on_main(function: Callable[[], Any]) -> Any:
    """Rank 0's `function()` on every rank; if it fails, all raise, so that all end together."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (BadInput, Fault, Stopped) as error:
            outcome[1] = type(error)(str(error))
        except Exception as error:  # the others must not wait for the result
            outcome[1] = Fault(f"process 0: {type(error).__name__}: {error}")
            dist.broadcast_object_list(outcome)
            raise
    dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise outcome[1]
    return outcome[0]
