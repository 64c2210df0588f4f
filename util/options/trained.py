"""What a checkpoint was trained with, by option names, and how this affects a program's options.

Everything that decides what an image or a label is travels with a checkpoint. A program that opens
it uses these values. An option on the command line is used instead and reported as different, or
refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from backbones import find_family
from util.errors import BadInput
from util.options.parser import MOST, Options
from util.safe_json import number

# The weights only work with these values.
OF_WEIGHTS = ("model", "patch_size", "cls_token", "linear_probe")
# How images are processed and predictions made: other values can be tried.
OF_IMAGES = (
    *("input_size", "crop_pct", "test_interpolation"),
    *("imagenet_default_mean_and_std", "eval_flip"),
)
INTERPOLATIONS = ("bicubic", "bilinear")  # of --test_interpolation
# How images and labels of a data set are read: used if it has such options; see `open_labelled`.
OF_DATA = ("nb_classes", "label_rule", "label_order", "face_margin")


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


# Whether a value from a file, which may be anything, is valid for the option.
IS_VALUE: dict[str, Callable[[Any], bool]] = {
    "model": _text,
    "patch_size": _count,
    "cls_token": _flag,
    "linear_probe": _flag,
    "input_size": _count,
    "crop_pct": lambda value: 0 < (number(value) or 0) <= 1,
    "test_interpolation": lambda value: value in INTERPOLATIONS,
    "imagenet_default_mean_and_std": _flag,
    "eval_flip": _flag,
    "nb_classes": _count,
    "label_rule": _text,
    "label_order": _text,
    "face_margin": lambda value: number(value) is not None and value >= 0,
}
PRETRAINED = ("model", "patch_size", "input_size", "face_margin")


def trained_with(checkpoint: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The options of OF_WEIGHTS, OF_IMAGES and OF_DATA by name, as training resolved them.

    A missing option is not known; None means that training did without it. Files of other programs
    have none. Raises BadInput for an invalid value.
    """
    own = checkpoint.get("args")
    marks = ("classes", "run", "preprocessing")  # of ours, exported ones included
    if not isinstance(own, dict) or checkpoint.keys().isdisjoint(marks):
        return {}
    names = IS_VALUE if "classes" in checkpoint else PRETRAINED
    found = {name: own[name] for name in names if name in own}
    if not is_resolved(checkpoint):
        found = {n: v for n, v in found.items() if v is not None or n not in OF_DATA}
    for name, value in found.items():
        if value is not None and not IS_VALUE[name](value):
            raise BadInput(f"{source}: holds an invalid {name}: {value!r:.40}")
    if "classes" in checkpoint:
        # Older releases had no other and did not record it.
        found["test_interpolation"] = found.get("test_interpolation") or "bicubic"
    else:
        found["imagenet_default_mean_and_std"] = True  # as in all pre-training
    name = str(found.get("model"))
    family = find_family(name)
    if not (family and "cls_token" in family.finetune_options):
        found.pop("cls_token", None)
    if "patch_size" in found and found["patch_size"] is None and family and family.free_patch:
        found["patch_size"] = family.patch_step(name, None, masked=False)
    return found


def is_resolved(checkpoint: Mapping[str, Any]) -> bool:
    """Whether None among the options means that training did without.

    In checkpoints of older releases it stood for the default, not for the absence of a margin.
    """
    seen = checkpoint.get("preprocessing")
    return isinstance(seen, dict) and "face_margin" in seen


def as_trained(
    args: Options, trained: Mapping[str, Any], source: object, names: Sequence[str]
) -> tuple[Options, list[str]]:
    """The options, with `names` as in training unless they were given, and a log line about it.

    Raises BadInput if one of OF_WEIGHTS was given with another value.
    """
    taken = {name: trained[name] for name in names if name in trained and name not in args.given}
    for name in args.given & set(names) & trained.keys() & set(OF_WEIGHTS):
        asked, own = getattr(args, name), trained[name]
        if not _same(name, own, asked):
            raise BadInput(
                f"{_shown(name, asked)}: {source} was trained with {_shown(name, own)}; leave the "
                "option out"
            )
    told = [
        _shown(name, value)
        for name, value in taken.items()
        if not _same(name, value, getattr(args, name))
    ]
    return args.but(**taken), [f"from the checkpoint: {', '.join(told)}"] if told else []


def differences(
    args: Options, trained: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What differs from training: by option {"tested": …, "trained": …}.

    `options` are those of the data set tested on, see LabelledSet. Those that it does not have
    cannot differ, except for the face margin: without one, images are used whole.
    """
    tested = {name: getattr(args, name) for name in OF_IMAGES if name in trained}
    for name in OF_DATA:
        if trained.get(name) is not None and name in options:
            tested[name] = options[name]
    if "face_margin" in trained:
        tested["face_margin"] = options.get("face_margin")
    return {
        name: {"tested": value, "trained": trained[name]}
        for name, value in tested.items()
        if not _same(name, trained[name], value)
    }


def difference_lines(
    found: Mapping[str, Mapping[str, Any]], now: str = "tested", before: str = "trained"
) -> list[str]:
    """A warning for each of `differences`."""
    lines = []
    for name, values in found.items():
        tested, trained = (_shown(name, values[key]) for key in ("tested", "trained"))
        lines.append(f"warning: {now} with {tested}; {before} with {trained}")
    return lines


def _same(name: str, one: Any, other: Any) -> bool:
    if name == "model":
        return _classifier(str(one)) == _classifier(str(other))
    if name == "label_order" and one and other:
        (first, names), (start, others) = _order(one), _order(other)
        return names == others and (first == start or "" in (first, start))
    return one == other


def _classifier(model: str) -> str:
    """The name of the classifier that is fine-tuned from a model."""
    family = find_family(model)
    return family.classifier_name(model) if family else model


def _order(text: str) -> tuple[str, str]:
    """The first number ("" if it is not given) and the names of a `--label_order`."""
    first, _, names = text.rpartition(":")
    return first.strip(), names.strip().lower()


def _shown(name: str, value: Any) -> str:
    """An option and its value, as on a command line."""
    if value is None:
        return {"face_margin": "whole images", "crop_pct": "the whole image"}.get(
            name, f"no --{name}"
        )
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"
