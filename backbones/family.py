"""What a family of backbones declares about itself, apart from its networks.

No torch here: option parsing and error messages read this, too. Weights are known by their names
and shapes.
"""

from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from util.states import State, count, root

NONE: Mapping[str, object] = MappingProxyType({})
# Options that not every family has, and what they are where nobody has asked for anything.
OWN_OPTIONS: dict[str, object] = {
    **dict.fromkeys(("patch_size", "decoder_num_heads", "cls_token", "freeze_pos_embed")),
    "predict_ratio": 1,
}
# First components of a decoder's names, and whole ones: an attention's `blocks.0.attn.proj` is not
# FCMAE's `proj`. Those of masked convolutional networks, and MAE's:
DECODER = {"mask_token", "proj", "pred", "decoder"}
DECODER |= {f"decoder_{part}" for part in ("embed", "pos_embed", "blocks", "norm", "pred")}


class Family:
    """One family. What is set here suits a convolutional network; others override it.

    A size is any object with the dimensions of a network: `depths`, the blocks of each stage,
    `width`, the channels of the first stage, and `features`, those of the last, among them.
    """

    title: str  # as people call it: "ConvNeXt V2"
    masked_title: str  # its masked autoencoder: "FCMAE"
    module: str  # where its networks are, and the names of their classes
    classifier: str
    autoencoder: str
    sizes: Mapping[str, Any]  # by the classifier's name
    masked_prefix = ""  # before that in the autoencoder's name

    # Options. Of OWN_OPTIONS, those that it has; the official scripts' defaults.
    pretrain_options: tuple[str, ...] = ()
    finetune_options: tuple[str, ...] = ()
    pretrain_defaults: Mapping[str, object] = NONE
    finetune_defaults: Mapping[str, object] = NONE
    fixed_input = False  # whether a model takes images of a single size
    free_patch = False  # whether --patch_size is the side length of the first convolution

    # Weights under our names.
    stem: str  # the first convolution's
    stages: tuple[str, ...]  # what the numbers of blocks follow
    roots: frozenset[str]  # first components of the encoder's names
    decoder_blocks = "decoder"  # what the numbers of the decoder's blocks follow
    new_norm = ""  # first component of a norm that classifiers have, and pre-trained weights lack

    # Other libraries.
    timm_ends = ("conv1", "fc")  # the first convolution and the head in timm
    timm_features = False  # whether timm's model without a head gives the features of ours
    transformers = ""  # which form of export/huggingface.py it has

    def network(self, masked: bool) -> type:
        """The class of its masked autoencoder or classifier; imports torch."""
        return getattr(import_module(self.module), self.autoencoder if masked else self.classifier)

    def patch_step(self, name: str, patch_size: int | None, masked: bool) -> int:
        """What the side length of an input has to be a multiple of; None: the usual patch."""
        raise NotImplementedError

    def check(self, options: Namespace) -> None:
        """Refuse options of training that do not go with its networks. Raises BadInput."""

    def check_pretraining(self, options: Namespace) -> None:
        """The same for options of pre-training alone, once defaults are filled in."""

    def classifier_options(self, options: Namespace) -> dict[str, object]:
        """From options of fine-tuning to the keyword arguments of its classifier alone."""
        return {}

    # --- weights ---

    def width(self, state: State) -> int:
        """Channels of the first stage."""
        return len(state[self.stem])

    def translate(self, state: State) -> tuple[State, str] | None:
        """Weights of this family under our names, and their layout in words; None for others."""
        raise NotImplementedError

    def layout(self, state: State) -> str:
        """What weights under our names are called."""
        decoder = any(root(name) in DECODER for name in state)
        return f"{self.masked_title} with decoder" if decoder else self.title

    def options_of_classifier(self, weights: State, patch: int) -> dict[str, Any]:
        """The keyword arguments that build the classifier which weights are of.

        `patch`: the side length of their first convolution.
        """
        return {}

    def masked_patch(self, weights: State, patch: int, given: object) -> int:
        """Side length in pixels of the patches that were masked.

        `given`: what the checkpoint says about it, if anything.
        """
        raise NotImplementedError

    def decoder_depth(self, weights: State) -> int:
        """Blocks of the decoder."""
        return count(weights, self.decoder_blocks)

    # --- timm ---

    def timm_name(self, name: str) -> str:
        """timm's name of one of ours."""
        return name

    def timm_arguments(self, model: Any, input_size: int) -> dict[str, Any]:
        """The keyword arguments of `timm.create_model` that build the same network."""
        return {}

    def to_timm(self, state: State) -> State:
        """Weights of a classifier or encoder under timm's names."""
        raise NotImplementedError
