"""What a family of backbones declares about itself, apart from its networks.

Does not import torch, because option parsing and error messages use it as well. Weights are
recognised by their names and shapes.
"""

from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from util.states import State, count, root

NONE: Mapping[str, object] = MappingProxyType({})
# Options that only some families have, with the value they have when not given.
OWN_OPTIONS: dict[str, object] = {
    **dict.fromkeys(("patch_size", "decoder_num_heads", "cls_token", "freeze_pos_embed")),
    "predict_ratio": 1,
}
# First components of the names of decoder weights, which must match as a whole: `proj` is FCMAE's
# projection, but `blocks.0.attn.proj` belongs to an encoder. First those of masked convolutional
# networks, then MAE's.
DECODER = {"mask_token", "proj", "pred", "decoder"}
DECODER |= {f"decoder_{part}" for part in ("embed", "pos_embed", "blocks", "norm", "pred")}


class Family:
    """One family. The defaults suit a convolutional network; others override them.

    A size is any object with the dimensions of a network, including `depths` (blocks per stage),
    `width` (channels of the first stage) and `features` (channels of the last).
    """

    title: str  # display name: "ConvNeXt V2"
    masked_title: str  # display name of its masked autoencoder: "FCMAE"
    module: str  # the module that defines its networks
    classifier: str  # class names in that module
    autoencoder: str
    sizes: Mapping[str, Any]  # by the classifier's name
    masked_prefix = ""  # precedes the classifier's name in the autoencoder's

    # Options: those of OWN_OPTIONS that it has, and the official scripts' defaults.
    pretrain_options: tuple[str, ...] = ()
    finetune_options: tuple[str, ...] = ()
    pretrain_defaults: Mapping[str, object] = NONE
    finetune_defaults: Mapping[str, object] = NONE
    fixed_input = False  # whether a model takes images of one size only
    free_patch = False  # whether --patch_size is the side length of the first convolution

    # Names of weights, in our naming.
    stem: str  # weight of the first convolution
    stages: tuple[str, ...]  # prefixes before the block numbers of each stage
    roots: frozenset[str]  # first components of the encoder's names
    decoder_blocks = "decoder"  # prefix before the decoder's block numbers
    new_norm = ""  # first component of a norm that classifiers have but pre-trained weights do not

    # Other libraries.
    timm_ends = ("conv1", "fc")  # timm's names of the first convolution and the head
    timm_features = False  # whether timm's model without a head computes the same features as ours
    transformers = ""  # key of FORMS in export/huggingface.py, "" if it cannot be exported there

    def classifier_name(self, name: str) -> str:
        """The name of the classifier that is fine-tuned from a model; its own if it is one."""
        return name.removeprefix(self.masked_prefix)

    def network(self, masked: bool) -> type:
        """The class of its masked autoencoder or classifier; imports torch."""
        return getattr(import_module(self.module), self.autoencoder if masked else self.classifier)

    def patch_step(self, name: str, patch_size: int | None, masked: bool) -> int:
        """The input's side length must be a multiple of this; `patch_size` None: the default."""
        raise NotImplementedError

    def check(self, options: Namespace) -> None:
        """Raises BadInput for training options that its networks do not support."""

    def check_pretraining(self, options: Namespace) -> None:
        """The same for options of pre-training only, after defaults are filled in."""

    def classifier_options(self, options: Namespace) -> dict[str, object]:
        """The keyword arguments specific to its classifier, from fine-tuning options."""
        return {}

    # --- weights ---

    def width(self, state: State) -> int:
        """Channels of the first stage."""
        return len(state[self.stem])

    def translate(self, state: State) -> tuple[State, str] | None:
        """This family's weights in our naming, and the name of their layout; None for others."""
        raise NotImplementedError

    def layout(self, state: State) -> str:
        """The name of the layout of weights that are in our naming."""
        decoder = any(root(name) in DECODER for name in state)
        return f"{self.masked_title} with decoder" if decoder else self.title

    def options_of_classifier(self, weights: State, patch: int) -> dict[str, Any]:
        """The keyword arguments that build the classifier to which the weights belong.

        `patch`: side length in pixels of the first convolution.
        """
        return {}

    def masked_patch(self, weights: State, patch: int, given: object) -> int:
        """Side length in pixels of the patches that were masked.

        `patch`: that of the first convolution. `given`: the patch size recorded in the checkpoint,
        unchecked; None if there is none.
        """
        raise NotImplementedError

    def decoder_depth(self, weights: State) -> int:
        """The number of decoder blocks."""
        return count(weights, self.decoder_blocks)

    # --- timm ---

    def timm_name(self, name: str) -> str:
        """timm's name for one of our models."""
        return name

    def timm_arguments(self, model: Any, input_size: int) -> dict[str, Any]:
        """The keyword arguments of `timm.create_model` that build the same network."""
        return {}

    def to_timm(self, state: State) -> State:
        """The weights of a classifier or encoder under timm's names."""
        raise NotImplementedError
