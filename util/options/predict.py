"""The options of prediction, and checks."""

import argparse

from util.download import check_classifier
from util.errors import BadInput
from util.options.groups import DEVICE, add_saved
from util.options.parser import COUNT, SIZE, Parser, bounded

DETECTORS = ("mtcnn", "none")
MARGIN = 0.15  # for models that do not say how faces were cropped in training
LARGEST_MARGIN = 2  # more is mostly background
FACE_MARGIN = bounded(float, low=0, high=LARGEST_MARGIN)
AROUND_FACES = "margin added on each side of a detected face, as a share of its longer side"
ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def build_parser() -> Parser:
    """All options."""
    parser = Parser(
        "Find the faces in pictures and predict their expressions with a fine-tuned model. Writes "
        "one row per face."
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="picture files, folders (with their subfolders) or patterns in quotes, '**/*.jpg'",
    )
    add_saved(parser, "checkpoint file of a fine-tuned model (required)")
    group = parser.add_argument_group("faces")
    group.add_argument(
        "--detector",
        choices=DETECTORS,
        default="mtcnn",
        help="face detector; none: each picture is one face already (default: %(default)s)",
    )
    group.add_argument(
        "--min_score",
        type=bounded(float, low=0, high=1),
        default=0.0,
        help="skip faces with a lower detection score, from 0 to 1; MTCNN reports faces from 0.7 "
        "(default: 0)",
    )
    group.add_argument(
        "--face_margin",
        type=FACE_MARGIN,
        help=f"{AROUND_FACES} (default: as in training, {MARGIN} if unknown)",
    )
    group = parser.add_argument_group("output")
    # Not a `flag`, which would take the picture after it for its value.
    group.add_argument(
        "--strict", action="store_true", help="also end with exit code 1 if a picture shows no face"
    )
    group.add_argument(
        "--output", metavar="FILE", help="file to write the rows to (default: standard output)"
    )
    group.add_argument(
        "--format",
        choices=("csv", "jsonl"),
        help="CSV or JSON lines (default: by the ending of --output; csv for standard output)",
    )
    group.add_argument(
        "--annotated",
        metavar="DIR",
        help="also save each picture with boxes and predictions to this folder",
    )
    group.add_argument(
        "--features",
        metavar="FILE.npz",
        help="also save each face's feature vector, the input of the model's last layer",
    )
    group = parser.add_argument_group("device and data loading")
    group.add_argument("--device", default="auto", help=f"{DEVICE} (default: %(default)s)")
    group.add_argument(
        "--batch_size",
        type=SIZE,
        default=32,
        help="faces per forward pass (default: %(default)s)",
    )
    group.add_argument(
        "--num_workers",
        type=COUNT,
        help="processes that read pictures and find faces, 0: none (default: one per CPU core, at "
        "most 10; fewer for few pictures)",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Reject what cannot work, before torch is imported."""
    if not args.checkpoint:
        raise BadInput("--checkpoint is missing: name a fine-tuned model; see --help")
    check_classifier(args.checkpoint, "--checkpoint")
    for name in ("output", "annotated", "features"):
        if getattr(args, name) == "":
            raise BadInput(f"--{name}: is empty")
    if "" in args.images:
        raise BadInput("IMAGES: one of them is empty; name files, folders or patterns")
    if args.features and not args.features.endswith(".npz"):
        raise BadInput(f"--features {args.features}: must end in .npz")
    check_margin(args)
    find_format(args.format, args.output)


def check_margin(args: argparse.Namespace) -> None:
    """Reject a margin if no faces are cropped."""
    if args.detector == "none" and args.face_margin is not None:
        raise BadInput("--face_margin: without a detector pictures are used whole; leave it out")


def find_format(asked: str | None, output: str | None) -> str:
    """`--format`, else by the ending of --output; CSV for standard output."""
    ending = next((e for e in ENDINGS if (output or ".csv").lower().endswith(e)), None)
    if not asked and not ending:
        raise BadInput(f"--output {output}: must end in .csv or .jsonl; or give --format")
    return asked or ENDINGS[ending]
