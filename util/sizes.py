"""Model names and dimensions, without torch: option parsing and error messages read them here.

Sources: MAE (He et al. 2022, table 1 and appendix), DeiT for tiny and small; ConvNeXt V2
(Woo et al. 2023, section 5 and table 14).
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

_VIT_NAMES = {f"vit_{size}_patch{dims.patch}": dims for size, dims in VIT.items()}
_CONVNEXT_NAMES = {f"convnextv2_{size}": dims for size, dims in CONVNEXTV2.items()}

PRETRAIN_SIZES = {**{f"mae_{name}": dims for name, dims in _VIT_NAMES.items()}, **_CONVNEXT_NAMES}
CLASSIFIER_SIZES = {**_VIT_NAMES, **_CONVNEXT_NAMES}


def family(name: str) -> str:
    """`"mae"` or `"convnextv2"`: which of the two families a model name belongs to."""
    return "convnextv2" if name.startswith("convnextv2") else "mae"


def find_size(name: str, sizes: dict, flag: str = "--model") -> ViTSize | ConvNeXtSize:
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
