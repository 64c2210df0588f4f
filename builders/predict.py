"""From the options of prediction to its parts: the predictor, and its number of workers."""

import argparse

from datasets.faces.detection import open_detector
from inference.predict import Predictor
from training.run import worker_count
from util.distributed import own_cores


def build_predictor(args: argparse.Namespace) -> Predictor:
    """The model on its device, and the detector. Raises BadInput."""
    open_detector(args.detector)  # a missing one is reported before the checkpoint is read
    return Predictor(
        args.checkpoint,
        args.device,
        classes=args.classes,
        detector=args.detector,
        face_margin=args.face_margin,
        min_score=args.min_score,
        batch_size=args.batch_size,
    )


def count_workers(args: argparse.Namespace, pictures: int) -> int:
    """`--num_workers` if given, else what pays off; at most one worker per picture."""
    workers = min(worker_count(args.num_workers, own_cores()), pictures)
    if args.num_workers is None:
        workers = min(workers, pictures // 16)  # starting a worker takes time, too
    return workers
