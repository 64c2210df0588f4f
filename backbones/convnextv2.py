"""ConvNeXt V2 and FCMAE: sizes, options, and names in other libraries.

Sizes: ConvNeXt V2 (Woo et al. 2023, section 5 and table 14).
"""

import math
import re
from argparse import Namespace
from typing import TYPE_CHECKING, NamedTuple

from backbones.family import Family
from util.states import State, renamed, root

if TYPE_CHECKING:
    from torch import Tensor

CONVNEXT_PATCH = 32  # side length in pixels of a masked patch: the encoder's total stride
FCMAE_DEFAULTS = {
    "mask_ratio": 0.6,
    "norm_pix_loss": True,
    "blr": 1.5e-4,
    "epochs": 800,
    "decoder_depth": 1,
}
FROM_TIMM = [
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
    (r"^(norm_pre|head\.norm)\.", "norm."),
]
TO_TIMM = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


class ConvNeXtSize(NamedTuple):
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]

    @property
    def width(self) -> int:
        """Channels of the first stage."""
        return self.dims[0]

    @property
    def features(self) -> int:
        """The length of an image's feature vector."""
        return self.dims[-1]


def _size(width: int, *depths: int) -> ConvNeXtSize:
    return ConvNeXtSize(depths, (width, 2 * width, 4 * width, 8 * width))


SIZES = {
    "convnextv2_atto": _size(40, 2, 2, 6, 2),
    "convnextv2_femto": _size(48, 2, 2, 6, 2),
    "convnextv2_pico": _size(64, 2, 2, 6, 2),
    "convnextv2_nano": _size(80, 2, 2, 8, 2),
    "convnextv2_tiny": _size(96, 3, 3, 9, 3),
    "convnextv2_base": _size(128, 3, 3, 27, 3),
    "convnextv2_large": _size(192, 3, 3, 27, 3),
    "convnextv2_huge": _size(352, 3, 3, 27, 3),
}
FINETUNE_DEFAULTS = {
    "epochs": 100,
    "warmup_epochs": 20,
    "blr": 5e-4,
    "layer_decay": 1.0,
    "drop_path": 0.0,
}


class ConvNeXtV2Family(Family):
    """Takes images whose sides are multiples of 32 pixels; masked patches are 32 pixels."""

    title, masked_title = "ConvNeXt V2", "FCMAE"
    module, classifier, autoencoder = "models_convnextv2", "ConvNeXtV2", "FCMAE"
    sizes = SIZES
    pretrain_defaults = FCMAE_DEFAULTS
    finetune_defaults = FINETUNE_DEFAULTS

    stem = "downsample_layers.0.0.weight"
    stages = tuple(f"stages.{i}" for i in range(4))
    roots = frozenset({"downsample_layers", "stages"})
    new_norm = "norm"

    timm_ends = ("stem.0", "head.fc")
    transformers = "convnextv2"

    def patch_step(self, name: str, patch_size: int | None, masked: bool) -> int:
        """See Family."""
        return CONVNEXT_PATCH

    def classifier_options(self, options: Namespace) -> dict[str, object]:
        """See Family."""
        return {"head_init_scale": options.head_init_scale}

    def translate(self, state: State) -> tuple[State, str] | None:
        """See Family: the official sparse code's names, timm's, or ours (the official dense)."""
        if any(name.endswith(".kernel") for name in state):
            return from_minkowski(state), "official FCMAE (Minkowski)"
        roots = {root(name) for name in state}
        if "stem" in roots:
            return from_timm(state), "timm ConvNeXt V2"
        return (state, self.layout(state)) if "downsample_layers" in roots else None

    def masked_patch(self, weights: State, patch: int, given: object) -> int:
        """See Family."""
        return CONVNEXT_PATCH

    def to_timm(self, state: State) -> State:
        """See Family."""
        return renamed(with_last_norm(state), TO_TIMM)


def with_last_norm(state: State) -> State:
    """Add the norm after pooling that FCMAE does not have, as initialised for fine-tuning."""
    if "norm.weight" in state:
        return state
    bias = state["stages.3.0.dwconv.bias"]
    return {
        **state,
        "norm.weight": bias.new_ones(len(bias)),
        "norm.bias": bias.new_zeros(len(bias)),
    }


def from_minkowski(state: State) -> State:
    """The official sparse code's tensors in dense form; its stem and decoder are dense already."""
    dense = {}
    for name, value in state.items():
        name = name.replace(".ln.", ".").replace(".linear.", ".")
        if name.endswith(".kernel"):
            name, value = name.removesuffix("kernel") + "weight", dense_kernel(value)
        elif re.search(r"\.grn\.(gamma|beta)$", name):
            value = value.reshape(1, 1, 1, -1)
        elif name.endswith(".bias"):
            value = value.flatten()
        dense[name] = value
    return dense


def dense_kernel(kernel: "Tensor") -> "Tensor":
    """(k*k, C) depthwise -> (C, 1, k, k); (k*k, in, out) -> (out, in, k, k); others unchanged.

    MinkowskiEngine orders the cells of a kernel column by column, hence the final transpose.
    """
    if kernel.ndim not in (2, 3) or math.isqrt(len(kernel)) ** 2 != len(kernel):
        return kernel
    k = math.isqrt(len(kernel))
    if kernel.ndim == 2:
        kernel = kernel[:, None]
    return kernel.permute(2, 1, 0).unflatten(2, (k, k)).transpose(2, 3)


def from_timm(state: State) -> State:
    """From timm's names; its GRN is 1-D, and its small models have 1×1 convolutions as MLP."""
    # A head trained on features normalised before pooling does not fit ours: its name is kept, so
    # that it is not recognised.
    norm_first = any(root(name) == "norm_pre" for name in state)
    renames = FROM_TIMM if norm_first else [*FROM_TIMM, (r"^head\.fc\.", "head.")]
    ours = {}
    for name, value in renamed(state, renames).items():
        if re.search(r"\.grn\.(gamma|beta)$", name):
            value = value.reshape(1, 1, 1, -1)
        elif re.search(r"\.pwconv[12]\.weight$", name) and value.ndim == 4:
            value = value.flatten(1)
        ours[name] = value
    return ours
