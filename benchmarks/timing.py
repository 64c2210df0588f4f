"""Fair timing: candidates take turns in one process. Results as Markdown tables and JSON.

Every benchmark here checks that its candidates compute the same before timing them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
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
        help="cpu; or cuda, for the scripts that gpu.py runs (default: %(default)s)",
    )
    options.add_argument(
        "--threads", type=int, default=1, help="number of CPU threads (default: %(default)s)"
    )
    options.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help="measurements of each candidate, for the median; end_to_end.py and steps.py ignore it "
        "(default: %(default)s)",
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

    So changes in the machine's speed affect all candidates alike. On a GPU, a call is timed from
    an idle GPU until it is idle again, launches included: right for whole steps, but for single
    kernels see `device_times`.
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


def device_times(
    candidates: Mapping[Any, Callable[[], object]], device: "torch.device", rounds: int
) -> dict[Any, float]:
    """Median seconds that a GPU needs for each call, between two CUDA events.

    Neither launching nor what earlier calls left in the L2 cache shortens or lengthens them: a call
    is queued while the GPU pauses, and then reads a buffer larger than the cache. For calls that do
    not wait for the GPU. On a CPU: as `alternate`.
    """
    import torch

    if device.type != "cuda":
        return alternate(candidates, rounds)
    evict = torch.zeros(2**26, device=device)  # 256 MiB
    cycles = {}
    for name, run in candidates.items():
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
        cycles[name] = int(1e6 + 2 * seconds * 2e9)  # twice the time of launching, at 2 GHz
    events: dict[Any, list] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles[name])
            evict.sum()
            start.record()
            run()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {
        name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1000
        for name, pairs in events.items()
    }


class Report:
    """The tables of one benchmark, printed as they are made."""

    def __init__(self, title: str, options: argparse.Namespace) -> None:
        self.path, self.tables, self.doubts = options.json, [], []
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
        print(markdown(title, columns, rows), flush=True)

    def doubt(self, what: str) -> None:
        """Note that a candidate does not work, or computes something else.

        `close` then ends the program with 1.
        """
        self.doubts.append(what)
        print(f"\nwarning: {what}", flush=True)

    def keep_working(
        self, candidates: dict[str, Any], attempt: Callable[..., object], *arguments: object
    ) -> None:
        """Remove compiled candidates for which `attempt(candidate, *arguments)` fails.

        Lack of memory is still raised.
        """
        import torch

        for name in [name for name in candidates if name.endswith("compiled")]:
            try:
                attempt(candidates[name], *arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers can raise anything
                lines = str(error).splitlines() or [""]
                self.doubt(f"{name}: {type(error).__name__}: {lines[0]}")
                del candidates[name]

    def close(self) -> None:
        """Write the JSON file, if one was asked for."""
        if self.path:
            found = {**self.head, "tables": self.tables, "doubts": self.doubts}
            self.path.write_text(json.dumps(found, indent=1) + "\n")
        if self.doubts:
            sys.exit(f"error: {self.doubts[0]}")


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A heading and a table, with numbers to three digits."""
    lines = [columns, ["---"] * len(columns), *rows]
    return f"\n## {title}\n\n" + "\n".join(
        "| " + " | ".join(map(shown, line)) + " |" for line in lines
    )


def shown(value: object) -> str:
    """The text of a table cell; None is for what does not exist."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
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


def card(device: str) -> dict[str, object]:
    """What a GPU's figures depend on; `memory` is in bytes, None on a CPU."""
    import torch

    from util.distributed import own_cores

    found: dict[str, object] = {"device": processor(), "memory": None, "bf16": True}
    found |= {"cores": own_cores(), "torch": torch.__version__}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory": properties.total_memory}
        found |= {"bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
        found |= {"capability": f"{properties.major}.{properties.minor}"}
        found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
        found |= driver(f"GPU-{properties.uuid}")
    try:
        found["Triton"] = version("triton")
    except PackageNotFoundError:
        found["Triton"] = "not installed"
    return found


def driver(uuid: str) -> dict[str, str]:
    """Driver, power limit and clocks as nvidia-smi reports them; empty if it cannot be run."""
    names = "driver_version,power.limit,clocks.sm,clocks.max.sm,clocks.mem"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return dict(zip(names.split(","), values, strict=False))


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
