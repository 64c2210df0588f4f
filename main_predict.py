"""Predict the expressions of the faces in pictures with a fine-tuned checkpoint.

    python main_predict.py --checkpoint FILE photos/ --output predictions.csv

Writes one row per face, and one for each picture that cannot be read or shows no face.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by python -P

from util.distributed import ProcessInfo, pick_device
from util.errors import Fault
from util.options.predict import build_parser, check_options, find_format
from util.predictions import NO_FACE, OK, UNREADABLE, open_rows
from util.program import run_program


def work(args: argparse.Namespace) -> None:
    """Predict all pictures. Wrong options are reported before the first picture is read."""
    # Only now: --help and wrong options should not have to wait for torch.
    from tqdm import tqdm

    from builders import predict as build
    from datasets.faces.detection import open_detector
    from datasets.faces.pictures import list_pictures
    from datasets.filetypes import skipped_line
    from inference.outputs import OtherOutputs, say, write_picture
    from inference.predict import Predictor, device_name, predict_pictures
    from models_saved import open_classifier

    paths, skipped = list_pictures(args.images)
    open_detector(args.detector)
    saved = open_classifier(args.checkpoint, args.classes)
    predictor = Predictor(saved, pick_device(args.device, ProcessInfo()))
    # Names from a file may contain characters that cannot be encoded.
    classes = [name.encode("utf-8", "backslashreplace").decode() for name in saved.classes]
    pictures, cut = build.open_pictures(args, paths, saved)
    workers = build.count_workers(args, len(paths))
    others = OtherOutputs(args.annotated, args.features, classes, len(paths))
    kind, counts = find_format(args.format, args.output), Counter()
    with open_rows(args.output, kind, classes) as rows:
        say(
            f"{saved.name}, {len(classes)} classes, fp32 on {device_name(predictor.device)}; "
            f"detector: {args.detector}; {len(paths):,} pictures"
        )
        for line in (cut, *skipped_line(skipped), *(f"note: {note}" for note in saved.notes)):
            say(line)
        # A progress bar would be mixed with the rows if both were on the same terminal.
        hidden = True if args.output is None and sys.stdout.isatty() else None
        found = pictures.in_order(workers)
        found = tqdm(found, total=len(paths), unit="picture", disable=hidden)
        for picture, prediction in predict_pictures(found, predictor, args.batch_size):
            if not prediction.is_finite():
                raise Fault(f"{args.checkpoint}: its outputs for {picture.path} are not finite")
            counts += write_picture(rows, picture, prediction, classes)
            others.add(picture, prediction)
    others.finish()
    say(totals(counts))


def totals(counts: Counter) -> str:
    """A line with the totals. Raises Fault (exit code 1) if any picture has no prediction."""
    text = f"{counts['faces']:,} faces in {counts[OK]:,} of {counts.total() - counts['faces']:,}"
    text += f" pictures; without a face: {counts[NO_FACE]:,}; unreadable: {counts[UNREADABLE]:,}"
    if counts[NO_FACE] or counts[UNREADABLE]:
        hint = "; if the pictures are faces already, use --detector none" * bool(counts[NO_FACE])
        raise Fault(text + hint)
    return text


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
