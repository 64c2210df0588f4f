"""Fair timing: candidates take turns in one process. Results as Markdown tables and JSON.

Every benchmark here checks that its candidates compute the same before timing them.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser(description: str, rounds: int = 15) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--device",
        default="cpu",
        help="cpu or cuda; only fcmae.py and mae.py can use a GPU (default: %(default)s)",
    )
    options.add_argument(
        "--threads", type=int, default=1, help="number of CPU threads (default: %(default)s)"
    )
    options.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help="measurements of each candidate, for the median; ignored by end_to_end.py (default: "
        "%(default)s)",
    )
    options.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the tables to this JSON file"
    )
    return options


def settle(options: argparse.Namespace) -> "torch.device":
    """Prepare `--device` and return it; a CPU gets `--threads` pinned threads."""
    from training.precision import Precision
    from util.distributed import ProcessInfo, pick_device

    device = pick_device(options.device, ProcessInfo())
    if device.type == "cpu":
        pin(options.threads)
    Precision("off", device)  # fp32 means fp32, not TF32
    return device


def pin(threads: int) -> None:
    """Limit torch to `threads` threads and this process to as many cores."""
    import torch

    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def alternate(
    candidates: Mapping[Any, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[Any, float]:
    """Median seconds per call over `rounds` rounds, in each of which every candidate runs once.

    So changes in the machine's speed affect all candidates alike. Waits for the GPU, if any.
    """
    import torch

    gpu = torch.cuda.is_available()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-warmup, rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if gpu:
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class Report:
    """The tables of one benchmark, printed as they are made."""

    def __init__(self, title: str, options: argparse.Namespace) -> None:
        self.path, self.tables = options.json, []
        where = gpu() if options.device.startswith("cuda") else {"threads": options.threads}
        self.head = {"title": title, "command": " ".join(sys.argv), **machine(), **where}
        print(f"# {title}\n")
        for name, value in self.head.items():
            if name != "title":
                print(f"- {name}: {value}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table as Markdown, numbers to three digits."""
        self.tables.append(
            {"title": title, "rows": [dict(zip(columns, r, strict=True)) for r in rows]}
        )
        print(f"\n## {title}\n")
        for row in [columns, ["---"] * len(columns), *rows]:
            print("| " + " | ".join(map(shown, row)) + " |", flush=True)

    def close(self) -> None:
        """Write the JSON file, if one was asked for."""
        if self.path:
            self.path.write_text(json.dumps({**self.head, "tables": self.tables}, indent=1) + "\n")


def shown(value: object) -> str:
    """The text of a table cell."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def machine() -> dict[str, object]:
    """What the figures depend on besides the program."""
    import timm
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["timm"] = timm.__version__
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return {"cpu": processor(), "versions": listed}


def gpu() -> dict[str, object]:
    """The GPU in use and its CUDA and cuDNN versions."""
    import torch

    name, cuda, cudnn = torch.cuda.get_device_name(), torch.version.cuda, torch.backends.cudnn
    return {"gpu": f"{name}, CUDA {cuda}, cuDNN {cudnn.version()}"}


def processor() -> str:
    """The CPU's name, instruction set and number of cores, as far as the system reports them."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
