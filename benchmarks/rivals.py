"""Train plain timm classifiers from scratch: what pre-training has to beat.

    python benchmarks/rivals.py --data_path FACES --input_size 96 --label_fraction 0.2 \\
        --minutes 60 --models resnet18 convnextv2_atto --seeds 0 1 2 --output_dir RIVALS

A rival gets the same images and labels as main_finetune.py with the same --data_path,
--input_size, --label_fraction and --seed. It trains for as many minutes as the whole chain it is
compared with, pre-training included: give --minutes, or --minutes_of with the chain's folders.

Its recipe is plain, without class weights or soft labels: AdamW, one cycle, flips and shifts, label
smoothing. Learning rate and batch size are the best of a small grid, chosen by mean class accuracy
on a held-out fifth of the labels; each candidate trains for a quarter of the minutes. Then stronger
augmentation is tried in the same way. The time of this search is not counted; --recipe skips it.

RIVALS/MODEL/seed-N holds the same files as the folder of a main_finetune.py run, so that one report
compares both: python -m util.report CHAIN/seed-* RIVALS/*/seed-* --output PAGE. Compare the last
test, not the best of several. Give both sides the same processor and number of threads. The clock
decides how long a rival trains, so results differ a little from run to run.
"""

import argparse
import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timm_models import create, explained, faster_order
from datasets import (
    LabelledSet,
    PlainImages,
    build_test_loader,
    open_labelled,
    plain,
    synthetic_size,
)
from datasets.finetune import choose_splits, hold_out, take_fraction
from datasets.labelled import LabelledImages
from datasets.transforms import Normalise
from engine_finetune import LOGGED, last_metrics, write_results
from inference.examples import write_examples
from training.evaluate import Evaluation, TestSet, evaluate_model
from training.precision import Precision
from util.distributed import ProcessInfo, pick_device
from util.errors import BadInput
from util.files import append_atomically, write_json
from util.metrics import classification_metrics
from util.optim import adamw, parameter_groups
from util.options.groups import DATA_SET, DEVICE, LABEL_FRACTION
from util.options.parser import COUNT, SIZE, SOME, Parser, bounded
from util.program import run_program
from util.rundir import provenance, read_json
from util.safe_json import number, part
from util.schedule import lr_at
from util.summary import is_finished, read_log

MODELS = ("resnet18", "resnet50", "convnextv2_atto", "vit_tiny_patch16_224")
# With few labels, a batch size of 8 can be far better than 32: batch norm then adds more noise.
GRID = tuple(itertools.product((3e-4, 1e-3, 3e-3), (8, 32)))
SMOOTHING, WEIGHT_DECAY, CLIP, WARMUP = 0.1, 0.05, 5.0, 0.1
LEGS = 8  # parts of a run; a test follows each, off the clock
# Options that must not have changed for a finished seed to be kept.
DECIDES_RESULT = ("data_path", "data_set", "input_size", "label_fraction", "minutes")


class Recipe(NamedTuple):
    lr: float
    batch: int
    strong: bool = False  # augmentation

    @classmethod
    def read(cls, text: str) -> "Recipe":
        """Parse `1e-3:8` or `1e-3:8:strong`. Raises ValueError."""
        lr, batch, *strong = text.split(":")
        recipe = cls(float(lr), int(batch), bool(strong))
        if not 0 < recipe.lr < math.inf or recipe.batch < 2 or strong not in ([], ["strong"]):
            raise ValueError(text)
        return recipe


