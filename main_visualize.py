"""Draw figures of a trained model: reconstructions, attention maps, results, a feature map.

    python main_visualize.py --checkpoint RUN/checkpoint-best.pth --data_path RAF-DB
    python main_visualize.py --figures curves --runs RUN RUN …

The content of the checkpoint determines which figures are possible; docs/visualization.md shows
each.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from util.errors import BadInput
from util.evaluation_dir import FigureSource, evaluation_folder, tests_other_images
from util.options.groups import (
    DEVICE,
    FACE_MARGIN,
    LABEL_ORDER,
    LABEL_RULE,
    TRAINED,
    UNLABELLED,
    WORKERS,
    add_saved,
)
from util.options.parser import COUNT, RATE, RATIO, SEED, SIZE, Options, Parser, bounded
from util.options.trained import OF_DATA, difference_lines, differences, trained_with
from util.program import run_program

if TYPE_CHECKING:
    import numpy as np

    from datasets.labelled import LabelledSet
    from inference.visualize import FigureData, Viewer
    from models_masked import MaskedAutoencoder
    from models_saved import Saved

OF_RESULTS = {"confusion": "confusion_matrix", "classes": "classes", "reliability": "reliability"}
OF_CLASSIFIERS, OF_ALL = ("attention", *OF_RESULTS), ("features", "curves")
FIGURES = ("reconstructions", *OF_CLASSIFIERS, *OF_ALL)
RATIOS = (0.5, 0.75, 0.9)
AS_TRAINED = "(default: as in training)"
# The options that, beside checkpoint and data set, change the figures.
NAMED = ("data_set", "split", *OF_DATA, "classes")


def figures(text: str) -> tuple[str, ...]:
    """Parse names of figures, separated by commas."""
    names = tuple(filter(None, text.split(",")))
    if not names or not set(names) <= set(FIGURES):
        listed = ", ".join(FIGURES)
        raise argparse.ArgumentTypeError(f"must be some of {listed}, comma-separated, not {text!r}")
    return names


def build_parser() -> Parser:
    """All options."""
    parser = Parser(
        "Draw figures of a trained model into OUTPUT_DIR/figures: reconstructions, attention, "
        "results by class, a feature map; or compare the learning curves of several runs."
    )
    add_saved(parser, f"{TRAINED} (required except for curves)")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="folder to write figures/ to (default: the checkpoint's folder, or the first run's)",
    )
    parser.add_argument(
        "--figures",
        type=figures,
        metavar="A,B,…",
        help=f"figures to draw: {', '.join(FIGURES)} (default: all that the checkpoint allows)",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        metavar="PATH",
        help="data set to take images from; reconstructions need no labels (required except for "
        "curves)",
    )
    group.add_argument(
        "--split", metavar="NAME", help="test, val or train (default: test, else val)"
    )
    group.add_argument("--data_set", default="auto", metavar="NAME", help=UNLABELLED)
    group.add_argument("--nb_classes", type=SIZE, help=f"AffectNet: 7 or 8 classes {AS_TRAINED}")
    group.add_argument("--label_rule", metavar="RULE", help=f"{LABEL_RULE} {AS_TRAINED}")
    group.add_argument("--label_order", metavar="ORDER", help=f"{LABEL_ORDER} {AS_TRAINED}")
    group.add_argument("--face_margin", type=RATE, help=f"{FACE_MARGIN} {AS_TRAINED}")
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--count",
        type=bounded(int, low=1, high=64),
        default=8,
        help="number of images in reconstructions and attention, at most 64 (default: %(default)s)",
    )
    group.add_argument(
        "--mask_ratios",
        type=RATIO,
        nargs="+",
        metavar="RATIO",
        help="shares of masked patches to show in reconstructions (default: 0.5 0.75 0.9)",
    )
    group.add_argument(
        "--seed",
        type=SEED,
        default=0,
        help="random seed for the choice of images, the masks and the feature map (default: 0)",
    )
    group.add_argument(
        "--runs",
        nargs="+",
        metavar="DIR",
        help="output folders of the runs whose learning curves are compared",
    )
    group = parser.add_argument_group("device and data loading")
    group.add_argument("--device", default="auto", help=f"{DEVICE} (default: %(default)s)")
    group.add_argument(
        "--batch_size", type=SIZE, default=64, help="images per forward pass (default: %(default)s)"
    )
    group.add_argument("--num_workers", type=COUNT, help=WORKERS)
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Fills in --output_dir; raises BadInput for options that cannot work, without torch."""
    asked = args.figures or ()
    if "curves" in asked and not args.runs:
        raise BadInput("--figures curves: name the runs to compare with --runs DIR DIR …")
    for run in args.runs or ():
        if not os.path.isdir(run):
            raise BadInput(f"--runs {run}: no such folder; give the --output_dir of each run")
    only_curves = set(asked) == {"curves"} or (args.runs and not asked and not args.checkpoint)
    if only_curves:
        args.figures = ("curves",)
    elif not args.checkpoint:
        raise BadInput("--checkpoint is missing: name the model to visualise; see --help")
    elif not args.data_path:
        raise BadInput("--data_path is missing: name the images to use; see --help")
    else:
        check_checkpoint(args.checkpoint)
    if args.output_dir is None:
        args.output_dir = args.runs[0] if only_curves else os.path.dirname(args.checkpoint) or "."
        if not (only_curves or os.path.isfile(args.checkpoint)):
            raise BadInput(f"--output_dir: name a folder; {args.checkpoint} is not a local file")


