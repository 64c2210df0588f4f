"""Masked pre-training against training from scratch, at equal labels and equal minutes.

    python benchmarks/contest.py --faces AVATARS --labels 80 560 --seeds 0 1 --output_dir CONTEST

Pre-trains once on AVATARS/unlabelled, on all cores. Then, for each number of labels and each seed,
on one core, it fine-tunes the pre-trained weights and trains a rival: a plain timm classifier from
scratch (`rivals.py`), for as many minutes as pre-training and fine-tuning took together. Runs on
CPUs only. Run the same command again to resume.

With as many seeds as cores, both sides use the whole machine for the same time: each trains one
network per core, and pre-training is shared by all of them. The time of tests counts for neither
side; the time of reading images counts for pre-training and fine-tuning, but not for the rival. The
rival's recipe is searched for with the first seed of each number of labels, which does not count
either, or given by --recipe. With --pseudo_passes, the fine-tuned network then labels the
unlabelled faces and is trained on them as well; this counts, labelling included. The last epochs
are compared, so that no side selects an epoch.

CONTEST/curves.png plots mean class accuracy over minutes; CONTEST/table.md has the final values.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rivals
from datasets import open_labelled, synthetic_size
from util.errors import BadInput
from util.files import write_json
from util.options.parser import COUNT, SIZE, Parser
from util.program import run_program
from util.report.drawing import CHART, pixels
from util.report.figures import save_png
from util.rundir import read_json
from util.summary import Group, Spread, group_runs, is_finished, read_log

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN, FINETUNE = "pretrain_small_faces", "small_faces_500"  # recipes
BATCH = 32  # images per step of pre-training, all processes together
LOOKS = 8  # tests per fine-tuning, as many as a rival has
# Options that must not change on resuming; seeds, labels and rivals may be added.
DECIDES_RESULT = (
    *("faces", "unlabelled", "input_size", "recipe"),
    *("pretrain", "finetune", "passes", "pseudo_passes"),
)
BEGUN = "contest.json"  # those options, as the contest was started with
SCRATCH, TUNED, PSEUDO = "from scratch", "pre-trained", "with pseudo-labels"
COLOURS = {SCRATCH: "#d9730d", TUNED: "#3b82f6", PSEUDO: "#2a9d63"}


def run(command: Sequence[object], log: Path) -> None:
    """Run a program of this project on one thread, its output in `log`. Raises BadInput."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *map(str, command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        ended = subprocess.run(words, cwd=ROOT, env=env, stdout=out, stderr=out, check=False)
    if ended.returncode:
        raise BadInput(f"{shlex.join(words)} failed: see {log}")