class Rival:
    """A classifier trained from scratch for a given time."""

    def __init__(
        self, name: str, size: int, classes: int, recipe: Recipe, seed: int, device: torch.device
    ) -> None:
        torch.manual_seed(seed)
        self.model = create(name, size, classes)
        self.order = faster_order(name, size, recipe.batch, device)
        self.model.to(device, memory_format=self.order)
        self.optimizer = adamw(parameter_groups(self.model, WEIGHT_DECAY), recipe.lr)
        self.recipe = recipe
        self.precision = Precision("auto", device)  # as main_finetune.py's
        self.normalise, self.rng = Normalise().to(device), torch.Generator().manual_seed(seed)
        self.seconds, self.steps = 0.0, 0

    def train(self, x: Tensor, y: Tensor, until: float, end: float) -> float:
        """Train on (n, 3, S, S) uint8 and (n,) until `until` seconds in all; -> the mean loss."""
        batch, losses, device = self.recipe.batch, [], self.normalise.mean.device
        while self.seconds < until:
            start = time.perf_counter()
            chosen = torch.randint(len(y), (batch,), generator=self.rng)
            if len(y) >= batch:
                chosen = torch.randperm(len(y), generator=self.rng)[:batch]
            for group in self.optimizer.param_groups:
                group["lr"] = lr_at(self.seconds / end, self.recipe.lr, 0, WARMUP, 1)
            images = self.normalise(x[chosen].to(device))
            images = augment(images, self.recipe.strong, self.rng)
            with self.precision.autocast():
                logits = self.model(images.contiguous(memory_format=self.order))
                loss = F.cross_entropy(logits, y[chosen].to(device), label_smoothing=SMOOTHING)
            self.optimizer.zero_grad()
            scaler = self.precision.scaler
            scaler.scale(loss).backward()
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            scaler.step(self.optimizer)
            scaler.update()
            losses.append(loss.item())
            self.seconds, self.steps = self.seconds + time.perf_counter() - start, self.steps + 1
        return sum(losses) / max(1, len(losses))


def augment(x: Tensor, strong: bool, rng: torch.Generator) -> Tensor:
    """(N, 3, S, S) -> same: flipped and shifted by up to S/16.

    `strong`: also rotated by up to 10 degrees, zoomed by up to 15 % and changed in contrast and
    brightness; in a quarter of the images, a square of up to a fifth of the area is erased.
    """

    def draw(*shape: int) -> Tensor:
        return (2 * torch.rand(n, *shape, generator=rng) - 1).to(x.device)

    n, side = len(x), x.shape[3]
    mirror, shift = draw().sign(), draw(2) / 8
    turn = math.radians(10) * draw() if strong else x.new_zeros(n)
    zoom = (0.15 * draw()).exp() if strong else x.new_ones(n)
    rows = (zoom * mirror * turn.cos(), -zoom * turn.sin(), shift[:, 0])
    rows += (zoom * mirror * turn.sin(), zoom * turn.cos(), shift[:, 1])
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if strong:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (x - mean) * (0.2 * draw(1, 1, 1)).exp() + mean + 0.2 * draw(1, 1, 1)
        for i in torch.nonzero(torch.rand(n, generator=rng) < 0.25).flatten().tolist():
            length = int(side * math.sqrt(0.2 * torch.rand(1, generator=rng).item()))
            top, left = torch.randint(0, side - length + 1, (2,), generator=rng).tolist()
            x[i, :, top : top + length, left : left + length] = 0
    return x


def stacked(images: LabelledImages, size: int) -> tuple[Tensor, Tensor]:
    """Load a split -> (n, 3, S, S) uint8 and labels (n,), on the CPU. Raises BadInput."""
    whole = PlainImages(images.source, plain(size))
    views = [whole[i] for i in range(len(whole))]
    if unreadable := sum(not readable for *_, readable in views):
        raise BadInput(f"--data_path: {unreadable} images cannot be read; remove them")
    return torch.stack([image for image, *_ in views]), torch.as_tensor(images.labels)


def choose(name: str, args: argparse.Namespace) -> Recipe:
    """The best recipe on a held-out fifth of the labels; ties go to the lower loss."""
    data, train, *_ = open_data(args, args.seeds[0])
    known, held = hold_out(train, 0.2, args.seeds[0])
    (x, y), (held_x, held_y) = (stacked(images, args.input_size) for images in (known, held))
    seconds = 60 * args.minutes / 4

    def tried(recipe: Recipe) -> tuple[float, float, Recipe]:
        rival = Rival(name, args.input_size, len(data.classes), recipe, args.seeds[0], args.device)
        loss = rival.train(x, y, seconds, seconds)
        score = mean_class_accuracy(rival, held_x, held_y)
        print(f"{name}: {recipe}: {score:.1f} % held out, loss {loss:.3f}", flush=True)
        return score, -loss, recipe

    best = max(tried(Recipe(*point)) for point in GRID)
    return max(best, tried(best[2]._replace(strong=True)))[2]