def check_checkpoint(name: str) -> None:
    """Raises BadInput for anything but a file or the name of released weights."""
    from util.download import RELEASED

    if os.path.isdir(name):
        raise BadInput(f"{name}: is a folder; name a checkpoint in it, such as checkpoint-last.pth")
    if not os.path.exists(name) and name not in RELEASED:
        from util.weights import find_source

        find_source(name)  # raises BadInput with similar names


class Opened(NamedTuple):
    """A model with its data, and the figures to draw."""

    viewer: "Viewer"
    wanted: Sequence[str]  # of FIGURES
    drawn: FigureSource


def work(args: Options) -> None:
    """Draw the figures, writing each as soon as it is done, then update an existing report."""
    from util.report.figures import save_png
    from util.report.page import write_report

    of_model = args.checkpoint and set(args.figures or FIGURES) != {"curves"}
    opened = open_model(args) if of_model else None
    output = Path(folder_for(args, opened.drawn) if opened else args.output_dir)
    try:
        (output / "figures").mkdir(parents=True, exist_ok=True)
        for name, picture in draw(args, opened):
            path = output / "figures" / f"{name}.png"
            save_png(picture, path)
            print(path, flush=True)
        if (output / "report.html").exists():
            print(f"report: {write_report(output)}")
    except OSError as error:
        if not str(error.filename or "").startswith(str(output)):
            raise
        what = f"cannot be written ({error.strerror}); name another folder"
        raise BadInput(f"--output_dir {args.output_dir}: {what}") from None


def folder_for(args: Options, drawn: FigureSource) -> str:
    """The folder to write to: `--output_dir`, or a subfolder if that holds other results.

    So the figures in a report always belong to its numbers.
    """
    folder = args.output_dir
    if not tests_other_images(folder, drawn):
        return folder
    given = {name: getattr(args, name) for name in NAMED if name in args.given}
    options = {name: ",".join(v) if isinstance(v, tuple) else v for name, v in given.items()}
    named = evaluation_folder(
        "visualize", args.checkpoint, data_path=args.data_path, output_dir=None, options=options
    )
    own = os.path.join(folder, "visualize", os.path.basename(named))
    print(f"{folder} holds other results and keeps its figures; these go to {own}", flush=True)
    return own


