"""Measure on a GPU what the documentation could not: one command, some minutes, all tables.

    python benchmarks/gpu.py [--minutes 8] [--output DIR]

Needs requirements.txt only and downloads nothing. Each measurement runs in its own process: one of
the other scripts, started if the time that it is likely to take is left. So an error, even a crash
of the driver, costs one measurement. If memory runs out, it is repeated with half the batch.
Results are printed and written to DIR/gpu.json as soon as there are any, replacing those of an
earlier start; DIR/<name>.txt has the whole output of each. At the end, what was left out is listed
with its command.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import timing

HERE = Path(__file__).resolve().parent

MINIMUM = 4  # images per step: with fewer, times say little about training
FULL = 40e9  # bytes of memory from which the batches of `plan` are used
OUT_OF_MEMORY = re.compile(r"out of memory|ALLOC_FAILED")
TIME_UP = "stopped: the time is up"


class Case(NamedTuple):
    """A measurement: a script, its options, and the images per step."""

    script: str
    options: str
    batch: int
    seconds: float  # that it is likely to take on an H100, imports and compilation included

    @property
    def name(self) -> str:
        """For files and headings: the script and the values of its options."""
        words = [word for word in self.options.split() if not word.startswith("--")]
        words += [way for way in ("compile", "cuda_graph") if f"--{way}" in self.options]
        return "-".join([self.script.removesuffix(".py"), *words, str(self.batch)])

    def command(self, batch: int, common: str) -> list[str]:
        """The command line, to be run in the repository; `common`: options of all scripts."""
        size = "--batches" if self.script == "mae.py" else "--batch_size"
        options = [*shlex.split(common), *self.options.split(), size, str(batch)]
        return ["python", f"benchmarks/{self.script}", *options]


# By worth: one measurement of each kind with the largest models, then the others. BEST is bf16, or
# fp32 on cards without it. Seconds are guesses. Compiling takes most of them: a minute for the
# Triton kernels of a size of ConvNeXt V2, and as much for its blocks with --compile. So what needs
# neither comes earlier.
PLAN = [
    Case("kernel_times.py", "--precision BEST", 64, 100),
    Case("fcmae.py", "--models base --precisions BEST", 64, 30),
    Case("mae.py", "--models base --precisions BEST", 128, 25),
    Case("steps.py", "--models convnextv2_base", 64, 40),
    Case("steps.py", "--models mae_vit_base_patch16", 128, 40),
    Case("finetune.py", "--models base --precisions BEST --sizes 224", 64, 30),
    Case("memory.py", "--models convnextv2_base mae_vit_base_patch16", 64, 40),
    Case("steps.py", "--models mae_vit_tiny_patch16 mae_vit_base_patch16", 32, 60),
    Case("steps.py", "--models mae_vit_tiny_patch16 mae_vit_base_patch16 --cuda_graph", 32, 60),
    Case("steps.py", "--models convnextv2_base --cuda_graph", 64, 45),
    Case("mae.py", "--models base --precisions BEST --compile", 128, 45),
    Case("fcmae.py", "--models base --precisions BEST --compile", 64, 90),
    Case("mae.py", "--models base --precisions BEST --compile", 32, 45),
    Case("mae.py", "--models small --precisions BEST --compile", 128, 45),
    Case("mae.py", "--models tiny --precisions BEST --compile", 128, 45),
    Case("fcmae.py", "--models tiny --precisions BEST", 64, 80),
    Case("fcmae.py", "--models atto --precisions BEST", 64, 80),
    Case("finetune.py", "--models tiny --precisions BEST --sizes 224", 64, 40),
    Case("mae.py", "--models small --precisions BEST --compile", 32, 45),
    Case("mae.py", "--models tiny --precisions BEST --compile", 32, 45),
    Case("steps.py", "--models convnextv2_base --compile", 64, 90),
    Case("steps.py", "--models mae_vit_base_patch16 --compile", 128, 60),
    Case("fcmae.py", "--models tiny --precisions BEST --compile", 64, 90),
    Case("fcmae.py", "--models atto --precisions BEST --compile", 64, 90),
    Case("fcmae.py", "--models base --precisions fp32", 64, 90),
    Case("mae.py", "--models base --precisions fp32 --compile", 32, 60),
    Case("finetune.py", "--models base --precisions fp32 --sizes 224", 64, 60),
    Case("fcmae.py", "--models tiny --precisions fp32", 64, 90),
    Case("fcmae.py", "--models atto --precisions fp32", 64, 90),
    Case("mae.py", "--models small --precisions fp32 --compile", 32, 60),
    Case("mae.py", "--models tiny --precisions fp32 --compile", 32, 60),
]
# Every script at toy size, to test them on a CPU.
TOYS = [
    Case("kernel_times.py", "--precision fp32 --sides 1 --dims 8", 1, 0),
    Case("fcmae.py", "--models atto --precisions bf16", 1, 0),
    Case("mae.py", "--models tiny --precisions bf16", 1, 0),
    Case("finetune.py", "--models atto --precisions bf16 --sizes 64", 1, 0),
    Case("memory.py", "--models convnextv2_atto", 1, 0),
    Case("steps.py", "--models mae_vit_tiny_patch16 --input_size 32", 1, 0),
]


class Outcome(NamedTuple):
    """What a measurement gave."""

    batch: int
    seconds: float
    tables: list[dict[str, Any]]
    problem: str  # what went wrong, in a line, or ""


def share_of(memory: int | None) -> float:
    """Which part of the usual batches fits: 1 from 40 GB on, then 1/2, 1/4, …"""
    return min(1.0, 2.0 ** math.floor(math.log2(memory / FULL))) if memory else 1.0


def plan(card: dict[str, Any]) -> list[Case]:
    """PLAN for a card, without what would be measured twice."""
    share, best = share_of(card["memory"]), "bf16" if card["bf16"] else "fp32"
    cases = {}
    for case in PLAN:
        options = case.options.replace("BEST", best)
        batch = max(MINIMUM, int(case.batch * share))
        case = case._replace(options=options, batch=batch)
        cases.setdefault(case.name, case)
    return list(cases.values())


def measure(case: Case, common: str, output: Path, deadline: float) -> Outcome:
    """Run a case, with half the batch for as long as memory runs out and there is time."""
    print(f"\n{case.name}: takes about {case.seconds:.0f} s …", flush=True)
    start, batch, file = time.monotonic(), case.batch, output / f"{case.name}.json"
    while True:
        file.unlink(missing_ok=True)
        log = output / f"{case.name}.txt"
        command = [*case.command(batch, common), "--json", str(file)]
        code = run(command, log, deadline - time.monotonic())
        problem = failure(code, log.read_text(errors="replace")) if code != 0 else ""
        again = OUT_OF_MEMORY.search(problem) and batch // 2 >= MINIMUM
        if not again or time.monotonic() > deadline:
            tables = json.loads(file.read_text())["tables"] if file.exists() else []
            return Outcome(batch, time.monotonic() - start, tables, problem)
        print(f"\n{case.name}, batch {batch}: {problem}; trying {batch // 2}", flush=True)
        batch //= 2


def run(command: list[str], log: Path, limit: float) -> int | None:
    """Run a script with its output in a file; -> exit code, None if the time ran out."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command[1:]],
            stdout=file,
            stderr=file,
            cwd=HERE.parent,
            start_new_session=True,
        )
    try:
        return process.wait(max(0.0, limit))
    except subprocess.TimeoutExpired:
        return None
    finally:  # the processes that it started, too
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def failure(code: int | None, text: str) -> str:
    """A line on why a script failed, from its exit code and its output."""
    if code is None:
        return TIME_UP
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    _, traceback, after = text.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in after.splitlines() if line.strip()]
    if traceback:  # the first line of the error follows the indented ones
        lines = [line for line in lines if not line.startswith(" ")][:1]
    return lines[-1].strip()[:300] if lines else f"exit code {code}"