@torch.no_grad()
def mean_class_accuracy(rival: Rival, x: Tensor, y: Tensor) -> float:
    """UAR over the classes that occur, in %."""
    model, device = rival.model.eval(), rival.normalise.mean.device
    logits = torch.cat([model(rival.normalise(part.to(device))).cpu() for part in x.split(64)])
    model.train()
    names = [str(k) for k in range(logits.shape[1])]
    return classification_metrics(logits.softmax(1).numpy(), y.numpy(), names)["uar"]


def run_seed(name: str, recipe: Recipe, seed: int, args: argparse.Namespace) -> dict:
    """Train, test and write the files of a main_finetune.py run; -> the last metrics."""
    folder = args.output_dir / name / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for left in ("status.json", "eval.json", "log.txt"):
        (folder / left).unlink(missing_ok=True)
    data, train, images, split = open_data(args, seed)
    whole = PlainImages(images.source, plain(args.input_size))
    loader = build_test_loader(whole, 64, ProcessInfo(), 0)
    test = TestSet(images, loader, data.classes, range(len(data.classes)))
    rival = Rival(name, args.input_size, len(data.classes), recipe, seed, args.device)
    parameters = sum(p.numel() for p in rival.model.parameters())
    options = selected(args, (*DECIDES_RESULT, "threads"))
    config = {
        **provenance(),
        "options": {**options, **recipe._asdict(), "seed": seed, "epochs": LEGS},
        "model": {"name": f"{name}, from scratch", "parameters": parameters},
        "data": {"path": args.data_path, "count": len(train), "digest": train.digest},
    }
    write_json(folder / "config.json", config)
    looks = trained_and_tested(rival, stacked(train, args.input_size), test, args, folder)
    best = max(range(LEGS), key=lambda leg: looks[leg].result["accuracy"])
    facts = {
        "data": data.title,
        "rule": data.rule,
        "split": split,
        "flip": False,
        "train_images": len(train),
        "epoch": best,
        "selected_on": split,
        "last": last_metrics(LEGS - 1, looks[-1].result),
        "minutes": rival.seconds / 60,
        "images_seen": rival.steps * recipe.batch,
    }
    write_results(folder, looks[best], test, facts)
    model = explained(rival.model, args.input_size)  # with the weights of the best leg
    write_examples(folder, looks[best], test, normalise=rival.normalise, model=model)
    write_json(folder / "status.json", {"status": "done", "reason": ""})
    return looks[-1].result


def trained_and_tested(
    rival: Rival,
    train: tuple[Tensor, Tensor],
    test: TestSet,
    args: argparse.Namespace,
    folder: Path,
) -> list[Evaluation]:
    """Train a rival and test it after each leg, which log.txt records; -> the results.

    The rival is left with the weights of the best leg.
    """
    looks, seconds, best = [], 60 * args.minutes, -1.0
    for leg in range(LEGS):
        began = rival.seconds
        loss = rival.train(*train, seconds * (leg + 1) / LEGS, seconds)
        looks.append(evaluate_model(rival.model, test, rival.normalise, rival.precision))
        line = {
            "epoch": leg,
            "train_loss": loss,
            **{f"test_{short}": looks[-1].result[metric] for short, metric in LOGGED.items()},
            "epoch_s": round(rival.seconds - began, 2),
        }
        append_atomically(folder / "log.txt", json.dumps(line) + "\n")
        if looks[-1].result["accuracy"] > best:
            best, weights = looks[-1].result["accuracy"], copy.deepcopy(rival.model.state_dict())
    rival.model.load_state_dict(weights)
    return looks


def is_done(folder: Path, args: argparse.Namespace) -> bool:
    """Whether a seed is finished already. Raises BadInput if it was with other options."""
    if not is_finished(folder):
        return False
    then = part(read_json(folder / "config.json"), "options")
    now = selected(args, DECIDES_RESULT)
    if args.recipe:
        now["recipe"] = args.recipe
        then["recipe"] = Recipe(*map(then.get, Recipe._fields))
    check_unchanged(folder, then, now)
    return True


def selected(args: argparse.Namespace, names: Iterable[str]) -> dict[str, object]:
    """These options and their values."""
    return {name: getattr(args, name) for name in names}


