"""A saved model in the form of timm, MAE-SFER and S2D, and what all exports need to know of it.

util/weights/layouts.py translates in the opposite direction.
"""

import math
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from backbones import family_of, size_of
from backbones.family import DECODER, Family
from datasets.labels import ORDERS, canonical
from datasets.transforms import IMAGENET_MEAN
from models_saved import (
    Preprocessing,
    Saved,
    SavedAutoencoder,
    SavedClassifier,
    SavedEncoder,
)
from util.errors import BadInput
from util.options.trained import OF_DATA, is_resolved
from util.states import State, root

# The ViTs of the original MAE-SFER: the file name by which its loader recognises pre-trained
# weights, and the side length of a patch in pixels (32 in its vit_small_fixedpe_patch16_224).
MAE_SFER = {
    "base": ("vit-base-checkpoint-300.pth", 16),
    "small": ("vit-small-checkpoint-299.pth", 32),
    "tiny": ("vit-tiny-checkpoint-299.pth", 16),
}
# S2D's loader requires it, and deletes it unless it has 128 input channels.
S2D_PLACEHOLDER = {"patch_embed_prompt.proj.weight": torch.zeros(1, 1, 1, 1)}


class TimmForm(NamedTuple):
    """`state` fits the model of `timm.create_model(architecture, num_classes=…, **arguments)`."""

    architecture: str
    arguments: dict[str, Any]
    state: State


def classes_of(saved: Saved) -> tuple[str, ...]:
    """The class names, () for a model that was pre-trained only."""
    return getattr(saved, "classes", ())


def family(saved: Saved) -> Family:
    """The model's family."""
    return family_of(saved.name)


def vit_size(saved: Saved) -> str:
    """The size of a ViT: tiny, small, …; "" for other networks."""
    named = re.fullmatch(r"(?:mae_)?vit_(\w+)_patch\d+", saved.name)
    return named[1] if named else ""


def plain_state(model: nn.Module) -> State:
    """A model's weights with a single linear head, and without the prefix `encoder.`.

    At test time the batch norm of a linear probe is a fixed affine map, which is merged into the
    head: W (x - m) / s + b = (W / s) x + (b - (W / s) m).
    """
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    if "head.1.weight" not in state:
        return state
    scale = (state["head.0.running_var"] + model.head[0].eps).rsqrt()
    weight = state["head.1.weight"] * scale
    bias = state["head.1.bias"] - weight @ state["head.0.running_mean"]
    rest = {name: value for name, value in state.items() if root(name) != "head"}
    return {**rest, "head.weight": weight, "head.bias": bias}


def without_decoder(state: State) -> State:
    """The weights without those of the decoder."""
    return {name: value for name, value in state.items() if root(name) not in DECODER}


def timm_form(saved: Saved) -> TimmForm:
    """The model in timm's form; a pre-trained one as an encoder with 0 classes."""
    import timm

    own, classes = family(saved), classes_of(saved)
    state = own.to_timm(without_decoder(plain_state(saved.model)))
    architecture = own.timm_name(saved.name)
    arguments = own.timm_arguments(saved.model, saved.preprocessing.input_size)
    # timm's small ConvNeXts use 1×1 convolutions as MLPs, and its GRN parameters are 1-D.
    with torch.device("meta"):
        wanted = timm.create_model(architecture, num_classes=len(classes), **arguments).state_dict()
    shaped = {name: value.reshape(wanted[name].shape) for name, value in state.items()}
    return TimmForm(architecture, arguments, shaped)


def settings_of(saved: Saved, plain_head: bool = False) -> dict[str, Any]:
    """All settings needed to open the exported model again, under the names of our checkpoints.

    `plain_head`: the exported weights are those of `plain_state`.
    """
    model, preprocessing = saved.model, saved.preprocessing
    args = {"model": saved.name, "input_size": preprocessing.input_size}
    own = model.own_options()
    if isinstance(saved, SavedEncoder):
        own.pop("decoder_num_heads", None)  # that of the untrained decoder
    if isinstance(saved, SavedClassifier):
        args["linear_probe"] = isinstance(model.head, nn.Sequential) and not plain_head
        args["crop_pct"] = preprocessing.crop_pct
        args["test_interpolation"] = preprocessing.interpolation
        args["imagenet_default_mean_and_std"] = tuple(preprocessing.mean) == IMAGENET_MEAN
        args["cls_token"] = False
    args |= own
    args |= _of_data(saved)
    if isinstance(saved, SavedAutoencoder):
        args["mask_ratio"] = float(model.mask_ratio)
        args["norm_pix_loss"] = bool(model.norm_pix_loss)
    seen = {
        **preprocessing._asdict(),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }
    if preprocessing.face_margin is None and not is_resolved(saved.checkpoint):
        del seen["face_margin"]  # it is unknown; None would mean that images were used whole
    settings = {"args": args, "preprocessing": seen}
    return {**settings, "classes": list(saved.classes)} if classes_of(saved) else settings


