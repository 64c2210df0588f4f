"""A training step on a busy machine, by how the threads of OpenMP wait for each other.

    python benchmarks/busy.py [--threads 2] [--others 1] [--json FILE]

Two models train: alone, then beside `--others` endless loops. A step is forward, backward and
AdamW in fp32. The ways compared: torch's own, threads that sleep where they would spin, threads
that spin for a shorter time, and DDP with one process per core. Each is a program of its own, as
the library reads its settings when it is loaded; in every round each of them has a turn.

With two cores and one loop, whatever uses both cores gets two thirds of them, so that 1.5 × the
time is in proportion.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import timing

WAYS = {  # what GNU's OpenMP, which comes with torch, is told
    "torch's own": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "one process per core": {"PROCESS_PER_CORE": "1"},
}
MODELS = {"resnet18, 48 px": ("resnet18", 8), "mae_vit_tiny_patch16, 96 px": ("mae", 2)}
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
WARMUP, STEPS = 2, 8


def build(name: str, batch: int, distribute: Callable) -> Callable[[], None]:
    """A training step of a model as a call."""
    import torch

    from models_registry import create_classifier, create_pretrain_model
    from util.optim import adamw, parameter_groups

    torch.manual_seed(0)
    if name == "mae":
        model, imgs = create_pretrain_model("mae_vit_tiny_patch16", 96), (batch, 3, 96, 96)
    else:
        model, imgs = create_classifier(name, 7, 48), (batch, 3, 48, 48)
    optimizer = adamw(parameter_groups(model, 0.05), 1e-4)
    model, imgs = distribute(model), torch.randn(imgs)

    def step() -> None:
        optimizer.zero_grad()
        model(imgs).square().mean().backward()
        optimizer.step()

    return step


def serve(rank: int, world: int, rendezvous: str) -> None:
    """Time the model of every line read; with others, each has its share of the batch."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(int(os.environ["THREADS"]) // world)
    store = dist.FileStore(rendezvous, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    wrap = DistributedDataParallel if world > 1 else (lambda model: model)
    steps = [build(name, batch // world, wrap) for name, batch in MODELS.values()]
    while True:
        asked = [sys.stdin.readline() if rank == 0 else None]
        dist.broadcast_object_list(asked)
        if not asked[0]:
            return dist.destroy_process_group()
        step = steps[int(asked[0])]
        for _ in range(WARMUP):
            step()
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        if rank == 0:
            print(json.dumps((time.perf_counter() - began) / STEPS), flush=True)


def serve_all() -> None:
    """The program of one way."""
    world = int(os.environ["THREADS"]) if "PROCESS_PER_CORE" in os.environ else 1
    with tempfile.TemporaryDirectory() as folder:
        rendezvous, spawn = f"{folder}/rendezvous", multiprocessing.get_context("spawn")
        others = [spawn.Process(target=serve, args=(r, world, rendezvous)) for r in range(1, world)]
        for other in others:
            other.start()
        serve(0, world, rendezvous)
        for other in others:
            other.join()


def endless() -> None:
    """Use a core."""
    while True:
        pass


def start(way: str, threads: int) -> subprocess.Popen:
    """The program of a way."""
    own = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    env = {**own, **WAYS[way], "THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__, "--serve"], env=env, **pipes)


def ask(program: subprocess.Popen, model: int) -> float:
    """Seconds per step."""
    program.stdin.write(f"{model}\n")
    program.stdin.flush()
    return json.loads(program.stdout.readline())


def measure(threads: int, others: int, rounds: int) -> dict[tuple[int, str, int], float]:
    """Median seconds per step by model, way and endless loops beside."""
    programs = {way: start(way, threads) for way in WAYS}
    seconds: dict[tuple[int, str, int], list[float]] = {}
    for _ in range(rounds):
        for count in (0, others):
            loops = [multiprocessing.Process(target=endless, daemon=True) for _ in range(count)]
            for loop in loops:
                loop.start()
            for model in range(len(MODELS)):
                for way, program in programs.items():
                    seconds.setdefault((model, way, count), []).append(ask(program, model))
            for loop in loops:
                loop.kill()
                loop.join()
    for program in programs.values():
        program.communicate()
    return {key: statistics.median(values) for key, values in seconds.items()}


def main() -> None:
    options = timing.parser(__doc__.splitlines()[0], rounds=5)
    options.set_defaults(threads=2)
    options.add_argument(
        "--others",
        type=int,
        default=1,
        help="number of endless loops that compete for the CPU (default: %(default)s)",
    )
    args = options.parse_args()
    if any(batch % args.threads for _, batch in MODELS.values()):
        options.error(f"--threads {args.threads}: does not divide the batches; take 1 or 2")
    report = timing.Report("A training step on a busy machine", args)
    seconds, rows = measure(args.threads, args.others, args.rounds), []
    for model, title in enumerate(MODELS):
        for way in WAYS:
            alone, beside = (1000 * seconds[model, way, n] for n in (0, args.others))
            rows.append([title, way, alone, beside, beside / alone])
    report.table("Milliseconds per step", ["model", "way", "alone", "beside", "× alone"], rows)
    report.close()


if __name__ == "__main__":
    serve_all() if sys.argv[1:] == ["--serve"] else main()
