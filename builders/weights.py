"""The weights that fine-tuning and evaluation start from, and the options of their training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from backbones import family_of
from datasets import LabelledSet
from datasets.labels import canonical
from models_saved import LARGEST, TrainingRecord, training_record
from util.checkpoint.read import read_checkpoint
from util.distributed import on_main
from util.options.finetune import usual_crop
from util.options.parser import Options, check_input_size
from util.options.trained import OF_IMAGES, OF_WEIGHTS, as_trained, trained_with
from util.weights import find_source, load_pretrained, read_source
from util.wording import printable


def read_finetune(args: Options) -> dict[str, Any]:
    """The checkpoint that `--finetune` names."""
    # Rank 0 first: a released name may have to be downloaded.
    on_main(lambda: bool(find_source(args.finetune, args.cache_dir)))
    return read_source(args.finetune, args.cache_dir)


def start_from_pretrained(args: Options, model: nn.Module, saved: dict[str, Any]) -> list[str]:
    """Load `--finetune` into a model, except for its head; -> log lines about what was loaded."""
    report = load_pretrained(
        model,
        args.finetune,
        key=weights_key(args, saved),
        prefix=args.model_prefix,
        checkpoint=saved,
    )
    return str(report).splitlines()


def weights_key(args: Options, saved: dict[str, Any]) -> str:
    """The checkpoint entry to load: the given one, else the one that its results belong to."""
    own = saved.get("evaluated")
    return args.model_key if "model_key" in args.given or not isinstance(own, str) else own


def classes_of_checkpoint(
    args: Options, known: Sequence[str], data: LabelledSet
) -> tuple[tuple[str, ...], list[str]]:
    """The class names of a checkpoint's outputs in their order, and log lines about them.

    `known`: the names in the checkpoint itself, if any.
    """
    if args.classes or known:
        return args.classes or tuple(known), []
    listed = ", ".join(map(printable, data.classes))
    return data.classes, [
        f"{args.finetune} names no classes: taken to be {listed}, in this order; --classes names "
        "others"
    ]


def assumed(args: Options, trained: Mapping[str, Any]) -> list[str]:
    """A log line on settings that the checkpoint does not record, so that the options decide."""
    share = "the whole image" if args.crop_pct is None else f"--crop_pct {args.crop_pct:g}"
    norm = f"--imagenet_default_mean_and_std {args.imagenet_default_mean_and_std}"
    shown = {
        "crop_pct": share,
        "test_interpolation": f"--test_interpolation {args.test_interpolation}",
        "imagenet_default_mean_and_std": norm,
    }
    unknown = [text for name, text in shown.items() if name not in trained]
    return [f"assumed, since the checkpoint does not say: {'; '.join(unknown)}"] if unknown else []


def use_of(args: Options, saved: dict[str, Any]) -> TrainingRecord:
    """How the checkpoint of `--finetune` was trained, as far as known."""
    return training_record(args.finetune, saved, weights_key(args, saved), args.model_prefix)


class Use(NamedTuple):
    """How `--eval` and `--knn` use a checkpoint."""

    args: Options
    trained: dict[str, Any]  # see `trained_with`
    classes: tuple[str, ...]  # named by the checkpoint
    notes: list[str]


def use_as_trained(args: Options, saved: dict[str, Any]) -> Use:
    """The options as in the training of `--finetune`, except for those that were given.

    Raises BadInput for a given one that does not fit the weights.
    """
    known = use_of(args, saved)
    trained = dict(known.trained)
    if args.knn:  # features are those of the image alone
        trained.pop("eval_flip", None)
    args, notes = as_trained(args, trained, args.finetune, (*OF_WEIGHTS, *OF_IMAGES))
    args = _with_crop(args, trained)
    check_input_size(args)
    notes += [*known.notes, *assumed(args, trained), *_without_effect(args, saved)]
    return Use(args, trained, known.classes, notes)


def other_outputs(
    args: Options, saved: dict[str, Any], known: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Which weights and classes differ from training; see `differences`. `known`: its classes."""
    found, own, key = {}, saved.get("evaluated"), weights_key(args, saved)
    if isinstance(own, str) and key != own:
        found["model_key"] = {"tested": key, "trained": own}
    if args.classes and known and canonical(args.classes) != canonical(known):
        found["classes"] = {"tested": ",".join(args.classes), "trained": ",".join(known)}
    return found


def _with_crop(args: Options, taken: Mapping[str, Any]) -> Options:
    """The options with the default crop, unless one was given or `taken` from a checkpoint."""
    settled = "crop_pct" in args.given or "crop_pct" in taken
    return args if settled else args.but(crop_pct=usual_crop(args))


def _without_effect(args: Options, saved: dict[str, Any]) -> list[str]:
    """Log lines on options, perhaps from a recipe, that only affect training."""
    lines = []
    if args.eval and args.select != "test":
        lines.append(f"--select {args.select} has no effect: it chooses an epoch in training")
    for option in ("teacher", "pseudo_labels"):
        if getattr(args, option):
            lines.append(f"--{option} has no effect: it teaches in training")
    if args.model_ema_eval and weights_key(args, saved) != "model_ema":
        lines.append(
            "--model_ema_eval has no effect: this checkpoint's results are of its "
            f"{weights_key(args, saved)}; --model_key model_ema tests the EMA"
        )
    return lines


def _fits(args: Options, size: int | None) -> bool:
    """Whether the model accepts images of this side length in pixels; None: unknown, so no."""
    step = family_of(args.model).patch_step(args.model, args.patch_size, masked=False)
    return size is not None and size <= LARGEST and size % step == 0


def start_like_pretraining(
    args: Options, path: Path | None
) -> tuple[Options, dict[str, Any], dict[str, Any], list[str]]:
    """The options with those adopted from the training of the checkpoint of `--finetune`.

    -> options, checkpoint (empty if the run resumes from `path`), the options it was trained with,
    and log lines. Images have the same size and are normalised, and faces cropped, as in that
    training; for frozen features, images are also cropped and resized in the same way.
    """
    names = ["imagenet_default_mean_and_std"]
    frozen = args.linear_probe or args.freeze_backbone
    if path:  # it was trained with these options already
        saved, trained = {}, trained_with(read_checkpoint(path, peek=True), path)
    else:
        saved = read_finetune(args) if args.finetune else {}
        trained = use_of(args, saved).trained if args.finetune else {}
    if path or _fits(args, trained.get("input_size")):
        names.append("input_size")
    if path or frozen:
        names += ["crop_pct", "test_interpolation"]
    args, told = as_trained(args, trained, args.finetune, names)
    if frozen and "train_interpolation" not in args.given:
        args = args.but(train_interpolation=args.test_interpolation)
    args = _with_crop(args, {name: trained[name] for name in names if name in trained})
    check_input_size(args)
    seen = (*names, "input_size", "face_margin")
    return args, saved, {name: trained[name] for name in seen if name in trained}, told
