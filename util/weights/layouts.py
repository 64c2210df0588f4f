"""Weights of other programs under our names: pure translations of names and shapes.

Our names are those of the official MAE code, of the official dense ConvNeXt V2 code, and of timm's
ResNets with a `head`; without the `encoder.` of masked convolutional networks. What is specific to
a family is in its file in backbones/.
"""

import math
from typing import Any, NamedTuple

from backbones import FAMILIES
from backbones.family import DECODER, Family
from util.states import State, count, root
from util.weights.layouts_foreign import from_foreign

# First components of names.
OTHER_ENCODERS = {"reg_token", "dist_token", "norm_pre"}  # of ViTs that differ from ours
OTHER_ENCODERS |= {"embeddings", "encoder", "layers"}  # of other libraries' models, if unknown here
HEAD = {"head", "pre_logits", "neck"}
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")


class Architecture(NamedTuple):
    """What the shapes of weights reveal about their network."""

    family: Family
    dim: int  # of the first stage
    depths: tuple[int, ...]  # blocks per stage
    patch: int  # side length in pixels of the first convolution
    in_chans: int

    @property
    def classifier(self) -> str:
        """Its name for `create_classifier`; "" if we have no such model."""
        named = self.family.sizes.items()
        return next((n for n, s in named if (s.width, s.depths) == (self.dim, self.depths)), "")

    @property
    def name(self) -> str:
        """Its name for `--model` in pre-training; "" if we have no such model."""
        return self.classifier and self.family.masked_prefix + self.classifier

    @property
    def size(self) -> Any:
        """Our dimensions of it; None if we have no such model."""
        return self.family.sizes.get(self.classifier)

    @property
    def option(self) -> str:
        """The options that build it, or else the most similar published model."""
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


def identify_architecture(state: State) -> Architecture | None:
    """The network to which weights under our names belong; None if it is of no known family."""
    for family in FAMILIES:
        stem = state.get(family.stem)
        if stem is not None and stem.ndim == 4 and stem.numel():
            depths = tuple(count(state, stage) for stage in family.stages)
            _, in_chans, patch, _ = stem.shape
            return Architecture(
                family, family.width(state), depths=depths, patch=patch, in_chans=in_chans
            )
    return None


def encoder_roots() -> set[str]:
    """First components of the names of encoders, our own and others."""
    return OTHER_ENCODERS.union(*(family.roots for family in FAMILIES))


def head_classes(state: State) -> int:
    """The number of classes of the head; 0 if there is no head."""
    return next((len(v) for n, v in state.items() if root(n) == "head" and v.ndim == 2), 0)


def translate(state: State) -> tuple[State, str]:
    """Any known layout -> the same weights under our names, and the layout in words.

    What is not recognised keeps its name and shape, so that loading it fails visibly.
    """
    state = strip_wrappers(state)
    if foreign := from_foreign(state):
        return foreign
    found = (family.translate(state) for family in FAMILIES)
    return next(filter(None, found), (state, "unknown"))


def strip_wrappers(state: State) -> State:
    """Remove the `module.` and the like that wrappers put before every name, however nested.

    FCMAE's `encoder.` occurs beside a decoder, and `backbone.` beside a head, which do not have it.
    """
    beside = DECODER | {"head", "fc", "norm", "fc_norm", "n_averaged"}
    while inner := [name for name in state if root(name) not in beside]:
        wrapper = next((w for w in WRAPPERS if all(n.startswith(w) for n in inner)), None)
        if wrapper is None:
            break
        stripped = {name.removeprefix(wrapper): value for name, value in state.items()}
        if len(stripped) < len(state):  # ambiguous: two tensors of one name
            break
        state = stripped
    return state
