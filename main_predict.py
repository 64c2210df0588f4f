"""Predict the expressions of the faces in pictures with a fine-tuned checkpoint.

    python main_predict.py --checkpoint FILE photos/ --output predictions.csv

Writes one row per face, and one for each picture that cannot be read or shows no face.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by python -P

from util.errors import Fault
from util.options.predict import build_parser, check_options, find_format
from util.predictions import NO_FACE, UNREADABLE, open_rows
from util.program import run_program


def work(args: argparse.Namespace) -> None:
    """Predict all pictures. Wrong options are reported before the first picture is read.

    Raises Fault (exit code 1) at the end if a picture could not be read; with --strict, also if one
    shows no face.
    """
    # Only now: --help and wrong options should not have to wait for torch.
    from tqdm import tqdm

    from builders import predict as build
    from datasets.faces.pictures import list_pictures
    from datasets.filetypes import skipped_line
    from inference.outputs import OtherOutputs, Totals, say, write_picture
    from inference.predict import device_name

    paths, skipped = list_pictures(args.images)
    predictor = build.build_predictor(args)
    # Names from a file may contain characters that cannot be encoded.
    classes = [name.encode("utf-8", "backslashreplace").decode() for name in predictor.classes]
    workers = build.count_workers(args, len(paths))
    others = OtherOutputs(args.annotated, args.features, classes, len(paths))
    kind, totals = find_format(args.format, args.output), Totals()
    with open_rows(args.output, kind, classes) as rows:
        say(
            f"{predictor.name}, {len(classes)} classes, fp32 on {device_name(predictor.device)}; "
            f"detector: {args.detector}; {len(paths):,} pictures"
        )
        notes = (f"note: {note}" for note in predictor.notes)
        for line in (predictor.cropping, *skipped_line(skipped), *notes):
            say(line)
        # A progress bar would be mixed with the rows if both were on the same terminal.
        hidden = True if args.output is None and sys.stdout.isatty() else None
        predicted = predictor.stream(paths, workers)
        for picture, prediction in tqdm(
            predicted, total=len(paths), unit="picture", disable=hidden
        ):
            write_picture(rows, picture, prediction, classes)
            others.add(picture, prediction)
            totals.add(picture)
    others.finish()
    if totals[UNREADABLE] or (args.strict and totals[NO_FACE]):
        raise Fault(totals.line(skipped))
    say(totals.line(skipped))


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
