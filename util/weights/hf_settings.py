"""What transformers stores beside weights: `config.json` and `preprocessor_config.json`.

Both may hold anything; only what makes sense is used.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from util.errors import BadInput
from util.safe_json import number, parse_object, part, read_text
from util.weights.layouts import Architecture

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
EPS = 1e-6  # of every LayerNorm in our models; transformers' default is 1e-12
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, as in image processors
WARPED = 384  # from this size on, ConvNextImageProcessor does not crop
OPTIONS = {  # of pre-training, not visible in weights
    "mask_ratio": "mask_ratio",
    "norm_pix_loss": "norm_pix_loss",
    "decoder_num_attention_heads": "decoder_num_heads",
}


class Described(NamedTuple):
    """What is known of weights from files beside them, in the form of our own checkpoints."""

    settings: dict[str, Any]  # `classes`, `args`, `preprocessing`, as far as known
    notes: list[str]  # what our models do differently, one line each


def check_config(source: str | Path, held: Architecture) -> None:
    """Raises BadInput if `config.json` describes a model that ours is not.

    Weights show their sizes, but neither the number of attention heads nor the activation.
    """
    config = _beside(source, CONFIG)
    wanted: dict[str, tuple] = {"hidden_act": ("gelu", "gelu_python")}
    if heads := getattr(held.size, "heads", None):
        wanted["num_attention_heads"] = (heads,)
    for name, values in wanted.items():
        if name in config and config[name] not in values:
            raise BadInput(
                f"{source}: {CONFIG} beside it says {name} {_short(config[name])}, but our "
                f"{held} has {values[0]}"
            )


def described_beside(source: str | Path, size: int | None) -> Described:
    """What the files beside weights say of them; the input has a side length of `size` pixels.

    `size` is None if the weights do not show it.
    """
    config, processor = _beside(source, CONFIG), _beside(source, PROCESSOR)
    made, crop_pct = _view(processor)
    size = size or made or _edge(config.get("image_size")) or 224
    preprocessing = {"input_size": size, "crop_pct": crop_pct, **_normalisation(processor)}
    preprocessing["interpolation"] = _interpolation(processor) or "bicubic"
    given = {ours: config[theirs] for theirs, ours in OPTIONS.items() if theirs in config}
    options = {n: v if isinstance(v, int | float) else _short(v) for n, v in given.items()}
    settings = {"args": options, "preprocessing": preprocessing}
    if names := _class_names(config):
        settings["classes"] = names
    return Described(settings, _differences(config, processor, size))


def _beside(source: str | Path, name: str) -> dict[str, Any]:
    return parse_object(read_text(Path(source).parent / name))


def _class_names(config: dict[str, Any]) -> list[str]:
    """Class names in order; [] if they are missing, or as generic as `LABEL_0`."""
    labels = part(config, "id2label")
    names = [labels.get(str(k)) for k in range(len(labels))]
    named = all(isinstance(n, str) and n and not re.fullmatch(r"LABEL_\d+", n) for n in names)
    return names if named else []


def _differences(config: dict[str, Any], processor: dict[str, Any], size: int) -> list[str]:
    """What our models and their preprocessing do differently, one line each."""
    lines = []
    if (eps := config.get("layer_norm_eps", EPS)) != EPS:
        lines.append(f"{CONFIG}: layer_norm_eps is {_short(eps)}; {EPS} is used instead")
    if not _interpolation(processor):
        other = _short(processor["resample"])
        lines.append(
            f"{PROCESSOR}: resample is {other}; {RESAMPLE['bicubic']} (bicubic) is used instead"
        )
    made, _ = _view(processor)
    if processor and not made:
        what = "its resizing and cropping are not supported; whole pictures are squeezed"
        lines.append(f"{PROCESSOR}: {what}")
    elif made and made != size:
        lines.append(f"{PROCESSOR}: its pictures are {made} px wide; {size} px is used instead")
    return lines


def _interpolation(processor: dict[str, Any]) -> str:
    """How it resizes pictures; "" if we have no such method."""
    kind = processor.get("image_processor_type", processor.get("feature_extractor_type"))
    usual = "bilinear" if isinstance(kind, str) and kind.startswith("ViT") else "bicubic"
    given = processor.get("resample", RESAMPLE[usual])  # default: theirs
    return next((name for name, value in RESAMPLE.items() if value == given), "")


def _view(processor: dict[str, Any]) -> tuple[int | None, float | None]:
    """The side length of its output in pixels, and `crop_pct`; no size if that is unsupported."""
    kind = processor.get("image_processor_type", processor.get("feature_extractor_type"))
    convnext = isinstance(kind, str) and kind.startswith("ConvNext")
    size = processor.get("size")
    size = {"shortest_edge": size} if convnext and type(size) is int else size  # before 4.25
    whole, crop = _square(size), _square(processor.get("crop_size"))
    short = _edge(size.get("shortest_edge")) if isinstance(size, dict) else None
    crops = bool(processor.get("do_center_crop"))
    if not processor.get("do_resize", True):
        return None, None
    if convnext and short:
        share = number(processor.get("crop_pct", 224 / 256)) or 0.0  # 0 is refused later
        return short, share if short < WARPED else None
    if crops and short and crop and crop <= short:
        return crop, crop / short
    return (None if crops and crop != whole else whole), None


def _square(size: object) -> int | None:
    """The side length in pixels, if it is a square."""
    if not isinstance(size, dict):
        return _edge(size)
    height, width = _edge(size.get("height")), _edge(size.get("width"))
    return height if height == width else None


def _edge(pixels: object) -> int | None:
    return pixels if type(pixels) is int and 0 < pixels < 100_000 else None


def _normalisation(processor: dict[str, Any]) -> dict[str, Any]:
    """`mean` and `std` of pixels in 0–1, as far as they are given."""
    given = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    if not processor.get("do_normalize", True):
        given = {"mean": 0, "std": 1}
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    scale = 255 * (number(factor) or 0)
    return {name: _divided(value, scale) for name, value in given.items() if value is not None}


def _divided(value: object, scale: float) -> list[float] | None:
    """The numbers of the three channels, or one for all; None, refused later, for anything else."""
    numbers = [number(v) for v in (value if isinstance(value, list) else [value] * 3)]
    return None if None in numbers or scale <= 0 else [v / scale for v in numbers]


def _short(value: object) -> str:
    return f"{value!r:.40}" if isinstance(value, str | int | float) else "of another type"
