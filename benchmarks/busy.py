"""Time per training step on a busy CPU, by how OpenMP's threads wait for each other.

    python benchmarks/busy.py [--threads 2] [--others 1] [--json FILE]

Two models train, alone and then beside `--others` endless loops. A step is a forward pass, a
backward pass and an AdamW update in fp32. Four settings are compared: torch's defaults, threads
that sleep instead of spinning, threads that spin for a shorter time, and DDP with one process per
core. Each setting has a program of its own, because OpenMP reads its settings when it is loaded;
the programs take turns in every round.

With two cores and one loop, a program that uses both cores gets two thirds of their time, so that
a slowdown of 1.5 × is proportional.
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

WAYS = {  # environment variables for GNU OpenMP, which comes with torch
    "torch's own": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "one process per core": {"PROCESS_PER_CORE": "1"},
}
MODELS = {"resnet18, 48 px": ("resnet18", 8), "mae_vit_tiny_patch16, 96 px": ("mae", 2)}
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
WARMUP, STEPS = 2, 8


def build(name: str, batch: int, distribute: Callable) -> Callable[[], None]:
    """Build a training step of a model, as a function without arguments."""
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
    """Time the model whose number each line of input gives; processes share its batch."""
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
    """Run the program of one setting."""
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
    """Occupy a core."""
    while True:
        pass


def start(way: str, threads: int) -> subprocess.Popen:
    """Start the program of a setting."""
    own = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    env = {**own, **WAYS[way], "THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__, "--serve"], env=env, **pipes)


def ask(program: subprocess.Popen, model: int) -> float:
    """Let a program time a model; -> seconds per step."""
    program.stdin.write(f"{model}\n")
    program.stdin.flush()
    return json.loads(program.stdout.readline())


def measure(threads: int, others: int, rounds: int) -> dict[tuple[int, str, int], float]:
    """Median seconds per step, by model, setting and number of endless loops."""
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
        options.error(f"--threads {args.threads}: does not divide the batch sizes; use 1 or 2")
    report = timing.Report("A training step on a busy CPU", args)
    seconds, rows = measure(args.threads, args.others, args.rounds), []
    for model, title in enumerate(MODELS):
        for way in WAYS:
            alone, beside = (1000 * seconds[model, way, n] for n in (0, args.others))
            rows.append([title, way, alone, beside, beside / alone])
    report.table("Milliseconds per step", ["model", "setting", "alone", "busy", "× alone"], rows)
    report.close()


if __name__ == "__main__":
    serve_all() if sys.argv[1:] == ["--serve"] else main()
