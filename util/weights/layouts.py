"""Weights of other programs under our names: pure translations of names and shapes.

A state of weights is a dict of names to tensors. Ours are the names of the official MAE and of the
official dense ConvNeXt V2 code and of timm's ResNets with a `head`, without the `encoder.` of
masked convolutional networks. What belongs to one family is in its file in backbones/.
"""

import math
from typing import Any, NamedTuple

from backbones import FAMILIES
from backbones.family import DECODER, Family
from util.states import State, count, root
from util.weights.layouts_foreign import from_foreign

# First components of names.
OTHER_ENCODERS = {"reg_token", "dist_token", "norm_pre"}  # of ViTs that are others than ours
OTHER_ENCODERS |= {"embeddings", "encoder", "layers"}  # of other libraries, where unknown here
HEAD = {"head", "pre_logits", "neck"}
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")


class Architecture(NamedTuple):
    """What the shapes of some weights say about the network they are of."""

    family: Family
    dim: int  # of the first stage
    depths: tuple[int, ...]  # blocks in each stage
    patch: int  # side length in pixels of the first convolution
    in_chans: int

    @property
    def classifier(self) -> str:
        """As `create_classifier` takes it; "" where we have none like it."""
        named = self.family.sizes.items()
        return next((n for n, s in named if (s.width, s.depths) == (self.dim, self.depths)), "")

    @property
    def name(self) -> str:
        """As `--model` of pre-training takes it; "" where we have none like it."""
        return self.classifier and self.family.masked_prefix + self.classifier

    @property
    def size(self) -> Any:
        """Our dimensions of it; None where we have none like it."""
        return self.family.sizes.get(self.classifier)

    @property
    def option(self) -> str:
        """The options that build it, or the published model nearest to it."""
        name = min(self.family.sizes, key=self._distance)
        usual = self.family.patch_step(name, None, masked=True)
        differs = self.family.free_patch and self.classifier and self.patch != usual
        model = f"--model {self.family.masked_prefix}{name}"
        return f"{model} --patch_size {self.patch}" if differs else model

    def _distance(self, name: str) -> float:
        size, blocks = self.family.sizes[name], max(sum(self.depths), 1)
        return abs(math.log(max(self.dim, 1) / size.width)) + abs(
            math.log(blocks / sum(size.depths))
        )

    def __str__(self) -> str:
        shape = f"(dim {self.dim}, {'+'.join(map(str, self.depths))} blocks"
        if not self.family.free_patch:
            return f"{self.classifier or f'a {self.family.title}'} {shape})"
        stem = self.classifier.rpartition("_patch")[0]
        name = f"{stem}_patch{self.patch}" if stem else f"a {self.family.title}"
        return f"{name} {shape}, patches of {self.patch} pixels)"


def describe(state: State) -> Architecture | None:
    """The network that weights under our names are of; None for any other."""
    for family in FAMILIES:
        stem = state.get(family.stem)
        if stem is not None and stem.ndim == 4 and stem.numel():
            depths = tuple(count(state, stage) for stage in family.stages)
            _, in_chans, patch, _ = stem.shape
            return Architecture(family, family.width(state), depths, patch, in_chans)
    return None


def encoder_roots() -> set[str]:
    """First components of an encoder's names, ours and others'."""
    return OTHER_ENCODERS.union(*(family.roots for family in FAMILIES))


def head_classes(state: State) -> int:
    """How many classes a head tells apart; 0 without a head."""
    return next((len(v) for n, v in state.items() if root(n) == "head" and v.ndim == 2), 0)


def translate(state: State) -> tuple[State, str]:
    """Any known layout -> the same weights under our names, and the layout in words.

    What is not understood keeps its name and shape, so that whoever loads the result sees it.
    """
    state = strip_wrappers(state)
    if foreign := from_foreign(state):
        return foreign
    found = (family.translate(state) for family in FAMILIES)
    return next(filter(None, found), (state, "unknown"))


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
