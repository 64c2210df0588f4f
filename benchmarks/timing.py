"""Fair timing: all candidates in turn, in one process; a table for people, JSON for programs.

Every benchmark here proves that its candidates compute the same before it times them.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser(description: str, rounds: int = 15) -> argparse.ArgumentParser:
    """The options all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--threads", type=int, default=1, help="pinned to as many cores")
    options.add_argument("--rounds", type=int, default=rounds, help="turns of each candidate")
    options.add_argument("--json", type=Path, help="write the figures to this file too")
    return options


def pin(threads: int) -> None:
    """Give torch `threads` threads and this process as many cores."""
    import torch

    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def alternate(
    candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, float]:
    """Seconds a call: the median of `rounds` turns, in each of which every candidate runs once.

    So all of them meet the same machine, however it changes meanwhile.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-warmup, rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class Report:
    """The tables of one benchmark, printed as they come."""

    def __init__(self, title: str, options: argparse.Namespace) -> None:
        self.path, self.tables = options.json, []
        self.head = {"title": title, "command": " ".join(sys.argv), **machine(options.threads)}
        print(f"# {title}\n")
        for name, value in self.head.items():
            if name != "title":
                print(f"- {name}: {value}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table as Markdown; numbers to three digits."""
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
    """A table's cell."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def machine(threads: int) -> dict[str, object]:
    """What the figures depend on beside the program."""
    import timm
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["timm"] = timm.__version__
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return {"cpu": processor(), "threads": threads, "versions": listed}


def processor() -> str:
    """The CPU's name and what it computes with, as far as the system tells."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