class Results:
    """gpu.json, complete after each change."""

    def __init__(self, path: Path, card: dict[str, Any], common: str) -> None:
        """`common`: options of all scripts."""
        self.path, self.common = path, common
        self.content = {"card": card, "results": [], "left_out": []}

    def add(self, case: Case, outcome: Outcome) -> None:
        """Record what a case gave."""
        command = shlex.join(case.command(outcome.batch, self.common))
        self.content["results"].append({"name": case.name, "command": command} | outcome._asdict())
        self.write()

    def write(self) -> None:
        """Replace the file."""
        whole = self.path.with_suffix(".tmp")
        whole.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(whole, self.path)


def show(case: Case, outcome: Outcome) -> None:
    """Print the tables of a case and what went wrong."""
    size = f"batch {outcome.batch}" + f", not {case.batch}" * (outcome.batch != case.batch)
    print(f"\n# {case.name} ({size}, {outcome.seconds:.0f} s)", flush=True)
    for table in outcome.tables:
        rows = [list(row.values()) for row in table["rows"]]
        print(timing.markdown(table["title"], list(table["rows"][0]), rows), flush=True)
    if outcome.problem:
        print(f"\nfailed: {outcome.problem}", flush=True)


def run_all(cases: list[Case], results: Results, minutes: float) -> int:
    """Run the cases for which there is time, in their order; -> how many failed."""
    deadline, failed = time.monotonic() + 60 * minutes, 0
    left_out = {case.name: case for case in cases}
    try:
        for case in cases:
            if case.seconds > deadline - time.monotonic():
                continue
            outcome = measure(case, results.common, results.path.parent, deadline)
            if outcome.problem != TIME_UP:
                del left_out[case.name]
            failed += bool(outcome.problem)
            results.add(case, outcome)
            show(case, outcome)
    finally:  # also when interrupted
        commands = [
            shlex.join(case.command(case.batch, results.common)) for case in left_out.values()
        ]
        results.content["left_out"] = commands
        results.write()
        if commands:
            print("\nLeft out, as there was no time:\n", flush=True)
            print("\n".join(f"    {command}" for command in commands), flush=True)
        print(f"\nEverything is in {results.path}", flush=True)
    return failed


def read_card(device: str) -> dict[str, Any]:
    """`timing.card`, called in another process, so that this one occupies no GPU memory."""
    code = "import json, sys, timing; print(json.dumps(timing.card(sys.argv[1])))"
    found = subprocess.run(
        [sys.executable, "-c", code, device], cwd=HERE, capture_output=True, text=True
    )
    if found.returncode:
        sys.exit(f"error: --device {device}: {failure(found.returncode, found.stderr)}")
    return json.loads(found.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes",
        type=float,
        default=8,
        help="time for all measurements together (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output_dir/gpu"),
        metavar="DIR",
        help="folder for gpu.json, the scripts' output and traces (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: run every script at toy size, to test them (default: %(default)s)",
    )
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    card = read_card(args.device)
    for name, value in card.items():
        print(f"- {name}: {value}")
    if card["memory"] and share_of(card["memory"]) < 1:
        print(f"- batches: × {share_of(card['memory']):g}, as the card has less than 40 GB")
    print("- clocks vary with temperature and power limit: compare within a table, not across runs")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # stops the script, too
    cases, rounds = (TOYS, 1) if args.device == "cpu" else (plan(card), 15)
    results = Results(output / "gpu.json", card, f"--device {args.device} --rounds {rounds}")
    return min(run_all(cases, results, args.minutes), 1)


if __name__ == "__main__":
    sys.exit(main())