def _of_data(saved: Saved) -> dict[str, Any]:
    """The checkpoint's options about images and labels, as far as they are known."""
    own = saved.checkpoint.get("args")
    own = own if isinstance(own, dict) else {}
    found = {name: own[name] for name in (*OF_DATA, "eval_flip") if name in own}
    if is_resolved(saved.checkpoint):
        return found
    return {name: value for name, value in found.items() if value is not None}


def usage_differences(saved: SavedClassifier) -> str:
    """How its images and classes differ from those of `main_rafdb.py`, in words; "" if equal."""
    own = saved.preprocessing
    usual = Preprocessing(own.input_size, interpolation="bilinear")
    found = []
    if own.crop_pct != usual.crop_pct:
        found.append(f"a centre crop of {own.crop_pct:g} instead of the whole image")
    if own.interpolation != usual.interpolation:
        found.append(f"{own.interpolation} instead of {usual.interpolation} resizing")
    if [*own.mean, *own.std] != [*usual.mean, *usual.std]:
        found.append("another mean and std")
    if saved.flip:
        found.append("predictions averaged over an image and its mirror image")
    if canonical(saved.classes) != canonical(ORDERS["rafdb"]):
        found.append("another number or order of classes")
    return "; ".join(found)


def mae_sfer_form(saved: Saved) -> tuple[str, dict[str, Any]]:
    """File name and content for `utils.load_model` of the original MAE-SFER.

    Raises BadInput for a model that MAE-SFER does not have.
    """
    size = token_vit_size(saved, "mae-sfer", {s: patch for s, (_, patch) in MAE_SFER.items()})
    state = without_decoder(plain_state(saved.model))
    if not classes_of(saved):
        return MAE_SFER[size][0], {"model": state}
    epoch = saved.checkpoint.get("epoch")
    return f"vit-{size}-finetuned.pth", {
        "epoch": epoch if type(epoch) is int else 0,
        "train_loss": math.inf,  # their value for an unknown loss
        "model_state_dict": state,
        **settings_of(saved, plain_head=True),  # ignored by their loader
    }


def s2d_form(saved: Saved) -> tuple[str, dict[str, Any]]:
    """File name and content for S2D's `_create_vision_transformer`.

    The head is left out: S2D's has another name and is for the classes of its videos. Raises
    BadInput for anything but a ViT-Base.
    """
    token_vit_size(saved, "s2d", {"base": 16})
    state = without_decoder(plain_state(saved.model))
    state = {name: value for name, value in state.items() if root(name) != "head"}
    entry = "model_state_dict" if classes_of(saved) else "model"
    return "vit-base-s2d.pth", {entry: {**state, **S2D_PLACEHOLDER}}


def token_vit_size(saved: Saved, to: str, patches: dict[str, int]) -> str:
    """The size of a saved ViT that the program `to` can load. Raises BadInput for other models.

    `patches`: the sizes that the program has, with the side length in pixels of their patches.
    """
    size = vit_size(saved)
    if size not in patches:
        names = ", ".join(f"ViT-{s.title()}" for s in patches)
        raise BadInput(f"--to {to}: takes {names} only; this checkpoint is {saved.name}")
    if (patch := saved.model.own_options()["patch_size"]) != patches[size]:
        theirs = f"its ViT-{size.title()} has {patches[size]}-pixel patches"
        raise BadInput(f"--to {to}: {theirs}, this checkpoint {patch}-pixel ones")
    if (side := saved.preprocessing.input_size) != 224:
        raise BadInput(f"--to {to}: its input is 224 px, this checkpoint's {side} px")
    if classes_of(saved) and saved.model.global_pool != "token":
        raise BadInput(
            f"--to {to}: its models classify by the class token, this checkpoint by the mean of "
            "the patch tokens; fine-tune with --cls_token True"
        )
    return size


def timm_config(saved: Saved, form: TimmForm) -> dict[str, Any]:
    """The content of `config.json` for `timm.create_model("local-dir:…")`."""
    classes, preprocessing = classes_of(saved), saved.preprocessing
    size, whole = preprocessing.input_size, preprocessing.crop_pct is None
    first, last = family(saved).timm_ends
    config = {
        "architecture": form.architecture,
        "num_classes": len(classes),
        "num_features": size_of(saved.name).features,
        "model_args": form.arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": family(saved).fixed_input,
            "pool_size": None,
            "interpolation": preprocessing.interpolation,
            "crop_pct": 1.0 if whole else preprocessing.crop_pct,
            "crop_mode": "squash" if whole else "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(classes),
            "first_conv": first,
            "classifier": last,
        },
    }
    return {**config, "label_names": list(classes)} if classes else config
