"""Decode a data set once into a packed store, which training memory-maps.

    python main_pack.py --data_path RAF-DB --output STORE    # then: --data_path STORE
    python main_pack.py --verify STORE

After an interruption, the same command resumes.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from util.errors import BadInput, Stopped
from util.files import disk_errors
from util.options.groups import FACE_MARGIN, LABEL_ORDER, LABEL_RULE, UNLABELLED
from util.options.parser import COUNT, RATE, SIZE, Parser
from util.program import run_program

if TYPE_CHECKING:
    from datasets import LabelledSet
    from datasets.packed.pack import ToPack
    from datasets.packed.store_writer import Parts
    from util.stop import StopRequest

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
    """Pack or verify."""
    if args.verify is not None:
        verify(Path(os.path.expanduser(args.verify or args.output)))
    else:
        pack(args)


def verify(folder: Path) -> None:
    """Check all bytes of a store. Raises BadInput for a damaged one."""
    from datasets.packed.store import PackedImages, is_store

    if not is_store(folder):
        raise BadInput(f"--verify {folder}: is not a packed store")
    store = PackedImages(folder)
    store.verify()
    print(f"{folder}: {store.described()}; every byte is intact")


def pack(args: argparse.Namespace) -> None:
    """Write the store, or the rest of an unfinished one."""
    from datasets.packed.pack import finish
    from datasets.packed.store import PackedImages
    from datasets.packed.store_writer import Parts, is_packed
    from datasets.unreadable import check_readable
    from util.stop import StopRequest

    folder = Path(os.path.expanduser(args.output))
    with disk_errors(f"--output {folder}", BadInput, "name another folder"):
        is_packed(folder, {})  # refuse an unsuitable folder before a long scan of the data
    labelled, splits, data, notes = open_data(args)
    plan = make_plan(args, labelled, data)
    with disk_errors(f"--output {folder}", BadInput, "name another folder"):
        if is_packed(folder, plan):
            print(f"{folder}: is already packed")
            return
    check_readable(data)
    with disk_errors(f"--output {folder}", BadInput, "name another folder"):
        announce(folder, labelled, data, notes)
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


def open_data(
    args: argparse.Namespace,
) -> tuple["LabelledSet | None", dict[str, int], "ToPack", list[str]]:
    """The labelled set (None without labels), image counts by split, the images, and notes.

    Notes are lines to print about images without labels. Raises BadInput.
    """
    from datasets import open_images, open_labelled
    from datasets.packed.pack import ToPack
    from datasets.registry import detect_data_set

    name = args.data_set
    if name == "auto":
        name = detect_data_set(args.data_path) or "none"
    if name == "none":
        for option in ("nb_classes", "label_rule", "label_order"):
            if getattr(args, option) is not None:
                raise BadInput(f"--{option}: these images are packed without labels")
        images = open_images(
            args.data_path, size=synthetic_side(args), face_margin=args.face_margin
        )
        data = ToPack([images.source], args.short_side)
        return None, {"all": len(data)}, data, images.notes
    try:
        labelled = open_labelled(
            args.data_path,
            name,
            nb_classes=args.nb_classes,
            label_rule=args.label_rule,
            label_order=args.label_order,
            face_margin=args.face_margin,
            size=synthetic_side(args),
        )
    except BadInput as error:
        if args.data_set != "auto" or name not in ("folder", "list"):
            raise
        raise BadInput(f"{error}; --data_set none packs the images without labels") from None
    splits = {split: len(images) for split, images in labelled.splits.items()}
    sources = [images.source for images in labelled.splits.values()]
    return labelled, splits, ToPack(sources, args.short_side), []


def synthetic_side(args: argparse.Namespace) -> int:
    """The side length in pixels of synthetic faces."""
    return args.short_side or 256


def make_plan(
    args: argparse.Namespace, labelled: "LabelledSet | None", data: "ToPack"
) -> dict[str, object]:
    """Everything that determines the bytes of a store."""
    from datasets.packed.store import FORMAT, VERSION
    from datasets.registry import settings

    names = ("label_rule", "label_order", "face_margin")
    given = {name: getattr(args, name) for name in names}
    return {
        "format": FORMAT,
        "version": VERSION,
        "short_side": args.short_side,
        "data_set": labelled.name if labelled else "none",
        "settings": settings(labelled and labelled.name, given),
        "count": len(data),
        "data": labelled.digest if labelled else data.digest,
    }


def announce(
    folder: Path, labelled: "LabelledSet | None", data: "ToPack", notes: list[str]
) -> None:
    """Print what will be written. Raises BadInput if the disk does not have room for it."""
    from datasets.labelled import describe_labelled
    from datasets.packed.store import gigabytes

    unlabelled = [f"{len(data):,} images without labels", *notes]
    for line in describe_labelled(labelled) if labelled else unlabelled:
        print(line)
    size, there = data.estimated_bytes(), sum(p.stat().st_size for p in folder.glob("part-*.bin"))
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free
    need = max(0, size - there)
    print(f"{folder}: about {gigabytes(size)}; {gigabytes(free)} are free", flush=True)
    if need > free:
        what = f"about {gigabytes(need)} more are needed, but only {gigabytes(free)} are free"
        raise BadInput(f"--output {folder}: {what}; use another disk or a smaller --short_side")


def pack_images(
    args: argparse.Namespace, parts: "Parts", data: "ToPack", stop: "StopRequest"
) -> None:
    """Decode the images that are not packed yet and write them in order.

    Raises Stopped when asked to stop, BadInput if too many images cannot be read, Fault if the disk
    fails.
    """
    from tqdm import tqdm

    from training.bad_images import MAX_BAD_SHARE
    from training.run import worker_count
    from util.distributed import ProcessInfo
    from util.log import duration

    workers = worker_count(args.num_workers, ProcessInfo())
    begin, began, told = len(parts.images), time.monotonic(), len(parts.full)
    bad = sum(isinstance(item, str) for item in parts.images)
    if begin:
        print(f"resuming after {begin:,} images", flush=True)
    left = data.in_order(begin, workers)
    for image in tqdm(left, initial=begin, total=len(data), unit="image", disable=None):
        with disk_errors(parts.folder, advice=RESUMES):
            parts.add(image)
            if stop.signal:
                parts.keep()
        done = len(parts.images)
        bad += isinstance(image, str)
        if bad > MAX_BAD_SHARE * len(data):
            raise BadInput(
                f"--data_path {args.data_path}: {bad} of {len(data)} images cannot be read, more "
                f"than {MAX_BAD_SHARE:.0%} (the last: {data.name(done - 1)}: {image}); repair or "
                f"remove them, remove {parts.folder} too, and pack again"
            )
        if stop.signal:
            raise Stopped(
                f"asked to stop after {done:,} images; the same command resumes from there"
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


def names_below(data_path: str, data: "ToPack") -> list[str]:
    """Image names relative to the data set, so that they do not depend on where it is."""
    path = os.path.abspath(os.path.expanduser(data_path))
    names = (data.name(i) for i in range(len(data)))
    roots = path + os.sep, os.path.dirname(path) + os.sep  # a list's images are beside it
    return [name.removeprefix(roots[0]).removeprefix(roots[1]) for name in names]


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
