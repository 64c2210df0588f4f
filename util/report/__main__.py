"""`python -m util.report OUTPUT_DIR` writes OUTPUT_DIR/report.html, the page about a run."""

import argparse

from util.errors import BadInput, Fault
from util.options.parser import Parser
from util.program import run_program
from util.report.page import write_report


def build_parser() -> Parser:
    """The options."""
    parser = Parser("Write report.html, a page about a run, or about several runs to compare them.")
    parser.add_argument(
        "output_dir", nargs="+", metavar="DIR", help="output folder of a run, or of several"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="page to write (default: report.html in the first folder)"
    )
    return parser


def work(args: argparse.Namespace) -> None:
    """Write the page of the runs named on the command line."""
    named = ", ".join(args.output_dir)
    try:
        path = write_report(*args.output_dir, page=args.output)
    except OSError as error:
        raise Fault(f"{named}: cannot write the page: {error}") from None
    if path is None:
        raise BadInput(f"{named}: no such directory")
    print(path)


if __name__ == "__main__":
    raise SystemExit(run_program(build_parser, lambda _: None, work))
