"""The options of drawing figures, and checks."""

import argparse
import os

from util.download import RELEASED, check_classifier
from util.errors import BadInput
from util.options.groups import (
    DEVICE,
    FACE_MARGIN,
    LABEL_ORDER,
    LABEL_RULE,
    TRAINED,
    UNLABELLED,
    WORKERS,
    add_cache_dir,
    add_saved,
)
from util.options.parser import COUNT, RATE, RATIO, SEED, SIZE, Parser, bounded

# The names of figures in --figures; for charts of results, also their file names.
OF_RESULTS = {"confusion": "confusion_matrix", "classes": "classes", "reliability": "reliability"}
OF_CLASSIFIERS, OF_ALL = ("attention", *OF_RESULTS), ("features", "curves")
FIGURES = ("reconstructions", *OF_CLASSIFIERS, *OF_ALL)
AS_TRAINED = "(default: as in training)"


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
    add_cache_dir(parser)
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
        for name in OF_CLASSIFIERS:
            if name in asked:
                check_classifier(args.checkpoint, f"--figures {name}:")
    if args.output_dir is None:
        args.output_dir = args.runs[0] if only_curves else os.path.dirname(args.checkpoint) or "."
        if not (only_curves or os.path.isfile(args.checkpoint)):
            raise BadInput(f"--output_dir: name a folder; {args.checkpoint} is not a local file")


def check_checkpoint(name: str) -> None:
    """Raises BadInput for anything but a file or the name of released weights."""
    if os.path.isdir(name):
        raise BadInput(f"{name}: is a folder; name a checkpoint in it, such as checkpoint-last.pth")
    if not os.path.exists(name) and name not in RELEASED:
        from util.weights import find_source

        find_source(name)  # raises BadInput with similar names
