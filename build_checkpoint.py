"""From `--finetune` and `--resume` of fine-tuning to weights, and to how these were trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from datasets import LabelledSet
from datasets.decode import printable
from datasets.labels import canonical
from engine_finetune import reset_head
from models_saved import Known, known_use
from util.checkpoint import read_checkpoint
from util.distributed import on_main
from util.options import Options
from util.options_finetune import check_input_size
from util.options_trained import as_trained, trained_with
from util.weights import find_source, load_pretrained, read_source


def read_finetune(args: Options) -> dict[str, Any]:
    """The checkpoint that `--finetune` names."""
    # Rank 0 first: a released name may have to be downloaded.
    on_main(lambda: bool(find_source(args.finetune, args.cache_dir)))
    return read_source(args.finetune, args.cache_dir)


def begin_with_pretrained(args: Options, model: nn.Module, saved: dict[str, Any]) -> list[str]:
    """`--finetune` into a model, with a small fresh head; -> lines that say what fitted."""
    report = load_pretrained(
        model,
        args.finetune,
        key=weights_key(args, saved),
        prefix=args.model_prefix,
        checkpoint=saved,
    )
    reset_head(model, std=0.01 if args.linear_probe else 2e-5)
    return str(report).splitlines()


def weights_key(args: Options, saved: dict[str, Any]) -> str:
    """The entry of a checkpoint to use: as asked for, else the one that its results belong to."""
    own = saved.get("evaluated")
    return args.model_key if "model_key" in args.given or not isinstance(own, str) else own


def name_classes(
    args: Options, known: Sequence[str], data: LabelledSet
) -> tuple[tuple[str, ...], list[str]]:
    """The names of a checkpoint's outputs in their order, and what to say of them.

    `known`: those it names itself.
    """
    if args.classes and known and canonical(args.classes) != canonical(known):
        own = ", ".join(map(printable, known))
        return args.classes, [f"warning: classes as in --classes; the checkpoint says {own}"]
    if args.classes or known:
        return args.classes or tuple(known), []
    listed = ", ".join(map(printable, data.classes))
    return data.classes, [
        f"{args.finetune} names no classes: taken to be {listed}, in this order; --classes names "
        "others"
    ]


def assumed(args: Options, trained: Mapping[str, Any]) -> list[str]:
    """The line on what a checkpoint does not say of its images, so that the options decide."""
    share = "the whole image" if args.crop_pct is None else f"--crop_pct {args.crop_pct:g}"
    norm = f"--imagenet_default_mean_and_std {args.imagenet_default_mean_and_std}"
    shown = {"crop_pct": share, "imagenet_default_mean_and_std": norm}
    unknown = [text for name, text in shown.items() if name not in trained]
    return [f"assumed, for the checkpoint does not say: {'; '.join(unknown)}"] if unknown else []


def use_of(args: Options, saved: dict[str, Any]) -> Known:
    """How the checkpoint of `--finetune` was trained, as far as it is known."""
    return known_use(args.finetune, saved, weights_key(args, saved), args.model_prefix)


def begin_like_pretraining(
    args: Options, path: Path | None
) -> tuple[Options, dict[str, Any], dict[str, Any], list[str]]:
    """The options with what this training takes over from the one that `--finetune` names.

    -> them, that checkpoint (empty where the run continues at `path`), what it was trained with,
    and lines about it. Images are normalised and faces cropped alike; frozen features also need
    images of the same size.
    """
    names = ["imagenet_default_mean_and_std"]
    if path:  # whose options are those already
        saved, trained = {}, trained_with(read_checkpoint(path, peek=True), path)
        names.append("input_size")
    else:
        saved = read_finetune(args) if args.finetune else {}
        trained = use_of(args, saved).trained if args.finetune else {}
        names += ["input_size"] * (args.linear_probe or args.freeze_backbone)
    args, told = as_trained(args, trained, args.finetune, names)
    check_input_size(args)
    seen = (*names, "input_size", "face_margin")
    return args, saved, {name: trained[name] for name in seen if name in trained}, told