def draw(args: Options, opened: Opened | None) -> Iterator[tuple[str, "np.ndarray"]]:
    """Yields the requested figures with their file names."""
    if opened:
        yield from draw_model(args, opened)
    if args.runs and "curves" in (args.figures or FIGURES):
        yield "curves", draw_curves(args.runs)


def draw_curves(runs: list[str]) -> "np.ndarray":
    """The learning curves of several runs in the same panels."""
    from util.report.curves import compared_curves
    from util.summary import read_log, short_names

    paths = list(dict.fromkeys(Path(os.path.abspath(run)) for run in runs))
    logs = dict(zip(short_names(paths), map(read_log, paths), strict=True))
    for name, path in zip(logs, paths, strict=True):
        if not logs[name]:
            raise BadInput(f"--runs {path}: has no log.txt with an epoch in it; leave it out")
    picture = compared_curves(logs)
    if picture is None:
        raise BadInput(f"--runs {' '.join(runs)}: their log.txt has no values that can be drawn")
    return picture


def open_model(args: Options) -> Opened:
    """Open the checkpoint and the images; choose all possible figures if none are requested."""
    from inference.visualize import Viewer
    from models_saved import SavedAutoencoder, SavedClassifier, open_saved
    from training.run import worker_count
    from util.distributed import ProcessInfo, pick_device

    device = pick_device(args.device, ProcessInfo())
    saved = open_saved(args.checkpoint, args.classes, args.cache_dir)
    for line in saved.notes:
        print(f"note: {line}", file=sys.stderr)
    allowed = OF_CLASSIFIERS if isinstance(saved, SavedClassifier) else ()
    if isinstance(saved, SavedAutoencoder):
        allowed = ("reconstructions",)
    for name in args.figures or ():
        if name not in (*allowed, *OF_ALL):
            what = "has no decoder; use a pre-training checkpoint"
            if name in OF_CLASSIFIERS:
                what = "was pre-trained only; use a fine-tuned checkpoint"
            raise BadInput(f"--figures {name}: {args.checkpoint} {what}")
    data, drawn = open_data(args, saved)
    wanted = args.figures or (*allowed, "features")
    if data.labels is None and "features" in wanted:
        if args.figures or not allowed:
            what = f"{args.data_path} has no labels to colour it by; use a labelled data set"
            raise BadInput(f"--figures features: {what}")
        wanted = allowed
    workers = worker_count(args.num_workers, ProcessInfo())
    viewer = Viewer(
        saved, data, device=device, batch_size=args.batch_size, workers=workers, seed=args.seed
    )
    return Opened(viewer, wanted, drawn)


def draw_model(args: Options, opened: Opened) -> Iterator[tuple[str, "np.ndarray"]]:
    """Yields the figures of the checkpoint with their file names."""
    viewer, wanted, _ = opened
    if "reconstructions" in wanted:
        ratios = possible_ratios(args.mask_ratios, viewer.model)
        yield "reconstructions", viewer.reconstructions(args.count, ratios)
    if "attention" in wanted:
        yield "attention", viewer.attention(args.count)
    if files := [OF_RESULTS[name] for name in wanted if name in OF_RESULTS]:
        charts = viewer.results()
        yield from ((file, charts[file]) for file in files)
    if "features" in wanted:
        yield "features", viewer.features()
    if lost := viewer.unreadable:
        images = f"{lost:,} image{'s' * (lost != 1)}"
        print(f"left out of charts and feature map: {images} that cannot be read", flush=True)


def possible_ratios(given: list[float] | None, model: "MaskedAutoencoder") -> list[float]:
    """The given mask ratios, else those of RATIOS that leave some patches visible and mask some.

    Raises BadInput for a given one that does not.
    """
    from util.patch_counts import visible_patches

    ratios = []
    for ratio in sorted(set(given or RATIOS)):
        try:
            visible_patches(model.num_patches, ratio)
        except BadInput as error:
            if given:
                raise BadInput(str(error).replace("--mask_ratio", "--mask_ratios", 1)) from None
        else:
            ratios.append(ratio)
    return ratios or [model.mask_ratio]


