"""What 1, 8 and 64 GPUs could reach with each published pre-training recipe: arithmetic.

    python benchmarks/arithmetic.py [--json FILE]

An upper bound, from the bytes, FLOPs and operators of a step in bf16 on fake tensors
(`fake_gpu.py`), for GPUs like the H100: see the constants. Every operator is taken to read each of
its inputs and to write each of its outputs once, and to need the longer of its bytes and its FLOPs,
and a launch. Images per step are the recipe's, divided among the GPUs, in micro-batches of at most
`LARGEST`: this changes the time, not the result.

A step exchanges its gradients once: 2 (n-1)/n of their bytes leave and reach each of n GPUs, while
the last micro-batch's backward pass is computed.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from fake_gpu import absent_gpu, backward, build, loss_of
from torch.utils.flop_counter import flop_registry
from traffic import Traffic

from main_pretrain import build_parser

RECIPES = {  # and the number of processes that each is written for
    "pretrain_mae_vit_base": 1,
    "pretrain_mae_vit_small": 1,
    "pretrain_mae_vit_tiny": 1,
    "pretrain_convnextv2_base": 8,
    "pretrain_convnextv2_base_one_gpu": 1,
}
IMAGES = 270_000
LARGEST = 128  # images of a micro-batch
# H100: bytes per second (85 % of the nominal bandwidth), bf16 FLOP per second, seconds per launch.
MEMORY, MATRIX, LAUNCH = 0.85 * 3.35e12, 600e12, 2.5e-6
# Bytes per second and direction: NVLink within a machine of 8, a network card per GPU between them.
# All cards of a machine work on the exchange at once.
WITHIN, CARD, MACHINE = 450e9, 50e9, 8
UPDATE = 32  # bytes per parameter that AdamW and the gradient's norm move
BACKWARD = 2 / 3  # of a micro-batch's time
WORKER = 0.66e-3  # seconds of a core per image from a packed store, measured: docs/performance.md


class Pass(NamedTuple):
    """Seconds that a micro-batch needs for each kind of work, forward and backward."""

    memory: float  # operators limited by their bytes
    matrix: float  # those limited by their FLOPs
    launch: float

    def total(self) -> float:
        return sum(self)


class Cost(Traffic):
    """Also adds up each operator's time."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = self.matrix = 0.0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        before = self.bytes.total()
        out = super().__torch_dispatch__(operator, types, args, kwargs)
        moving = (self.bytes.total() - before) / MEMORY
        count = flop_registry.get(operator._overloadpacket)
        computing = count(*args, **(kwargs or {}), out_val=out) / MATRIX if count else 0.0
        if computing > moving:
            self.matrix += computing
        else:
            self.memory += moving
        return out


@cache
def micro_batch(name: str, images: int) -> tuple[Pass, int]:
    """The time of a micro-batch of a model in bf16, and the model's trained parameters."""
    with torch.device("meta"):
        model = build(name, recompute=False)
    with absent_gpu():
        model.to_empty(device="cuda")
        with Cost() as cost:
            backward(lambda: loss_of(model, torch.empty(images, 3, 224, 224), "bf16"))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Pass(cost.memory, cost.matrix, cost.operators * LAUNCH), parameters


class Network(NamedTuple):
    """How gradients are exchanged."""

    cards: int = MACHINE  # per machine
    width: int = 4  # bytes per parameter

    def seconds(self, parameters: int, gpus: int) -> float:
        """The time to add up the gradients of all GPUs."""
        speed = WITHIN if gpus <= MACHINE else min(WITHIN, self.cards * CARD)
        return 2 * (gpus - 1) / gpus * self.width * parameters / speed


class Step(NamedTuple):
    """An optimizer step on some GPUs."""

    images: int  # of all GPUs
    seconds: dict[str, float]  # by what is waited for

    def rate(self) -> float:
        """Images per second."""
        return self.images / sum(self.seconds.values())

    def limit(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)


def step(model: str, images: int, gpus: int, network: Network) -> Step:
    """A step of `images` in all on some GPUs."""
    own = images // gpus
    times = math.ceil(own / LARGEST)
    work, parameters = micro_batch(model, own // times)
    hidden = BACKWARD * work.total()
    seconds = {
        "bytes": times * work.memory + UPDATE * parameters / MEMORY,
        "FLOPs": times * work.matrix,
        "launches": times * work.launch,
        "network": max(0.0, network.seconds(parameters, gpus) - hidden),
    }
    return Step(images, seconds)


def main() -> None:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        metavar="N",
        help="numbers of GPUs, powers of two (default: 1 8 64)",
    )
    args = parser.parse_args()
    report, rows, saved = timing.Report("Pre-training on H100s: an upper bound", args), [], []
    folder = Path(__file__).resolve().parents[1] / "recipes"
    for recipe, processes in RECIPES.items():
        given = build_parser().parse([f"@{folder / recipe}.args"])
        images = given.batch_size * given.accum_iter * processes
        for gpus in args.gpus:
            found = step(given.model, images, gpus, Network())
            hours = given.epochs * IMAGES / found.rate() / 3600
            shares = (f"{s / sum(found.seconds.values()):.0%}" for s in found.seconds.values())
            cores = math.ceil(found.rate() * WORKER / math.ceil(gpus / MACHINE))
            rows.append([recipe, images, gpus, found.rate(), hours, found.limit(), *shares, cores])
            for cards in (MACHINE, 1):
                usual, half = (
                    step(given.model, images, gpus, Network(cards, width)).rate()
                    for width in (4, 2)
                )
                saved.append([recipe, gpus, cards, f"{1 - usual / half:.1%}"])
    columns = ["recipe", "images per step", "GPUs", "images/s", "hours", "limit"]
    columns += [*found.seconds, "cores per machine"]
    report.table("By arithmetic", columns, rows)
    columns = ["recipe", "GPUs", "network cards per machine", "time saved"]
    saved = [row for row in saved if row[1] > MACHINE]
    report.table("Gradients exchanged in bf16", columns, saved)
    report.close()


if __name__ == "__main__":
    main()
