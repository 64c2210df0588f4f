"""From the options of packing to its parts: the images, and what determines a store's bytes."""

import argparse
import os
import shutil
from pathlib import Path

from datasets import LabelledSet, open_images, open_labelled
from datasets.labelled import describe_labelled
from datasets.packed.pack import ToPack
from datasets.packed.store import FORMAT, VERSION, PackedImages, gigabytes, is_store
from datasets.registry import detect_data_set, settings
from util.errors import BadInput


def verify(args: argparse.Namespace) -> None:
    """Check all bytes of the store of --verify or --output. Raises BadInput for a damaged one."""
    folder = Path(os.path.expanduser(args.verify or args.output))
    if not is_store(folder):
        raise BadInput(f"--verify {folder}: is not a packed store")
    store = PackedImages(folder)
    store.verify()
    print(f"{folder}: {store.described()}; every byte is intact")


def open_data(
    args: argparse.Namespace,
) -> tuple[LabelledSet | None, dict[str, int], ToPack, list[str]]:
    """The labelled set (None without labels), image counts by split, the images, and notes.

    Notes are lines to print about images without labels. Raises BadInput.
    """
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
    args: argparse.Namespace, labelled: LabelledSet | None, data: ToPack
) -> dict[str, object]:
    """Everything that determines the bytes of a store."""
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


def announce(folder: Path, labelled: LabelledSet | None, data: ToPack, notes: list[str]) -> None:
    """Print what will be written. Raises BadInput if the disk does not have room for it."""
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
