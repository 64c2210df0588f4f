"""From the options of prediction to its parts: the pictures, and the workers that read them."""

import argparse
from collections.abc import Sequence

from datasets.faces.pictures import Pictures
from inference.predict import face_margin, whole_line
from models_saved import SavedClassifier
from training.run import worker_count
from util.distributed import own_cores


def open_pictures(
    args: argparse.Namespace, paths: Sequence[str], saved: SavedClassifier
) -> tuple[Pictures, str]:
    """The pictures, with their faces prepared for the model, and a line about the cropping."""
    margin, cut = face_margin(saved, args.face_margin)
    if args.detector == "none":
        cut = whole_line(saved.preprocessing.face_margin)
    pictures = Pictures(
        paths,
        args.detector,
        margin=margin,
        min_score=args.min_score,
        view=saved.preprocessing.view,
    )
    return pictures, cut


def count_workers(args: argparse.Namespace, pictures: int) -> int:
    """`--num_workers` if given, else what pays off; at most one worker per picture."""
    workers = min(worker_count(args.num_workers, own_cores()), pictures)
    if args.num_workers is None:
        workers = min(workers, pictures // 16)  # starting a worker takes time, too
    return workers
