"""Weights of other programs under our names: pure translations of names and shapes.

A state of weights is a dict of names to tensors. Ours are the names of the official MAE and of the
official dense ConvNeXt V2 code and of timm's ResNets with a `head`, without the `encoder.` of
masked convolutional networks.
"""

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from util.sizes import CONVNEXTV2, RESNET, VIT
from util.weights.layouts_foreign import from_foreign
from util.weights.states import State, renamed, root

# First components of names, and whole ones: an attention's `blocks.0.attn.proj` is no `proj`.
DECODER = {"mask_token", "proj", "pred", "decoder"}  # and MAE's:
DECODER |= {f"decoder_{part}" for part in ("embed", "pos_embed", "blocks", "norm", "pred")}
ENCODER = {"patch_embed", "cls_token", "pos_embed", "blocks", "downsample_layers", "stages"}
ENCODER |= {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
ENCODER |= {"reg_token", "dist_token", "norm_pre"}  # of ViTs that compute something else than ours
ENCODER |= {"embeddings", "encoder", "layers"}  # of other libraries, where it has no place in ours
HEAD = {"head", "pre_logits", "neck"}
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")

TIMM_CONVNEXT = [
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
    (r"^(norm_pre|head\.norm)\.", "norm."),
]

# (family, dim of the first stage, depths) -> our name of the size.
KNOWN = {("ViT", size.dim, (size.depth,)): name for name, size in VIT.items()}
KNOWN |= {("ConvNeXt V2", size.dims[0], size.depths): name for name, size in CONVNEXTV2.items()}
KNOWN |= {("ResNet", size.dims[0], size.depths): name for name, size in RESNET.items()}


class Architecture(NamedTuple):
    """What the shapes of some weights say about the network they are of."""

    family: str  # "ViT", "ConvNeXt V2" or "ResNet"
    dim: int  # of the first stage
    depths: tuple[int, ...]  # blocks in each stage
    patch: int  # pixels a side that the first convolution takes at a time
    in_chans: int

    @property
    def size(self) -> str:
        """Our name of the size ("base"), "" where we have none."""
        return KNOWN.get(self[:3], "")

    @property
    def name(self) -> str:
        """As `--model` of pre-training takes it; "" where we have none like it."""
        return self._named(self.size) if self.size else ""

    @property
    def option(self) -> str:
        """The options that build it, or the published model nearest to it."""
        size = KNOWN[min((k for k in KNOWN if k[0] == self.family), key=self._distance)]
        vit = self.family == "ViT"
        differs = vit and self.size and self.patch != VIT[size].patch
        return f"--model {self._named(size)}{f' --patch_size {self.patch}' if differs else ''}"

    def _named(self, size: str) -> str:
        """This family's model of one of our sizes."""
        if self.family == "ViT":
            return f"mae_vit_{size}_patch{VIT[size].patch}"
        return f"convnextv2_{size}" if self.family == "ConvNeXt V2" else size

    def _distance(self, known: tuple[str, int, tuple[int, ...]]) -> float:
        blocks = max(sum(self.depths), 1)
        return abs(math.log(max(self.dim, 1) / known[1])) + abs(math.log(blocks / sum(known[2])))

    def __str__(self) -> str:
        shape = f"(dim {self.dim}, {'+'.join(map(str, self.depths))} blocks"
        if self.family != "ViT":
            return f"{self.name or f'a {self.family}'} {shape})"
        name = f"vit_{self.size}_patch{self.patch}" if self.size else "a ViT"
        return f"{name} {shape}, patches of {self.patch} pixels)"


def describe(state: State) -> Architecture | None:
    """The network that weights under our names are of; None for any other."""
    for stem, family, stages in (
        ("patch_embed.proj.weight", "ViT", ["blocks"]),
        ("downsample_layers.0.0.weight", "ConvNeXt V2", [f"stages.{i}" for i in range(4)]),
        ("conv1.weight", "ResNet", [f"layer{i}" for i in range(1, 5)]),
    ):
        if stem in state and state[stem].ndim == 4 and state[stem].numel():
            dim, in_chans, patch, _ = state[stem].shape
            if family == "ResNet":  # whose stems are all alike
                last = [v for n, v in state.items() if re.match(r"layer1\.0\.conv\d\.weight$", n)]
                dim = len(last[-1]) if last and last[-1].ndim else 0
            depths = tuple(count(state, stage) for stage in stages)
            return Architecture(family, dim, depths, patch, in_chans)
    return None


def count(state: State, prefix: str) -> int:
    """How many numbers follow `prefix.` in the names."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state)
    return len({match[1] for match in numbers if match})


def head_classes(state: State) -> int:
    """How many classes a head tells apart; 0 without a head."""
    return next((len(v) for n, v in state.items() if root(n) == "head" and v.ndim == 2), 0)


def translate(state: State) -> tuple[State, str]:
    """Any known layout -> the same weights under our names, and the layout in words.

    What is not understood keeps its name and shape, so that whoever loads the result sees it.
    """
    state = strip_wrappers(state)
    roots = {root(name) for name in state}
    if foreign := from_foreign(state):
        return foreign
    if any(name.endswith(".kernel") for name in state):
        return from_minkowski(state), "official FCMAE (Minkowski)"
    if "stem" in roots:
        return from_timm_convnext(state), "timm ConvNeXt V2"
    if "downsample_layers" in roots:
        return state, "FCMAE with decoder" if roots & DECODER else "ConvNeXt V2"
    if "layer1" in roots:
        return from_resnet(state), "masked ResNet with decoder" if roots & DECODER else "ResNet"
    if "patch_embed" in roots:
        return state, "MAE with decoder" if roots & DECODER else "ViT"
    return state, "unknown"


def strip_wrappers(state: State) -> State:
    """Without the `module.` and the like that wrappers put before every name, nested at will.

    FCMAE's `encoder.` stands beside a decoder, and a `backbone.` beside a head, that lack it.
    """
    beside = DECODER | {"head", "fc", "norm", "fc_norm", "n_averaged"}
    while inner := [name for name in state if root(name) not in beside]:
        wrapper = next((w for w in WRAPPERS if all(n.startswith(w) for n in inner)), None)
        if wrapper is None:
            break
        stripped = {name.removeprefix(wrapper): value for name, value in state.items()}
        if len(stripped) < len(state):  # two tensors of one name: which is meant, nobody can tell
            break
        state = stripped
    return state


def from_minkowski(state: State) -> State:
    """The official sparse code's tensors as dense ones; its stem and decoder are dense already."""
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


def dense_kernel(kernel: Tensor) -> Tensor:
    """(k*k, C) depthwise -> (C, 1, k, k); (k*k, in, out) -> (out, in, k, k); others unchanged.

    MinkowskiEngine numbers a kernel's cells column by column, hence the swap of the last axes.
    """
    if kernel.ndim not in (2, 3) or math.isqrt(len(kernel)) ** 2 != len(kernel):
        return kernel
    k = math.isqrt(len(kernel))
    if kernel.ndim == 2:
        kernel = kernel[:, None]
    return kernel.permute(2, 1, 0).unflatten(2, (k, k)).transpose(2, 3)


def from_timm_convnext(state: State) -> State:
    """From timm's names; its GRN is 1-D, and its small models have 1×1 convolutions as MLP."""
    # Where timm normalises before it pools, the head learnt on other features: it is left unknown.
    norm_first = any(root(name) == "norm_pre" for name in state)
    renames = TIMM_CONVNEXT if norm_first else [*TIMM_CONVNEXT, (r"^head\.fc\.", "head.")]
    ours = {}
    for name, value in renamed(state, renames).items():
        if re.search(r"\.grn\.(gamma|beta)$", name):
            value = value.reshape(1, 1, 1, -1)
        elif re.search(r"\.pwconv[12]\.weight$", name) and value.ndim == 4:
            value = value.flatten(1)
        ours[name] = value
    return ours


def from_resnet(state: State) -> State:
    """From timm's and torchvision's names; older files do not count a batch norm's batches."""
    ours = renamed(state, [(r"^fc\.", "head.")])
    norms = [n.removesuffix("running_var") for n in ours if n.endswith(".running_var")]
    counters = {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}
    return {**counters, **ours}
