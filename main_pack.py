"""Decode a data set once into a packed store, which training memory-maps.

    python main_pack.py --data_path RAF-DB --output STORE    # then: --data_path STORE
    python main_pack.py --verify STORE

After an interruption, the same command resumes.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by python -P

from util.distributed import own_cores
from util.errors import BadInput, Stopped
from util.files import disk_errors
from util.log import duration
from util.options.groups import FACE_MARGIN, LABEL_ORDER, LABEL_RULE, UNLABELLED
from util.options.parser import COUNT, RATE, SIZE, Parser
from util.program import run_program
from util.stop import StopRequest

if TYPE_CHECKING:
    from datasets.packed.pack import ToPack
    from datasets.packed.store_writer import Parts

RESUMES = "fix it, then rerun the same command to resume"


def build_parser() -> Parser:
    """All options."""
    parser = Parser(
        "Decode a data set once into a packed store, which training then reads faster: give the "
        "store as --data_path. Run the same command again to continue after an interruption."
    )
    parser.add_argument(
        "--data_path",
        metavar="PATH",
        help="labelled data set, folder of images, or list of images to pack (required to pack)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder to write the store to (required to pack)"
    )
    parser.add_argument(
        "--short_side",
        type=COUNT,
        default=256,
        metavar="PIXELS",
        help="shrink larger images to this shorter side in pixels; 0: keep all sizes (default: "
        "%(default)s)",
    )
    parser.add_argument("--data_set", default="auto", metavar="NAME", help=UNLABELLED)
    parser.add_argument(
        "--nb_classes",
        type=SIZE,
        help="AffectNet: 7 or 8 classes (default: 8; such a store can be used with 7 as well)",
    )
    parser.add_argument("--label_rule", metavar="RULE", help=f"{LABEL_RULE} (default: argmax)")
    parser.add_argument("--label_order", metavar="ORDER", help=LABEL_ORDER)
    parser.add_argument("--face_margin", type=RATE, help=f"{FACE_MARGIN} (default: 0.15)")
    parser.add_argument(
        "--num_workers",
        type=COUNT,
        help="processes that decode images, 0: none (default: one per CPU core, at most 10)",
    )
    parser.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="STORE",
        help="check every byte of a packed store, STORE or that of --output, instead of packing",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raises BadInput for options that cannot work, before torch is imported."""
    if args.verify is not None:
        if not (args.verify or args.output):
            raise BadInput("--verify: name the store to check")
        return
    for name in ("data_path", "output"):
        if not getattr(args, name):
            raise BadInput(f"--{name} is missing; see --help")


def work(args: argparse.Namespace) -> None:
    """Verify a store; or write one, or the rest of an unfinished one."""
    # Only now: --help and wrong options should not have to wait for torch.
    from builders import pack as build
    from datasets.packed.pack import finish, names_below
    from datasets.packed.store import PackedImages
    from datasets.packed.store_writer import Parts, is_packed
    from datasets.unreadable import check_readable

    if args.verify is not None:
        build.verify(args)
        return
    folder = Path(os.path.expanduser(args.output))
    with disk_errors(f"--output {folder}", BadInput):
        is_packed(folder, {})  # refuse an unsuitable folder before a long scan of the data
    labelled, splits, data, notes = build.open_data(args)
    plan = build.make_plan(args, labelled, data)
    with disk_errors(f"--output {folder}", BadInput):
        if is_packed(folder, plan):
            print(f"{folder}: is already packed")
            return
    check_readable(data)
    with disk_errors(f"--output {folder}", BadInput):
        build.announce(folder, labelled, data, notes)
        stop = StopRequest()
        stop.install()
        parts = Parts(folder, plan)
    try:
        pack_images(args, parts, data, stop)
        with disk_errors(folder, advice=RESUMES):
            finish(
                parts,
                plan,
                names=names_below(args.data_path, data),
                splits=splits,
                labelled=labelled,
                notes=notes,
            )
    finally:
        parts.close()
    store = PackedImages(folder)
    for line in (*store.manifest["duplicates"], f"{folder}: {store.described()}"):
        print(line)


def pack_images(
    args: argparse.Namespace, parts: "Parts", data: "ToPack", stop: StopRequest
) -> None:
    """Decode the images that are not packed yet and write them in order.

    Raises Stopped when asked to stop, BadInput if too many images cannot be read, Fault if the disk
    fails.
    """
    from tqdm import tqdm

    from training.bad_images import MAX_BAD_SHARE
    from training.run import worker_count

    workers = worker_count(args.num_workers, own_cores())
    begin, began, told = len(parts.images), time.monotonic(), len(parts.full)
    bad = sum(isinstance(item, str) for item in parts.images)
    if begin:
        print(f"resuming after {begin:,} images", flush=True)
    left = data.in_order(begin, workers)
    for image in tqdm(left, initial=begin, total=len(data), unit="image", disable=None):
        with disk_errors(parts.folder, advice=RESUMES):
            parts.add(image)
            if stop.asked():
                parts.keep()
        done = len(parts.images)
        bad += isinstance(image, str)
        if bad > MAX_BAD_SHARE * len(data):
            raise BadInput(
                f"--data_path {args.data_path}: {bad} of {len(data)} images cannot be read, more "
                f"than {MAX_BAD_SHARE:.0%} (the last: {data.name(done - 1)}: {image}); repair or "
                f"remove them, remove {parts.folder} too, and pack again"
            )
        if stop.asked():
            raise Stopped(
                f"asked to stop ({stop.signal}) after {done:,} images; the same command resumes "
                "from there"
            )
        if len(parts.full) > told:
            told = len(parts.full)
            speed = (done - begin) / (time.monotonic() - began)
            rest = duration((len(data) - done) / speed)
            print(
                f"{done:,} of {len(data):,} images, {speed:.0f} per second, {rest} left", flush=True
            )
    with disk_errors(parts.folder, advice=RESUMES):
        parts.end_part()


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
