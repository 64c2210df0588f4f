"""How start-up, memory, files and communication grow with data, steps and processes.

    python benchmarks/scale.py                              # all tables, some minutes
    python benchmarks/scale.py --parts start --counts 10000

The only peer is the program itself on less data. Times and memory should stay flat, except for
listing; communication should not depend on the number of micro-batches per step.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import timing

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

    from engine_train import StepResult

ROOT = Path(__file__).resolve().parents[1]
FILES_A_FOLDER = 1000
LINKS = 30_000  # hard links per file (ext4 allows 65,000)
TINY = (
    "--model mae_vit_tiny_patch16 --decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2 "
    "--input_size 32 --batch_size 8 --num_workers 2 --print_freq 1 --vis_freq 0"
)
FILES_A_RUN, LINES_EVERY = 800, 20
LONG = {
    "main_pretrain.py": TINY.replace("--print_freq 1", f"--print_freq {LINES_EVERY}")
    + " --save_steps 50 --warmup_epochs 1",
    "main_finetune.py": "--model vit_tiny_patch16 --patch_size 16 --input_size 32 --batch_size 8 "
    f"--num_workers 2 --print_freq {LINES_EVERY} --save_steps 50 --warmup_epochs 1",
}
STEP = re.compile(r"step (\d+)/\d+")


def main() -> None:
    """Print the tables."""
    options = timing.parser(
        "How start-up, memory, step time and communication grow with data, steps and processes.",
        rounds=3,
    )
    options.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=[10_000, 90_000, 270_000],
        metavar="N",
        help="numbers of image files in part start (default: 10000 90000 270000)",
    )
    options.add_argument(
        "--steps",
        type=int,
        default=400,
        help="steps of each run in part start (default: %(default)s)",
    )
    options.add_argument(
        "--long_steps",
        type=int,
        default=2000,
        help="steps of each run in part long (default: %(default)s)",
    )
    options.add_argument(
        "--folder",
        metavar="DIR",
        help="make files below this folder (default: the temporary folder)",
    )
    options.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="what to measure (default: all)",
    )
    args = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    report = timing.Report("Scale", args)
    for part in args.parts:
        PARTS[part](report, args)
    report.close()


# --- files ---


def start(report: timing.Report, args: argparse.Namespace) -> None:
    """Time of listing, time to the first step, memory and step time by number of files."""
    listing, runs = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for count in args.counts:
            data = make_files(Path(folder) / f"{count}", count)
            listing.append([f"{count:,}", *time_listing(data)])
            output = Path(folder) / f"run-{count}"
            runs.append([f"{count:,}", *watch_run(data, output, args.steps)])
    report.table("Listing, seconds", ["files", "a folder", "class folders"], listing)
    columns = ["files", "first step after, s", "step, ms"]
    columns += ["main, MiB", "a worker, MiB", f"workers' growth in {args.steps} steps, MiB"]
    report.table("A run with 2 workers (memory: proportional set size)", columns, runs)


def make_files(root: Path, count: int, each: int = FILES_A_FOLDER) -> Path:
    """`count` hard links to a few small JPEG files, in the folders of 4 classes; -> `root`."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for n in range(0, count, each):
        folder = root / f"class{n // each % 4}" / f"{n:07d}"
        folder.mkdir(parents=True)
        if n % LINKS == 0:
            first = folder / "face_0000000.jpg"
            Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(first)
        for k in range(n, min(n + each, count)):
            if (path := folder / f"face_{k:07d}.jpg") != first:
                os.link(first, path)
    return root


def time_listing(data: Path) -> list[float]:
    """Seconds to list a folder, and class folders."""
    from datasets.fer.class_folder import read
    from datasets.folder import list_images

    seconds = []
    for work in (list_images, read):
        begun = time.perf_counter()
        work(data)
        seconds.append(time.perf_counter() - begun)
    return seconds


