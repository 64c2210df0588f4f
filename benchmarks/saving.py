"""How long training waits while a checkpoint is saved: synchronously, and as in this project.

    python benchmarks/saving.py

The peer is `save_checkpoint` itself, called by the training loop (temporary file, flush, rename).
The second table compares steps during and without a write, for a tiny model: its many short calls
from Python would suffer most if the writing thread held Python's lock.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import timing

if TYPE_CHECKING:
    from engine_train import TrainState
    from training.saver import Saver


def main() -> None:
    """Print the tables."""
    options = timing.parser("What saving a checkpoint costs the training loop.", rounds=9)
    options.add_argument(
        "--model", default="vit_base_patch16", help="classifier to save (default: %(default)s)"
    )
    options.add_argument(
        "--folder", metavar="DIR", help="write below this folder (default: the temporary folder)"
    )
    args = options.parse_args()
    report = timing.Report("Saving a checkpoint", args)
    timing.pin(args.threads + 1)  # one more core for the writing thread, as the host of a GPU has

    import torch

    torch.set_num_threads(args.threads)
    from engine_train import TrainState
    from models_registry import create_classifier
    from training.saver import Saver
    from util.checkpoint import save_checkpoint
    from util.optim import adamw, parameter_groups
    from util.rundir import LAST

    torch.manual_seed(0)
    imgs = torch.randn(1, 3, 224, 224)

    def new_state(name: str) -> TrainState:
        model = create_classifier(name, 7)
        optimizer = adamw(parameter_groups(model, 0.05), 1e-4)
        state = TrainState(model, optimizer, torch.amp.GradScaler("cpu"))
        train(state)
        return state

    def train(state: TrainState) -> None:
        state.model(imgs).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    state, small = new_state(args.model), new_state("vit_tiny_patch16")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        peer, ours = Path(folder) / "synchronous", Path(folder) / "ours"
        for path in (peer, ours):
            path.mkdir()
        begun, warn = state.position, print
        saver = Saver(ours, {}, every=1, keep=0, epochs=1, begun=begun, warn=warn, give_up=sys.exit)
        save_checkpoint(state.state_dict(), peer)
        saver.save(state)
        saver.wait()
        if (peer / LAST).read_bytes() != (ours / LAST).read_bytes():
            raise SystemExit("the two files differ")
        size = (ours / LAST).stat().st_size / 2**20

        times = timing.alternate(
            {
                "synchronous save": lambda: save_checkpoint(state.state_dict(), peer),
                "save as here": lambda: saver.save(state),
                "(its thread, in the background)": saver.wait,
            },
            args.rounds,
        )
        whole = times["synchronous save"]
        rows = [[name, 1000 * s, whole / s] for name, s in times.items()]
        report.table(f"{args.model} + AdamW, {size:.0f} MiB", ["", "ms of waiting", "ratio"], rows)

        busy, idle, steps = steps_beside(saver, state, lambda: train(small), args.rounds)
        cost = times["save as here"] + steps * (busy - idle)
        rows = [
            ["step without a write, ms", 1000 * idle],
            ["step during a write, ms", 1000 * busy],
            ["steps per write", steps],
            ["total cost of a save to the loop, ms", 1000 * cost],
            ["the same, in synchronous saves", cost / whole],
        ]
        report.table("Steps of vit_tiny_patch16 with one image", ["", "median"], rows)
    report.close()


def steps_beside(
    saver: "Saver", state: "TrainState", step: Callable[[], None], rounds: int
) -> tuple[float, float, float]:
    """Seconds per step during and without a write; number of steps per write."""
    busy, idle, steps = [], [], []
    for _ in range(rounds):
        saver.save(state)
        times = []
        while not saver._writing.done():
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        saver.wait()
        busy += times[:-1] or times  # the write ended during the last step
        steps.append(len(times))
        for _ in times:
            start = time.perf_counter()
            step()
            idle.append(time.perf_counter() - start)
    return tuple(map(statistics.median, (busy, idle, steps)))


if __name__ == "__main__":
    main()