def pretrain(args: argparse.Namespace) -> None:
    """Pre-train on all cores; every step sees the same images, however many cores there are."""
    folder = pretraining(args)
    if read_json(folder / "status.json").get("status") == "done":
        return
    processes = max(n for n in range(1, len(args.cores) + 1) if BATCH % n == 0)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    options = [f"@recipes/{PRETRAIN}.args", "--input_size", args.input_size]
    options += ["--batch_size", BATCH // processes, "--device", "cpu", *args.pretrain]
    options += ["--data_path", args.unlabelled, "--output_dir", folder]
    run([*launch, "main_pretrain.py", *options], args.output_dir / "pre-training.txt")


def pretraining(args: argparse.Namespace) -> Path:
    """The output folder of the pre-training."""
    return args.output_dir / "pre-training"


def data_options(args: argparse.Namespace, labels: int) -> list[object]:
    """The options that both sides get."""
    share = ["--label_fraction", labels / args.count]
    return ["--data_path", args.faces, "--input_size", args.input_size, *share, "--device", "cpu"]


def place(args: argparse.Namespace, labels: int, side: str, seed: int) -> Path:
    """The output folder of a run."""
    names = {SCRATCH: args.rival, TUNED: "pre-trained", PSEUDO: "pseudo-labelled"}
    return args.output_dir / f"labels-{labels}" / names[side] / f"seed-{seed}"


def finetune(args: argparse.Namespace, labels: int, seed: int) -> None:
    """Fine-tune the pre-trained weights."""
    folder = place(args, labels, TUNED, seed)
    if is_finished(folder):
        return
    repeats = max(1, round(args.passes / (LOOKS * labels)))
    options = ["--epochs", LOOKS, "--epoch_repeats", repeats, *args.finetune, "--seed", seed]
    options += ["--finetune", pretraining(args) / "checkpoint-last.pth"]
    train(args, labels, folder, options)


def self_train(args: argparse.Namespace, labels: int, seed: int) -> None:
    """Train the fine-tuned weights further, with their own labels for the unlabelled faces."""
    after = place(args, labels, PSEUDO, seed)
    if is_finished(after):
        return
    begin = place(args, labels, TUNED, seed) / "checkpoint-last.pth"
    began, answers = time.perf_counter(), after.with_suffix(".csv")
    options = ["--checkpoint", begin, "--detector", "none", "--device", "cpu", "--num_workers", 0]
    options += [args.unlabelled, "--output", answers]
    run(["main_predict.py", *options], after.with_suffix(".predict.txt"))
    write_json(after.with_suffix(".json"), {"seconds": time.perf_counter() - began})
    images = labels + len(answers.read_text().splitlines()) - 1
    epochs = min(LOOKS, max(1, round(args.pseudo_passes / images)))
    repeats = max(1, round(args.pseudo_passes / (epochs * images)))
    options = ["--epochs", epochs, "--epoch_repeats", repeats, *args.finetune, "--seed", seed]
    train(args, labels, after, [*options, "--finetune", begin, "--pseudo_labels", answers])


def train(args: argparse.Namespace, labels: int, folder: Path, options: list[object]) -> None:
    """Run one fine-tuning with its output in a folder."""
    command = ["main_finetune.py", f"@recipes/{FINETUNE}.args", *data_options(args, labels)]
    run([*command, *options, "--output_dir", folder], folder.with_suffix(".txt"))


def starts(args: argparse.Namespace, labels: int, seed: int) -> dict[str, float]:
    """The minute at which each curve starts and, under "end", at which both sides end."""
    minutes = {TUNED: rivals.minutes_of([str(pretraining(args))])}
    end = minutes[TUNED] + rivals.minutes_of([str(place(args, labels, TUNED, seed))])
    if args.pseudo_passes:
        after = place(args, labels, PSEUDO, seed)
        minutes[PSEUDO] = end + read_json(after.with_suffix(".json"))["seconds"] / 60
        end = minutes[PSEUDO] + rivals.minutes_of([str(after)])
    return {SCRATCH: 0.0, **minutes, "end": end}


def from_scratch(args: argparse.Namespace, labels: int, seed: int) -> None:
    """Train the rival for as many minutes; all seeds use the recipe found with the first."""
    folder, recipe = place(args, labels, SCRATCH, seed), args.recipe
    if not recipe and seed != args.seeds[0]:
        first = place(args, labels, SCRATCH, args.seeds[0])
        found = read_json(first / "config.json")["options"]
        recipe = f"{found['lr']}:{found['batch']}{':strong' * found['strong']}"
    options = [*data_options(args, labels), "--models", args.rival, "--seeds", seed]
    options += ["--minutes", starts(args, labels, seed)["end"]]
    options += ["--recipe", recipe] if recipe else []
    options += ["--threads", 1, "--output_dir", folder.parent.parent]
    run(["benchmarks/rivals.py", *options], folder.with_suffix(".txt"))


def duels(args: argparse.Namespace) -> None:
    """Run all fine-tunings and rivals, one at a time per core. Raises the first BadInput."""
    free: SimpleQueue[int] = SimpleQueue()
    for core in args.cores:
        free.put(core)

    def settle() -> None:
        os.sched_setaffinity(0, {free.get()})  # for this thread and the programs it starts

    first = [(labels, args.seeds[0]) for labels in args.labels]
    others = [(labels, seed) for labels in args.labels for seed in args.seeds[1:]]
    with ThreadPoolExecutor(len(args.cores), initializer=settle) as pool:
        for work, pairs in (
            (finetune, [*first, *others]),
            (self_train, [*first, *others] if args.pseudo_passes else []),
            (from_scratch, first),
            (from_scratch, others),
        ):
            try:
                for _ in pool.map(partial(work, args), *zip(*pairs, strict=True)):
                    pass
            except BadInput:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            print(f"{work.__name__}: {len(pairs)} done", flush=True)


def sides(args: argparse.Namespace, labels: int) -> dict[str, Group]:
    """The runs over seeds: from scratch and for each part of our side."""
    wanted = [side for side in COLOURS if side != PSEUDO or args.pseudo_passes]
    return {
        side: group_runs([place(args, labels, side, seed) for seed in args.seeds])[0]
        for side in wanted
    }


def table(args: argparse.Namespace) -> list[str]:
    """UAR of the last epoch in %, as Markdown; the difference is our last part minus the rival."""
    wanted = list(sides(args, args.labels[0]))
    head = ["labels", "minutes", *wanted, "difference"]
    rows = [head, ["---"] * len(head)]
    for labels in args.labels:
        last = [group.last("uar") for group in sides(args, labels).values()]
        pairs = zip(last[0].values, last[-1].values, strict=True)
        gain = Spread(tuple(ours - theirs for theirs, ours in pairs))
        minutes = np.mean([starts(args, labels, seed)["end"] for seed in args.seeds])
        shown = [spread.show() for spread in last]
        rows.append([str(labels), f"{minutes:.1f}", *shown, gain.show("+")])
    return ["| " + " | ".join(row) + " |" for row in rows]


def passes(args: argparse.Namespace) -> list[str]:
    """Images seen in training each of them, repetitions included, as Markdown."""
    wanted = list(sides(args, args.labels[0]))
    rows = [["images seen, labels", *wanted], ["---"] * (1 + len(wanted))]
    for labels in args.labels:
        folders = [group.folders for group in sides(args, labels).values()]
        seen = [np.mean([images_seen(Path(folder)) for folder in group]) for group in folders]
        rows.append([str(labels), *(f"{count:,.0f}" for count in seen)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def images_seen(folder: Path) -> int:
    """By one network in training; fine-tunings round what was asked for to whole epochs."""
    result = read_json(folder / "eval.json")
    if "images_seen" in result:
        return result["images_seen"]
    options = read_json(folder / "config.json")["options"]
    return result["train_images"] * options["epochs"] * options["epoch_repeats"]


def curves(args: argparse.Namespace) -> np.ndarray:
    """Plot UAR over minutes -> (h, w, 3) uint8, with one panel per number of labels."""
    from matplotlib import figure, rc_context

    with rc_context(CHART):
        picture = figure.Figure(figsize=(4 * len(args.labels), 3.4), layout="constrained")
        panels = picture.subplots(1, len(args.labels), sharey=True, squeeze=False)[0]
        for axes, labels in zip(panels, args.labels, strict=True):
            for side, group in sides(args, labels).items():
                for i, (seed, folder) in enumerate(zip(group.seeds, group.folders, strict=True)):
                    log, start = read_log(folder), starts(args, labels, seed)[side]
                    minutes = start + np.cumsum([entry["epoch_s"] for entry in log]) / 60
                    uar = [entry["test_uar"] for entry in log]
                    axes.plot(minutes, uar, color=COLOURS[side], label=None if i else side)
            axes.set_title(f"{labels} labels")
            axes.set_xlabel("minutes, including pre-training")
            axes.set_xlim(left=0)
        panels[0].set_ylabel("UAR, %")
        panels[0].legend(loc="lower right", frameon=False)
        return pixels(picture)


def build_parser() -> Parser:
    """The options."""
    parser = Parser(
        "Compare pre-training with training from scratch at equal labels and minutes, on the CPU. "
        "Run the same command again to continue after an interruption."
    )
    parser.add_argument(
        "--faces",
        required=True,
        metavar="PATH",
        help="labelled data set with splits train and test, as in fine-tuning (required)",
    )
    parser.add_argument(
        "--unlabelled",
        metavar="PATH",
        help="images to pre-train on (default: FACES/unlabelled)",
    )
    parser.add_argument(
        "--labels",
        type=SIZE,
        nargs="+",
        default=[80, 560],
        metavar="N",
        help="numbers of labelled images to train with (default: 80 560)",
    )
    parser.add_argument(
        "--seeds",
        type=COUNT,
        nargs="+",
        default=[0, 1],
        metavar="SEED",
        help="random seeds, one run each (default: 0 1)",
    )
    parser.add_argument(
        "--input_size",
        type=SIZE,
        default=48,
        help="side length of the images in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--passes",
        type=SIZE,
        default=32000,
        metavar="N",
        help="images seen in each fine-tuning, repetitions included (default: %(default)s)",
    )
    parser.add_argument(
        "--pseudo_passes",
        type=COUNT,
        default=0,
        metavar="N",
        help="images seen in further training with pseudo-labels for the unlabelled faces; 0: none "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--pretrain",
        type=shlex.split,
        default=[],
        metavar="OPTIONS",
        help="more options of main_pretrain.py, together in quotes",
    )
    parser.add_argument(
        "--finetune",
        type=shlex.split,
        default=[],
        metavar="OPTIONS",
        help="more options of main_finetune.py, together in quotes",
    )
    parser.add_argument(
        "--rival",
        default="resnet18",
        metavar="MODEL",
        help="timm model that is trained from scratch (default: %(default)s)",
    )
    parser.add_argument(
        "--recipe",
        metavar="LR:BATCH[:strong]",
        help="the rival's learning rate, batch size, stronger augmentation (default: searched for)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for results (required)",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Make paths absolute; check data, labels and an earlier start. Raises BadInput."""
    args.output_dir = args.output_dir.absolute()
    args.cores = sorted(os.sched_getaffinity(0))
    for name in ("faces", "unlabelled"):
        given = getattr(args, name)
        if given and os.path.exists(given):
            setattr(args, name, os.path.abspath(given))
    drawn = args.unlabelled and args.unlabelled.startswith("synthetic")
    args.unlabelled = args.unlabelled or f"{args.faces}/unlabelled"
    if not drawn and not os.path.exists(args.unlabelled):
        raise BadInput(f"--unlabelled {args.unlabelled}: no such folder; give one to pre-train on")
    if drawn and args.pseudo_passes:
        raise BadInput("--pseudo_passes: needs image files; give a folder with --unlabelled")
    splits = open_labelled(args.faces, size=synthetic_size(args.input_size)).splits
    if not {"train", "test"} <= set(splits):
        raise BadInput(f"--faces {args.faces}: has no splits train and test")
    args.count = len(splits["train"])
    if max(args.labels) > args.count:
        few = f"{args.faces} has only {args.count} training images"
        raise BadInput(f"--labels {max(args.labels)}: {few}")
    now = rivals.selected(args, DECIDES_RESULT)
    rivals.check_unchanged(args.output_dir, read_json(args.output_dir / BEGUN) or now, now)


def work(args: argparse.Namespace) -> None:
    """Run what is missing, then write the table and the curves."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / BEGUN, rivals.selected(args, DECIDES_RESULT))
    pretrain(args)
    duels(args)
    lines = [*table(args), "", *passes(args)]
    (args.output_dir / "table.md").write_text("\n".join(lines) + "\n")
    save_png(curves(args), args.output_dir / "curves.png")
    print(*lines, sep="\n")


def main(argv: list[str] | None = None) -> int:
    """Run the program; -> its exit code."""
    return run_program(build_parser, check_options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
