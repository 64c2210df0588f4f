"""Writes synthetic faces to files: a contact sheet, or a data set in the layout of a real one.

python -m datasets.synthetic --output docs/synthetic_faces.png
python -m datasets.synthetic --export DIR --layout rafdb
"""

import argparse
import re

from util.errors import BadInput, Fault
from util.options.parser import Parser, bounded
from util.program import run_program

SHEET, EXPORT = ("output", "rows", "cell"), ("layout", "count")


def build_parser() -> Parser:
    """All options."""
    parser = Parser(
        "Save a contact sheet of synthetic faces, with one column per expression, or a data set of "
        "them (--export)."
    )
    parser.prog = "python -m datasets.synthetic"
    parser.add_argument(
        "--output",
        default="docs/synthetic_faces.png",
        metavar="FILE.png",
        help="contact sheet to write (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=bounded(int, low=1),
        default=6,
        help="faces per expression; the upper half shows one person per row (default: %(default)s)",
    )
    parser.add_argument(
        "--cell",
        type=bounded(int, low=16, high=1024),
        default=112,
        metavar="PIXELS",
        help="side length of a face in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="new folder to write a data set to, instead of a contact sheet (default: none)",
    )
    parser.add_argument(
        "--layout",
        choices=("rafdb",),
        default="rafdb",
        help="layout of the data set, as its owners ship it (default: %(default)s)",
    )
    parser.add_argument(
        "--count",
        type=counts,
        default=(2000, 800),
        metavar="TRAIN:TEST",
        help="number of training and test images to export (default: 2000:800)",
    )
    parser.add_argument(
        "--seed", type=bounded(int, low=0), default=1, help="random seed (default: %(default)s)"
    )
    return parser


def counts(text: str) -> tuple[int, int]:
    """The number of training and test images, for argparse."""
    match = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    if not match or not 0 < min(found := (int(match[1]), int(match[2]))) <= max(found) < 10**5:
        raise argparse.ArgumentTypeError(
            f"must be two numbers from 1 to 99999, such as 2000:800, not {text!r}"
        )
    return found


def check_options(args: argparse.Namespace) -> None:
    """Raises BadInput for options of what is not written."""
    for name in SHEET if args.export else EXPORT:
        if name in args.given:
            why = "is for a contact sheet, not for" if args.export else "needs"
            raise BadInput(f"--{name}: {why} --export")


def work(args: argparse.Namespace) -> None:
    """Write the data set or the sheet."""
    from datasets.synthetic.export import export_rafdb
    from datasets.synthetic.generator import contact_sheet

    if args.export:
        export_rafdb(args.export, args.count, args.seed)
        train, test = args.count
        print(f"{args.export}: {train:,} training and {test:,} test images as RAF-DB")
        return
    sheet = contact_sheet(args.rows, args.cell, args.seed)
    # A palette keeps the file small; as it is fitted to the sheet and dithered, it is not noticed.
    palette = sheet.quantize(256, kmeans=3)
    try:
        sheet.quantize(256, palette=palette).save(args.output, optimize=True)
    except (OSError, ValueError) as error:
        raise Fault(f"--output {args.output}: cannot be written ({error})") from None


if __name__ == "__main__":
    raise SystemExit(run_program(build_parser, check_options, work))
