"""The families of backbones: everything that programs ask about a model, apart from its networks.

A family is one file here and one entry of FAMILIES; its networks are in `models_*.py`. No other
code asks which family a model belongs to. Torch is not imported.
"""

import difflib
from typing import Any

from backbones.convnextv2 import ConvNeXtV2Family
from backbones.family import Family
from backbones.resnet import ResNetFamily
from backbones.vit import ViTFamily
from util.errors import BadInput

FAMILIES: list[Family] = [ViTFamily(), ConvNeXtV2Family(), ResNetFamily()]


def model_names(masked: bool) -> list[str]:
    """Of all masked autoencoders, or of all classifiers."""
    return [masked * family.masked_prefix + name for family in FAMILIES for name in family.sizes]


def find_family(name: str) -> Family | None:
    """The family of a model, autoencoder or classifier; None for an unknown name."""
    return next((f for f in FAMILIES if name.removeprefix(f.masked_prefix) in f.sizes), None)


def family_of(name: str, masked: bool = False, flag: str = "--model") -> Family:
    """The family of a model. Raises BadInput with the nearest names for an unknown one.

    An autoencoder's name also stands for the classifier that is fine-tuned from it.
    """
    family = find_family(name)
    if family and (not masked or name.startswith(family.masked_prefix)):
        return family
    known = model_names(masked)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
    raise BadInput(f"{flag} {name}: no such model; {hint}")


def size_of(name: str) -> Any:
    """The dimensions of a model, see Family. Raises BadInput for an unknown name."""
    family = family_of(name)
    return family.sizes[name.removeprefix(family.masked_prefix)]


def families_with(option: str, masked: bool) -> str:
    """Which families have one of OWN_OPTIONS, in words."""
    titles = [
        family.title
        for family in FAMILIES
        if option in (family.pretrain_options if masked else family.finetune_options)
    ]
    return " and ".join(titles)