def watch_run(data: Path, output: Path, steps: int) -> list[float]:
    """First step after (s), step (ms), memory of main and a worker, growth (MiB). Kills the run."""
    command = [sys.executable, "main_pretrain.py", *TINY.split()]
    command += ["--data_path", str(data), "--output_dir", str(output)]
    begun = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        times, early, last = [], [], ""
        for line in run.stdout:
            last, number = line, step_of(line)
            if not number:
                continue
            times.append(time.perf_counter())
            if number == steps // 4:
                early = workers_memory(run.pid)
            if number == steps:
                break
        else:
            raise SystemExit(f"{' '.join(command)} ended early: {last}")
        late, main_memory = workers_memory(run.pid), memory(run.pid)
        run.send_signal(signal.SIGKILL)  # nothing is saved, so the next run starts from scratch
    gaps = [b - a for a, b in zip(times[steps // 4 :], times[steps // 4 + 1 :], strict=False)]
    growth = statistics.mean(late) - statistics.mean(early)
    step = 1000 * statistics.median(gaps)
    return [times[0] - begun, step, main_memory, statistics.mean(late), growth]


def step_of(line: str) -> int:
    """The step number in a log line; 0 if it has none."""
    found = STEP.search(line)
    return int(found[1]) if found else 0


def workers_memory(pid: int, kind: str = "Pss") -> list[float]:
    """Memory of each data worker, MiB."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [memory(int(child), kind) for child in children]


def memory(pid: int, kind: str = "Pss") -> float:
    """A process's private memory and its share of shared memory, MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(rf"^{kind}:\s+(\d+)", text, re.M)[1]) / 1024


# --- steps ---


def long(report: timing.Report, args: argparse.Namespace) -> None:
    """Memory, open files and written files as a run gets longer."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        data = make_files(Path(folder) / "data" / "train", FILES_A_RUN, FILES_A_RUN // 4).parent
        make_files(data / "test", FILES_A_RUN // 10, FILES_A_RUN // 40)
        for program, options in LONG.items():
            output = Path(folder) / program
            command = [sys.executable, program, *options.split(), "--data_path", str(data)]
            command += ["--output_dir", str(output), *f"--epochs {args.long_steps}".split()]
            rows += [[program, *row] for row in watch_long(command, output, args.long_steps)]
    columns = ["program", "steps", "epochs", "main, MiB", "a worker, MiB", "open files"]
    columns += ["log.txt, kB", "events, kB", "bad_images.txt and others, kB", "checkpoints, MB"]
    report.table(
        "A run with 2 workers that saves every 50 steps (memory: without libraries)", columns, rows
    )


def watch_long(command: list[str], output: Path, steps: int) -> list[list[object]]:
    """Rows after an eighth, a quarter, a half and all of the steps. Kills the run."""
    rows, done, due = [], 0, [steps // 8, steps // 4, steps // 2, steps]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        last = ""
        for line in run.stdout:
            last = line
            if not step_of(line):
                continue
            done += LINES_EVERY
            if done >= due[0]:
                rows.append([done, *state_of(run.pid, line, output)])
                if not due[1:]:
                    break
                due = due[1:]
        else:
            raise SystemExit(f"{' '.join(command)} ended early: {last}")
        run.send_signal(signal.SIGKILL)
    return rows


def state_of(pid: int, line: str, output: Path) -> list[object]:
    """A row of `long`, starting with the column of epochs."""
    sizes = {"log": 0.0, "events": 0.0, "others": 0.0, "checkpoints": 0.0}
    for path in output.rglob("*"):
        kind = path.name.removeprefix(".").partition("-")[0].partition(".")[0]
        kind = {"checkpoint": "checkpoints"}.get(kind, kind if kind in sizes else "others")
        sizes[kind] += path.stat().st_size / 1000
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    # Without libraries: a process's share grows when another program that uses them ends.
    main_memory, workers = memory(pid, "Pss_Anon"), statistics.mean(workers_memory(pid, "Pss_Anon"))
    kilobytes = sizes["log"], sizes["events"], sizes["others"], sizes["checkpoints"] / 1000
    return [int(re.search(r"epoch (\d+)", line)[1]), main_memory, workers, files, *kilobytes]


# --- processes ---


def communication(report: timing.Report, args: argparse.Namespace) -> None:
    """What two processes exchange per optimizer step."""
    rows = []
    for accum in (1, 2, 8):
        counts = together(2, accum, 4, batch_size=2, counting=True)[0]
        rows.append([accum, counts["buckets"], counts["MB"], counts["others"]])
    columns = ["micro-batches", "gradient all-reduces", "MB", "other all-reduces"]
    report.table("One optimizer step of mae_vit_tiny_patch16, 2 processes", columns, rows)


def processes(report: timing.Report, args: argparse.Namespace) -> None:
    """Images per second of two processes, one core each, against one process."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for world, found in speeds.items():
            seconds = max(rank["seconds"] for rank in together(world, 1, 11, batch_size=16))
            found.append(16 * world / seconds)
    one, two = (statistics.median(found) for found in speeds.values())
    report.table(
        "mae_vit_tiny_patch16, 16 images per process and step, one thread each",
        ["1 process, images/s", "2 processes, images/s", "efficiency"],
        [[one, two, two / (2 * one)]],
    )


def together(
    world: int, accum: int, steps: int, batch_size: int, counting: bool = False
) -> list[dict[str, float]]:
    """The measurements of each of `world` processes in a run of `steps` steps."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (world, accum, steps, batch_size, counting, folder), world)
        import torch

        return [torch.load(f"{folder}/{rank}") for rank in range(world)]


def run_rank(
    rank: int, world: int, accum: int, steps: int, batch_size: int, counting: bool, folder: str
) -> None:
    """Train on noise with the real loop; save the median step time and what one step sent."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from engine_train import Trainer, TrainState
    from models_registry import create_pretrain_model
    from training.gradients import Eager
    from training.precision import Precision
    from util.distributed import ProcessInfo, join, leave
    from util.optim import adamw, parameter_groups
    from util.stop import StopRequest

    torch.set_num_threads(1)
    torch.manual_seed(0)
    process, cpu = ProcessInfo(rank, world, rank, world), torch.device("cpu")
    join(process, cpu, f"file://{folder}/meet", 120)
    precision = Precision("off", cpu)
    model = create_pretrain_model("mae_vit_tiny_patch16", decoder_embed_dim=128, decoder_depth=2)
    state = TrainState(model, adamw(parameter_groups(model, 0.05), 1e-4), precision.scaler)
    run = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    trainer = Trainer(
        state,
        Eager(run, lambda model, imgs: model(imgs), precision),
        lr_at=lambda _: 1e-4,
        precision=precision,
        process=process,
        stop=StopRequest(),
        accum=accum,
    )
    imgs = torch.randn(batch_size, 3, 224, 224)
    trainer.fix_bucket_order(imgs)
    sent = {"buckets": 0, "MB": 0.0, "others": 0}
    if counting:
        count_sent(run, sent)
    watch = Watch(sent)
    trainer.run_epoch([imgs] * (steps * accum), steps, watch)
    torch.save({**watch.sent, "seconds": statistics.median(watch.seconds[1:])}, f"{folder}/{rank}")
    del trainer, run
    if world > 1:
        dist.barrier()
    leave()


class Watch:
    """An observer that records step times and what the last step sent."""

    last_saved = "none"

    def __init__(self, sent: dict[str, float]) -> None:
        self.seconds, self._sent, self._before, self.sent = [], sent, dict(sent), {}

    def after_step(self, state: object, result: "StepResult") -> None:
        """See engine_train.Observer."""
        self.seconds.append(result.seconds)
        self.sent = {name: n - self._before[name] for name, n in self._sent.items()}
        self._before = dict(self._sent)

    def save_unfinished(self, state: object) -> None:
        """See engine_train.Observer."""


def count_sent(run: "DistributedDataParallel", sent: dict[str, float]) -> None:
    """Count in `sent` what DDP and the training loop reduce over processes."""
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def hook(group: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent["buckets"] += 1
        sent["others"] -= 1  # `counted` counts this one too
        sent["MB"] += bucket.buffer().nbytes / 1e6
        return allreduce_hook(group, bucket)

    run.register_comm_hook(None, hook)
    reduce = dist.all_reduce

    def counted(*parts: object, **options: object) -> object:
        sent["others"] += 1
        return reduce(*parts, **options)

    dist.all_reduce = counted


PARTS: dict[str, Callable[[timing.Report, argparse.Namespace], None]] = {
    "start": start,
    "long": long,
    "communication": communication,
    "processes": processes,
}

if __name__ == "__main__":
    main()