def check_unchanged(folder: Path, then: Mapping, now: Mapping) -> None:
    """Raise BadInput unless a folder was made with the present options."""
    for name, value in now.items():
        if then.get(name) != value:
            raise BadInput(
                f"{folder}: was made with --{name} {then.get(name)}, now {value}; choose "
                "another --output_dir or remove that folder"
            )


def open_data(
    args: argparse.Namespace, seed: int
) -> tuple[LabelledSet, LabelledImages, LabelledImages, str]:
    """Data set, training and test images as in main_finetune.py, test split. Raises BadInput."""
    data = open_labelled(args.data_path, args.data_set, size=synthetic_size(args.input_size))
    train, tests, splits, _ = choose_splits(data, None, "test", 0.1, seed, args.data_path)
    return data, take_fraction(train, args.label_fraction, seed), tests["test"], splits["test"]


def minutes_of(folders: list[str]) -> float:
    """Total training time of the runs in these folders, in minutes. Raises BadInput."""
    total = 0.0
    for folder in folders:
        seconds = [number(entry.get("epoch_s")) for entry in read_log(Path(folder))]
        if not seconds or None in seconds:
            raise BadInput(f"--minutes_of {folder}: its log.txt has no training times")
        total += sum(seconds) / 60
    return total


def check_models(names: list[str], size: int) -> None:
    """Raise BadInput for models that timm lacks or that cannot process images of this size."""
    for name in names:
        if not timm.is_model(name):
            raise BadInput(f"--models {name}: timm has no such model")
        try:
            create(name, size, 2).eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise BadInput(f"--models {name}: cannot take images of {size} px ({error})") from None


def build_parser() -> Parser:
    """The options; those shared with main_finetune.py mean the same."""
    parser = Parser("Train plain timm classifiers from scratch, to compare with pre-training.")
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--data_path", default="synthetic-lab:160:400", help=f"labelled data set {default}")
    add("--data_set", default="auto", help=DATA_SET)
    add("--input_size", type=SIZE, default=96, help=f"side length of images in pixels {default}")
    add("--label_fraction", type=SOME, default=1.0, help=f"{LABEL_FRACTION} {default}")
    add("--models", nargs="+", default=list(MODELS), help=f"in timm (default: {' '.join(MODELS)})")
    add("--seeds", type=COUNT, nargs="+", default=[0, 1, 2, 3, 4], help="seeds (default: 0 to 4)")
    budget = parser.add_mutually_exclusive_group(required=True)
    positive, runs = bounded(float, above=0), "as long as these runs took together"
    budget.add_argument("--minutes", type=positive, help="training time per seed in minutes")
    budget.add_argument("--minutes_of", nargs="+", metavar="DIR", help=runs)
    add(
        "--recipe",
        type=Recipe.read,
        metavar="LR:BATCH[:strong]",
        help="learning rate, batch size, stronger augmentation (default: search for the best)",
    )
    add("--device", default="auto", help=f"{DEVICE} {default}")
    add("--threads", type=SIZE, help="number of CPU threads (default: torch's choice)")
    add("--output_dir", type=Path, required=True, help="folder for the results (required)")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Check what can be checked before training. Raises BadInput."""
    args.minutes = minutes_of(args.minutes_of) if args.minutes_of else args.minutes
    check_models(args.models, args.input_size)


def work(args: argparse.Namespace) -> None:
    """Search the grid, train every seed of every model, and print the results."""
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = pick_device(args.device, ProcessInfo())
    for name in args.models:
        folders = {seed: args.output_dir / name / f"seed-{seed}" for seed in args.seeds}
        done = [seed for seed, folder in folders.items() if is_done(folder, args)]
        if done:
            print(f"{name}: already finished: seeds {', '.join(map(str, done))}", flush=True)
        if len(done) == len(folders):
            continue
        recipe = args.recipe or choose(name, args)
        print(f"{name}: {recipe} for {args.minutes:.1f} minutes per seed", flush=True)
        for seed in [seed for seed in folders if seed not in done]:
            last = run_seed(name, recipe, seed, args)
            print(f"{name}, seed {seed}: UAR {last['uar']:.2f} % at the end", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the program; -> its exit code."""
    return run_program(build_parser, check_options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
