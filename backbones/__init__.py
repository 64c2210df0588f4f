"""The families of backbones: everything that programs need to know about a model but its networks.

To add a family, add one file here and one entry to FAMILIES, with its networks in `models_*.py`.
Besides texts of `--help`, no other code depends on the family of a model. This package does not
import torch.
"""

from typing import Any

from backbones.convnextv2 import ConvNeXtV2Family
from backbones.family import Family
from backbones.resnet import ResNetFamily
from backbones.vit import ViTFamily
from util.errors import BadInput
from util.wording import did_you_mean

FAMILIES: list[Family] = [ViTFamily(), ConvNeXtV2Family(), ResNetFamily()]


def model_names(masked: bool) -> list[str]:
    """The names of all masked autoencoders, or of all classifiers."""
    return [masked * family.masked_prefix + name for family in FAMILIES for name in family.sizes]


def titles() -> str:
    """All families, in words: "ViT, ConvNeXt V2 or ResNet"."""
    *first, last = (family.title for family in FAMILIES)
    return f"{', '.join(first)} or {last}"


def find_family(name: str) -> Family | None:
    """The family of an autoencoder or classifier; None for an unknown name."""
    return next((f for f in FAMILIES if f.classifier_name(name) in f.sizes), None)


def family_of(name: str, masked: bool = False, flag: str = "--model") -> Family:
    """The family of a model. Raises BadInput with similar names for an unknown one.

    Without `masked`, an autoencoder's name stands for the classifier that is fine-tuned from it.
    `flag`: the option to name in the error.
    """
    family = find_family(name)
    if family and (not masked or name.startswith(family.masked_prefix)):
        return family
    known = model_names(masked)
    hint = did_you_mean(name, known) or f"choose from {', '.join(known)}"
    raise BadInput(f"{flag} {name}: no such model; {hint}")


def size_of(name: str) -> Any:
    """The dimensions of a model, see `Family`. Raises BadInput for an unknown name."""
    family = family_of(name)
    return family.sizes[family.classifier_name(name)]


def families_with(option: str, masked: bool) -> str:
    """The networks that have the option, one of OWN_OPTIONS, in words: "MAE and masked ResNet"."""
    return " and ".join(
        title(family, masked) for family in FAMILIES if option in own_options(family, masked)
    )


def own_options(family: Family, masked: bool) -> tuple[str, ...]:
    """The options of OWN_OPTIONS that a family's autoencoder or classifier has."""
    return family.pretrain_options if masked else family.finetune_options


def title(family: Family, masked: bool) -> str:
    """The display name of a family's autoencoder or classifier."""
    return family.masked_title if masked else family.title


def default_in_words(option: str, masked: bool) -> str:
    """The defaults of an option by family, for `--help`: "ViT 50, others 100"."""
    by_title = {
        title(family, masked): (family.pretrain_defaults if masked else family.finetune_defaults)
        for family in FAMILIES
    }
    values = {name: defaults[option] for name, defaults in by_title.items() if option in defaults}
    first, *others = values
    if len(others) > 1 and len({values[name] for name in others}) == 1:
        return f"{first} {values[first]:g}, others {values[others[0]]:g}"
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