def open_data(args: Options, saved: "Saved") -> tuple["FigureData", FigureSource]:
    """The images of `--data_path`, with labels if they have any; a classifier needs labels."""
    from datasets.registry import detect_data_set
    from models_saved import SavedClassifier

    classifies = isinstance(saved, SavedClassifier)
    name = args.data_set
    if name == "auto" and not classifies:
        name = detect_data_set(args.data_path) or "none"
    if name != "none":
        return open_with_labels(args, saved, name)
    if classifies:
        raise BadInput("--data_set none: the figures of a classifier need labels; leave it out")
    for option in ("nb_classes", "label_rule", "label_order", "split"):
        if getattr(args, option) is not None:
            raise BadInput(f"--{option}: these images have no labels; leave it out")
    return open_without_labels(args, saved)


def open_without_labels(args: Options, saved: "Saved") -> tuple["FigureData", FigureSource]:
    """Images without labels."""
    from datasets import open_images, synthetic_size
    from datasets.unreadable import check_readable
    from inference.visualize import FigureData

    trained = trained_with(saved.checkpoint, args.checkpoint)
    source, notes, margin = open_images(
        args.data_path,
        size=synthetic_size(saved.preprocessing.input_size),
        face_margin=args.face_margin,
        trained=trained,
    )
    differ = {name: trained[name] for name in ("face_margin",) if name in trained}
    lines = difference_lines(differences(args, differ, {"face_margin": margin}), "drawn")
    for line in (*notes, *lines):
        print(line, flush=True)
    check_readable(source)
    return FigureData(source, None, (), ()), FigureSource(args.checkpoint, args.data_path)


def open_with_labels(args: Options, saved: "Saved", name: str) -> tuple["FigureData", FigureSource]:
    """A split of a labelled data set; for a classifier, only images of its own classes."""
    from datasets import open_labelled, synthetic_size
    from datasets.duplicates import duplicate_warnings
    from datasets.finetune import match_classes
    from datasets.labelled import describe_labelled
    from datasets.unreadable import check_readable
    from inference.visualize import FigureData
    from models_saved import SavedClassifier

    trained = trained_with(saved.checkpoint, args.checkpoint)
    labelled = open_labelled(
        args.data_path,
        name,
        nb_classes=args.nb_classes,
        label_rule=args.label_rule,
        label_order=args.label_order,
        face_margin=args.face_margin,
        trained=trained,
        size=synthetic_size(saved.preprocessing.input_size),
    )
    split, lines = split_of(labelled, args.split)
    images, classes, about = labelled.splits[split], labelled.classes, describe_labelled(labelled)
    common = range(len(classes))
    drawn = FigureSource(args.checkpoint, args.data_path)
    if isinstance(saved, SavedClassifier):
        classes = saved.classes
        matched = match_classes(labelled, images, classes)
        images, common = matched.images, matched.common
        lines += matched.lines()
        own = saved.checkpoint
        facts = {"split": split, "flip": saved.flip, "classes": [classes[k] for k in common]}
        facts |= {"epoch": own.get("epoch"), "weights": own.get("evaluated")}
        drawn = drawn._replace(facts=facts, report=about)
    differ = {name: trained[name] for name in OF_DATA if name in trained}
    lines += difference_lines(differences(args, differ, labelled.options), "drawn")
    print(*about, *lines, *duplicate_warnings(labelled.splits), sep="\n", flush=True)
    check_readable(images.source)
    return FigureData(images.source, images.labels, classes, common), drawn


def split_of(labelled: "LabelledSet", split: str | None) -> tuple[str, list[str]]:
    """The name of the given split, else of the one to test on, and lines to print about it."""
    from datasets.finetune import test_split

    if split is None:
        return test_split(labelled, "--data_path")
    if split not in labelled.splits:
        there = ", ".join(labelled.splits)
        raise BadInput(f"--split {split}: {labelled.title} has no such split; it has {there}")
    return split, []


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
