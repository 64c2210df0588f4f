"""From the options of drawing figures to the model, its images and the figures."""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from datasets import open_images, open_labelled, synthetic_size
from datasets.duplicates import duplicate_warnings
from datasets.finetune import match_classes, test_split
from datasets.labelled import LabelledSet, describe_labelled
from datasets.registry import detect_data_set
from datasets.unreadable import check_readable
from inference.visualize import FigureData, Viewer
from models_masked import MaskedAutoencoder
from models_saved import Saved, SavedAutoencoder, SavedClassifier, open_saved
from training.run import worker_count
from util.distributed import ProcessInfo, own_cores, pick_device
from util.errors import BadInput
from util.evaluation_dir import FigureSource
from util.options.parser import Options
from util.options.trained import OF_DATA, difference_lines, differences, trained_with
from util.options.visualize import OF_ALL, OF_CLASSIFIERS, OF_RESULTS
from util.patch_counts import visible_patches

RATIOS = (0.5, 0.75, 0.9)  # of masked patches, unless --mask_ratios are given


class Opened(NamedTuple):
    """A model with its data, and the figures to draw."""

    viewer: Viewer
    wanted: Sequence[str]  # of FIGURES
    drawn: FigureSource


def open_model(args: Options) -> Opened:
    """Open the checkpoint and the images; choose all possible figures if none are requested.

    Raises BadInput for figures that this checkpoint or these images do not allow.
    """
    device = pick_device(args.device, ProcessInfo())
    saved = open_saved(args.checkpoint, args.classes, args.cache_dir)
    for line in saved.notes:
        print(f"note: {line}", file=sys.stderr)
    allowed = OF_CLASSIFIERS if isinstance(saved, SavedClassifier) else ()
    if isinstance(saved, SavedAutoencoder):
        allowed = ("reconstructions",)
    for name in args.figures or ():
        if name not in (*allowed, *OF_ALL):
            what = "has no decoder; use a pre-training checkpoint"
            if name in OF_CLASSIFIERS:
                what = "was pre-trained only; use a fine-tuned checkpoint"
            raise BadInput(f"--figures {name}: {args.checkpoint} {what}")
    data, drawn = open_data(args, saved)
    wanted = args.figures or (*allowed, "features")
    if data.labels is None and "features" in wanted:
        if args.figures or not allowed:
            what = f"{args.data_path} has no labels to colour it by; use a labelled data set"
            raise BadInput(f"--figures features: {what}")
        wanted = allowed
    workers = worker_count(args.num_workers, own_cores())
    viewer = Viewer(
        saved, data, device=device, batch_size=args.batch_size, workers=workers, seed=args.seed
    )
    return Opened(viewer, wanted, drawn)


def open_data(args: Options, saved: Saved) -> tuple[FigureData, FigureSource]:
    """The images of `--data_path`, with labels if they have any.

    Raises BadInput for a classifier without labels, and for options on labels that there are not.
    """
    classifies = isinstance(saved, SavedClassifier)
    name = args.data_set
    if name == "auto" and not classifies:
        name = detect_data_set(args.data_path) or "none"
    if name != "none":
        return open_with_labels(args, saved, name)
    if classifies:
        raise BadInput("--data_set none: the figures of a classifier need labels; leave it out")
    for option in ("nb_classes", "label_rule", "label_order", "split"):
        if getattr(args, option) is not None:
            raise BadInput(f"--{option}: these images have no labels; leave it out")
    return open_without_labels(args, saved)


def open_without_labels(args: Options, saved: Saved) -> tuple[FigureData, FigureSource]:
    """Images without labels."""
    trained = trained_with(saved.checkpoint, args.checkpoint)
    source, notes, margin = open_images(
        args.data_path,
        size=synthetic_size(saved.preprocessing.input_size),
        face_margin=args.face_margin,
        trained=trained,
    )
    differ = {name: trained[name] for name in ("face_margin",) if name in trained}
    lines = difference_lines(differences(args, differ, {"face_margin": margin}), "drawn")
    for line in (*notes, *lines):
        print(line, flush=True)
    check_readable(source)
    return FigureData(source, None, (), ()), FigureSource(args.checkpoint, args.data_path)


def open_with_labels(args: Options, saved: Saved, name: str) -> tuple[FigureData, FigureSource]:
    """A split of a labelled data set; for a classifier, only images of its own classes."""
    trained = trained_with(saved.checkpoint, args.checkpoint)
    labelled = open_labelled(
        args.data_path,
        name,
        nb_classes=args.nb_classes,
        label_rule=args.label_rule,
        label_order=args.label_order,
        face_margin=args.face_margin,
        trained=trained,
        size=synthetic_size(saved.preprocessing.input_size),
    )
    split, lines = split_of(labelled, args.split)
    images, classes, about = labelled.splits[split], labelled.classes, describe_labelled(labelled)
    common = range(len(classes))
    drawn = FigureSource(args.checkpoint, args.data_path)
    if isinstance(saved, SavedClassifier):
        classes = saved.classes
        matched = match_classes(labelled, images, classes)
        images, common = matched.images, matched.common
        lines += matched.lines()
        own = saved.checkpoint
        facts = {"split": split, "flip": saved.flip, "classes": [classes[k] for k in common]}
        facts |= {"epoch": own.get("epoch"), "weights": own.get("evaluated")}
        drawn = drawn._replace(facts=facts, report=about)
    differ = {name: trained[name] for name in OF_DATA if name in trained}
    lines += difference_lines(differences(args, differ, labelled.options), "drawn")
    print(*about, *lines, *duplicate_warnings(labelled.splits), sep="\n", flush=True)
    check_readable(images.source)
    return FigureData(images.source, images.labels, classes, common), drawn


def split_of(labelled: LabelledSet, split: str | None) -> tuple[str, list[str]]:
    """The name of the given split, else of the one to test on, and lines to print about it.

    Raises BadInput for a split that the data set does not have.
    """
    if split is None:
        return test_split(labelled, "--data_path")
    if split not in labelled.splits:
        there = ", ".join(labelled.splits)
        raise BadInput(f"--split {split}: {labelled.title} has no such split; it has {there}")
    return split, []


def draw_model(args: Options, opened: Opened) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the figures of the checkpoint with their file names, each as soon as it is drawn."""
    viewer, wanted, _ = opened
    if "reconstructions" in wanted:
        ratios = possible_ratios(args.mask_ratios, viewer.model)
        yield "reconstructions", viewer.reconstructions(args.count, ratios)
    if "attention" in wanted:
        yield "attention", viewer.attention(args.count)
    if files := [OF_RESULTS[name] for name in wanted if name in OF_RESULTS]:
        charts = viewer.results()
        yield from ((file, charts[file]) for file in files)
    if "features" in wanted:
        yield "features", viewer.features()
    if lost := viewer.unreadable:
        images = f"{lost:,} image{'s' * (lost != 1)}"
        print(f"left out of charts and feature map: {images} that cannot be read", flush=True)


def possible_ratios(given: list[float] | None, model: MaskedAutoencoder) -> list[float]:
    """The given mask ratios, else those of RATIOS that leave some patches visible and mask some.

    Raises BadInput for a given one that does not.
    """
    ratios = []
    for ratio in sorted(set(given or RATIOS)):
        try:
            visible_patches(model.num_patches, ratio)
        except BadInput as error:
            if given:
                raise BadInput(str(error).replace("--mask_ratio", "--mask_ratios", 1)) from None
        else:
            ratios.append(ratio)
    return ratios or [model.mask_ratio]
