"""ResNet: sizes, options, and names in other libraries.

Sizes: Deep Residual Learning for Image Recognition (He et al. 2016, table 1).
"""

import math
import re
from argparse import Namespace
from typing import NamedTuple

from backbones.convnextv2 import FCMAE_DEFAULTS
from backbones.convnextv2 import FINETUNE_DEFAULTS as CONVNEXT_DEFAULTS
from backbones.family import Family
from util.errors import BadInput
from util.states import State, renamed, root

RESNET_STRIDES = (4, 8, 16, 32)  # side length in pixels of a cell after each stage
RESNET_PATCHES = (8, 16, 32)  # side lengths in pixels that a masked patch may have


class ResNetSize(NamedTuple):
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]  # channels after each stage
    bottleneck: bool  # whether blocks have three convolutions instead of two

    @property
    def width(self) -> int:
        """Channels of the first stage."""
        return self.dims[0]

    @property
    def features(self) -> int:
        """The length of an image's feature vector."""
        return self.dims[-1]


SIZES = {
    "resnet18": ResNetSize((2, 2, 2, 2), (64, 128, 256, 512), False),
    "resnet34": ResNetSize((3, 4, 6, 3), (64, 128, 256, 512), False),
    "resnet50": ResNetSize((3, 4, 6, 3), (256, 512, 1024, 2048), True),
}
PRETRAIN_DEFAULTS = {**FCMAE_DEFAULTS, "patch_size": RESNET_STRIDES[-1]}
FINETUNE_DEFAULTS = {**CONVNEXT_DEFAULTS, "warmup_epochs": 10}


class ResNetFamily(Family):
    """Takes images of any size; masked patches are 8, 16 or 32 pixels. Has no official script."""

    title, masked_title = "ResNet", "masked ResNet"
    module, classifier, autoencoder = "models_resnet", "ResNetClassifier", "MaskedResNet"
    sizes = SIZES
    pretrain_options = ("patch_size",)
    pretrain_defaults = PRETRAIN_DEFAULTS
    finetune_defaults = FINETUNE_DEFAULTS

    stem = "conv1.weight"
    stages = tuple(f"layer{i}" for i in range(1, 5))
    roots = frozenset({"conv1", "bn1", *stages})

    def patch_step(self, name: str, patch_size: int | None, masked: bool) -> int:
        """See Family."""
        return (patch_size or RESNET_STRIDES[-1]) if masked else 1

    def check(self, options: Namespace) -> None:
        """See Family.

        Gradient checkpointing is refused because recomputing a block would update its batch norms'
        running statistics twice; a batch size of 1 because batch norm needs several images.
        """
        evaluates = getattr(options, "eval", False) or getattr(options, "knn", False)
        model = options.model
        if options.batch_size == 1 and not evaluates:
            raise BadInput(
                f"--batch_size 1: {model} has batch norm layers, which need several images"
            )
        if getattr(options, "layer_decay_type", "single") != "single":
            raise BadInput(f"--layer_decay_type: not available for {model}, only for ConvNeXt V2")
        for name in ("grad_checkpointing", "compile"):
            if getattr(options, name):
                raise BadInput(f"--{name}: not available for {model}, only for ViT and ConvNeXt V2")

    def check_pretraining(self, options: Namespace) -> None:
        """See Family."""
        if options.patch_size not in RESNET_PATCHES:
            raise BadInput(
                f"--patch_size {options.patch_size}: a ResNet takes {RESNET_PATCHES} pixels"
            )

    def width(self, state: State) -> int:
        """See Family. All ResNets have the same stem, so the first block decides."""
        last = [v for n, v in state.items() if re.match(r"layer1\.0\.conv\d\.weight$", n)]
        return len(last[-1]) if last and last[-1].ndim else 0

    def translate(self, state: State) -> tuple[State, str] | None:
        """See Family: timm's and torchvision's names. Older files lack `num_batches_tracked`."""
        if not any(root(name) == "layer1" for name in state):
            return None
        import torch

        ours = renamed(state, [(r"^fc\.", "head.")])
        norms = [n.removesuffix("running_var") for n in ours if n.endswith(".running_var")]
        counters = {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}
        return {**counters, **ours}, self.layout(state)

    def masked_patch(self, weights: State, patch: int, given: object) -> int:
        """See Family."""
        pred = weights.get("pred.weight")  # (p * p * 3, D, 1, 1)
        if pred is not None and pred.ndim:
            return math.isqrt(len(pred) // 3)
        return given if given in RESNET_PATCHES else RESNET_PATCHES[-1]

    def to_timm(self, state: State) -> State:
        """See Family."""
        return renamed(state, [(r"^head\.", "fc.")])
