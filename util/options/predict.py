"""The options of prediction, and what cannot work."""

import argparse

from util.errors import BadInput
from util.options.parser import COUNT, SIZE, Parser, add_saved, number

DETECTORS = ("mtcnn", "none")
MARGIN = 0.15  # assumed of models that do not say how faces were cut in training
FACE_MARGIN = number(float, low=0, high=2)  # more is mostly what is not the face
ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def build_parser() -> Parser:
    """All options."""
    parser = Parser("Find the faces in pictures and say which expressions they show.")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="files, folders (with all below), patterns"
    )
    add_saved(parser, "a fine-tuned model")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--batch_size", type=SIZE, default=32, help="faces a forward pass")
    parser.add_argument("--num_workers", type=COUNT, help="data workers (by the cores)")
    group = parser.add_argument_group("faces")
    group.add_argument(
        "--detector", choices=DETECTORS, default="mtcnn", help="none: each picture is a face"
    )
    group.add_argument(
        "--min_score",
        type=number(float, low=0, high=1),
        default=0.0,
        help="leave out faces that the detector is less sure of (0: all it finds, from 0.7)",
    )
    group.add_argument(
        "--face_margin",
        type=FACE_MARGIN,
        help=f"around a box, a share of its longer side (as in training; {MARGIN} if unknown)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output", help="file of rows (default: standard output)")
    group.add_argument("--format", choices=("csv", "jsonl"), help="by the ending of --output")
    group.add_argument("--annotated", metavar="DIR", help="pictures with boxes and labels")
    group.add_argument("--features", metavar="FILE.npz", help="a vector a face, for one's own use")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before torch is imported."""
    if not args.checkpoint:
        raise BadInput("--checkpoint is missing: name a fine-tuned model; see --help")
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
    """Refuse a margin where no face is cut out."""
    if args.detector == "none" and args.face_margin is not None:
        raise BadInput("--face_margin: without a detector pictures are used whole; leave it out")


def find_format(asked: str | None, output: str | None) -> str:
    """`--format`, else by the ending of --output; CSV for standard output."""
    ending = next((e for e in ENDINGS if (output or ".csv").lower().endswith(e)), None)
    if not asked and not ending:
        raise BadInput(f"--output {output}: must end in .csv or .jsonl; or give --format")
    return asked or ENDINGS[ending]
