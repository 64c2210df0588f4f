"""Model names and dimensions, without torch: option parsing and error messages read them here.

Sources: MAE (He et al. 2022, table 1 and appendix), DeiT for tiny and small; ConvNeXt V2
(Woo et al. 2023, section 5 and table 14); ResNet (He et al. 2016, table 1).
"""

import difflib
from typing import NamedTuple

from util.errors import BadInput


class ViTSize(NamedTuple):
    dim: int
    depth: int
    heads: int
    patch: int


class ConvNeXtSize(NamedTuple):
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]


class ResNetSize(NamedTuple):
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]  # of the stages' maps
    bottleneck: bool  # blocks of three convolutions, not of two


Size = ViTSize | ConvNeXtSize | ResNetSize

VIT = {
    "tiny": ViTSize(192, 12, 3, 16),
    "small": ViTSize(384, 12, 6, 16),
    "base": ViTSize(768, 12, 12, 16),
    "large": ViTSize(1024, 24, 16, 16),
    "huge": ViTSize(1280, 32, 16, 14),
}


def _convnext(width: int, *depths: int) -> ConvNeXtSize:
    return ConvNeXtSize(depths, (width, 2 * width, 4 * width, 8 * width))


CONVNEXTV2 = {
    "atto": _convnext(40, 2, 2, 6, 2),
    "femto": _convnext(48, 2, 2, 6, 2),
    "pico": _convnext(64, 2, 2, 6, 2),
    "nano": _convnext(80, 2, 2, 8, 2),
    "tiny": _convnext(96, 3, 3, 9, 3),
    "base": _convnext(128, 3, 3, 27, 3),
    "large": _convnext(192, 3, 3, 27, 3),
    "huge": _convnext(352, 3, 3, 27, 3),
}

CONVNEXT_PATCH = 32  # pixels a side of one masked patch: the encoder's total stride

RESNET = {
    "resnet18": ResNetSize((2, 2, 2, 2), (64, 128, 256, 512), False),
    "resnet34": ResNetSize((3, 4, 6, 3), (64, 128, 256, 512), False),
    "resnet50": ResNetSize((3, 4, 6, 3), (256, 512, 1024, 2048), True),
}
RESNET_STRIDES = (4, 8, 16, 32)  # side length in pixels of a cell after each stage
RESNET_PATCHES = (8, 16, 32)  # side lengths in pixels that a masked patch may have

_VIT_NAMES = {f"vit_{size}_patch{dims.patch}": dims for size, dims in VIT.items()}
_CONVNEXT_NAMES = {f"convnextv2_{size}": dims for size, dims in CONVNEXTV2.items()}

_CONVOLUTIONAL = {**_CONVNEXT_NAMES, **RESNET}

PRETRAIN_SIZES = {**{f"mae_{name}": dims for name, dims in _VIT_NAMES.items()}, **_CONVOLUTIONAL}
CLASSIFIER_SIZES = {**_VIT_NAMES, **_CONVOLUTIONAL}


def family(name: str) -> str:
    """`"mae"`, `"convnextv2"` or `"resnet"`: which of the families a model name belongs to."""
    return next((kind for kind in ("convnextv2", "resnet") if name.startswith(kind)), "mae")


def patch_step(name: str, patch_size: int | None, masked: bool) -> int:
    """What an input's side length has to be a multiple of; `patch_size` None: the usual one."""
    if family(name) == "convnextv2":
        return CONVNEXT_PATCH
    if family(name) == "resnet":
        return (patch_size or RESNET_STRIDES[-1]) if masked else 1
    return patch_size or CLASSIFIER_SIZES[name.removeprefix("mae_")].patch


def find_size(name: str, sizes: dict, flag: str = "--model") -> Size:
    """The dimensions of a model. Raises BadInput with the nearest names for an unknown one."""
    if name in sizes:
        return sizes[name]
    near = difflib.get_close_matches(name, sizes, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(sizes)}"
    raise BadInput(f"{flag} {name}: no such model; {hint}")


def kept_patches(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay visible; the epsilon keeps 100 patches at 0.8 from losing one."""
    keep = int(num_patches * (1 - mask_ratio) + 1e-6)
    if not 0 < keep < num_patches:
        raise BadInput(
            f"--mask_ratio {mask_ratio} keeps {keep} of {num_patches} patches; "
            "some must be kept and some removed"
        )
    return keep


def predicted_patches(masked: int, predict_ratio: float) -> int:
    """How many of the masked patches the decoder predicts, at least one; see `kept_patches`."""
    return max(1, int(masked * predict_ratio + 1e-6))
