"""What exporting asks of a saved model, and the model as timm, MAE-SFER and S2D know it.

Translations go the other way than those of util/weights/layouts.py.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from datasets.labels import ORDERS, canonical
from datasets.transforms import IMAGENET_MEAN
from models_mae import MaskedAutoencoderViT, ViTClassifier
from models_resnet import MaskedResNet
from models_saved import Preprocessing, Saved, SavedAutoencoder, SavedClassifier
from util.errors import BadInput
from util.options.trained import OF_DATA, is_resolved
from util.sizes import CLASSIFIER_SIZES, VIT, Size, family, find_size
from util.weights.layouts import DECODER
from util.weights.states import State, renamed, root

TIMM_CONVNEXT = [
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


# The ViTs of the original MAE-SFER: the file name by which its loader knows pre-trained weights,
# and the side length of a patch in pixels, which in its vit_small_fixedpe_patch16_224 is 32.
MAE_SFER = {
    "base": ("vit-base-checkpoint-300.pth", 16),
    "small": ("vit-small-checkpoint-299.pth", 32),
    "tiny": ("vit-tiny-checkpoint-299.pth", 16),
}
# S2D's loader requires it, and deletes it unless it has 128 input channels.
S2D_PLACEHOLDER = {"patch_embed_prompt.proj.weight": torch.zeros(1, 1, 1, 1)}


class TimmForm(NamedTuple):
    """What `timm.create_model(architecture, num_classes=…, **arguments)` is filled with."""

    architecture: str
    arguments: dict[str, Any]
    state: State


def classes_of(saved: Saved) -> tuple[str, ...]:
    """Their names, none for a model that was pre-trained only."""
    return getattr(saved, "classes", ())


def patch_of(saved: Saved) -> int:
    """Side length in pixels of a ViT's patch, or of the patches that are masked."""
    model = saved.model
    return model.patch_embed.patch_size[0] if isinstance(model, ViTClassifier) else model.patch_size


def size_of(saved: Saved) -> Size:
    """The dimensions of its encoder."""
    return find_size(saved.name.removeprefix("mae_"), CLASSIFIER_SIZES)


def features_of(saved: Saved) -> int:
    """How many numbers stand for an image before the head."""
    return size_of(saved).dim if is_vit(saved) else size_of(saved).dims[-1]


def vit_size(saved: Saved) -> str:
    """tiny, small, …; "" for a convolutional network."""
    return next((name for name, size in VIT.items() if size is size_of(saved)), "")


def is_vit(saved: Saved) -> bool:
    """Else it is a convolutional network."""
    return isinstance(saved.model, ViTClassifier | MaskedAutoencoderViT)


def is_convnext(saved: Saved) -> bool:
    """Whether it is a ConvNeXt V2."""
    return family(saved.name) == "convnextv2"


def plain_state(model: nn.Module) -> State:
    """A model's weights with one linear head, and without an encoder's `encoder.`.

    The batch norm of a linear probe does the same to every image, so it is part of the head:
    W (x - m) / s + b = (W / s) x + (b - (W / s) m).
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
    """The encoder's weights alone."""
    return {name: value for name, value in state.items() if root(name) not in DECODER}


def with_last_norm(state: State) -> State:
    """A ConvNeXt's. FCMAE has none after pooling; fine-tuning begins with this one."""
    if "norm.weight" in state:
        return state
    width = len(state["stages.3.0.dwconv.bias"])
    return {**state, "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}


def timm_form(saved: Saved) -> TimmForm:
    """A classifier; or an encoder with as many classes as none, a ViT's pooling the patches."""
    import timm

    state, classes = without_decoder(plain_state(saved.model)), classes_of(saved)
    if is_vit(saved):
        architecture, pool = f"{saved.name.removeprefix('mae_')}_224", "avg"
        arguments = {"img_size": saved.preprocessing.input_size, "patch_size": patch_of(saved)}
        if isinstance(saved.model, ViTClassifier):
            pool = saved.model.global_pool
        arguments |= {"global_pool": pool, "fc_norm": "fc_norm.weight" in state}
    elif is_convnext(saved):
        architecture, arguments = saved.name, {}
        state = renamed(with_last_norm(state), TIMM_CONVNEXT)
    else:
        architecture, arguments, state = saved.name, {}, renamed(state, [(r"^head\.", "fc.")])
    # Of its small ConvNeXts the MLPs are 1×1 convolutions, and a GRN's vectors are vectors.
    with torch.device("meta"):
        wanted = timm.create_model(architecture, num_classes=len(classes), **arguments).state_dict()
    shaped = {name: value.reshape(wanted[name].shape) for name, value in state.items()}
    return TimmForm(architecture, arguments, shaped)


def described(saved: Saved, plain_head: bool = False) -> dict[str, Any]:
    """All that opening it again takes beside its weights, under the names that checkpoints use.

    `plain_head`: the weights are those of `plain_state`.
    """
    model, preprocessing = saved.model, saved.preprocessing
    args = {"model": saved.name, "input_size": preprocessing.input_size}
    if is_vit(saved) or isinstance(saved.model, MaskedResNet):
        args["patch_size"] = patch_of(saved)
    if isinstance(saved, SavedClassifier):
        args["linear_probe"] = isinstance(model.head, nn.Sequential) and not plain_head
        args["crop_pct"] = preprocessing.crop_pct
        args["test_interpolation"] = preprocessing.interpolation
        args["imagenet_default_mean_and_std"] = tuple(preprocessing.mean) == IMAGENET_MEAN
        args["cls_token"] = is_vit(saved) and model.global_pool == "token"
    # What its images and labels are, for who opens it again.
    args |= _of_data(saved)
    if isinstance(saved, SavedAutoencoder):
        args["mask_ratio"] = float(model.mask_ratio)
        args["norm_pix_loss"] = bool(model.norm_pix_loss)
        if is_vit(saved):
            args["decoder_num_heads"] = int(model.decoder_blocks[0].attn.num_heads)
    seen = {
        **preprocessing._asdict(),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }
    if preprocessing.face_margin is None and not is_resolved(saved.checkpoint):
        del seen["face_margin"]  # None would say that images were used whole
    settings = {"args": args, "preprocessing": seen}
    return {**settings, "classes": list(saved.classes)} if classes_of(saved) else settings


def _of_data(saved: Saved) -> dict[str, Any]:
    """The checkpoint's options about images and labels, without what is not known of them."""
    own = saved.checkpoint.get("args")
    own = own if isinstance(own, dict) else {}
    found = {name: own[name] for name in (*OF_DATA, "eval_flip") if name in own}
    if is_resolved(saved.checkpoint):
        return found
    return {name: value for name, value in found.items() if value is not None}


def other_use(saved: SavedClassifier) -> str:
    """How its images and classes differ from `main_rafdb.py`'s, in words; "" if they do not."""
    own = saved.preprocessing
    usual = Preprocessing(own.input_size, interpolation="bilinear")
    found = []
    if own.crop_pct != usual.crop_pct:
        found.append(f"the central {own.crop_pct:g} of the image instead of all of it")
    if own.interpolation != usual.interpolation:
        found.append(f"{own.interpolation} instead of {usual.interpolation} resizing")
    if [*own.mean, *own.std] != [*usual.mean, *usual.std]:
        found.append("another mean and std")
    if saved.flip:
        found.append("the mean of the answers for an image and its mirror image")
    if canonical(saved.classes) != canonical(ORDERS["rafdb"]):
        found.append("classes of another number or order")
    return "; ".join(found)


def mae_sfer_form(saved: Saved) -> tuple[str, dict[str, Any]]:
    """A file's name and content as `utils.load_model` of the original MAE-SFER takes them.

    Raises BadInput for a model that it does not have.
    """
    size = token_vit_size(saved, "mae-sfer", {s: patch for s, (_, patch) in MAE_SFER.items()})
    state = without_decoder(plain_state(saved.model))
    if not classes_of(saved):
        return MAE_SFER[size][0], {"model": state}
    epoch = saved.checkpoint.get("epoch")
    return f"vit-{size}-finetuned.pth", {
        "epoch": epoch if type(epoch) is int else 0,
        "train_loss": math.inf,  # as theirs where none is known
        "model_state_dict": state,
        **described(saved, plain_head=True),  # ignored by their loader
    }


def s2d_form(saved: Saved) -> tuple[str, dict[str, Any]]:
    """A file's name and content as S2D's `_create_vision_transformer` takes them.

    Without a head: S2D's has another name, and the classes of its videos. Raises BadInput for
    anything but a ViT-Base.
    """
    token_vit_size(saved, "s2d", {"base": 16})
    state = without_decoder(plain_state(saved.model))
    state = {name: value for name, value in state.items() if root(name) != "head"}
    entry = "model_state_dict" if classes_of(saved) else "model"
    return "vit-base-s2d.pth", {entry: {**state, **S2D_PLACEHOLDER}}


def token_vit_size(saved: Saved, to: str, patches: dict[str, int]) -> str:
    """The size of a saved ViT, where the program `to` has this very one.

    `patches`: the sizes it has, with the side length of their patches in pixels. Raises BadInput
    for any other model.
    """
    size = vit_size(saved)
    if size not in patches:
        names = ", ".join(f"ViT-{s.title()}" for s in patches)
        raise BadInput(f"--to {to}: takes {names} only; this checkpoint is {saved.name}")
    if (patch := patch_of(saved)) != patches[size]:
        theirs = f"its ViT-{size.title()} has {patches[size]}-pixel patches"
        raise BadInput(f"--to {to}: {theirs}, this checkpoint {patch}-pixel ones")
    if (side := saved.preprocessing.input_size) != 224:
        raise BadInput(f"--to {to}: its input is 224 px, this checkpoint's {side} px")
    if classes_of(saved) and saved.model.global_pool != "token":
        raise BadInput(
            f"--to {to}: its models classify by the class token, this checkpoint by the mean of "
            "the patches; fine-tune with --cls_token True"
        )
    return size


def timm_config(saved: Saved, form: TimmForm) -> dict[str, Any]:
    """`config.json` as `timm.create_model("local-dir:…")` reads it."""
    classes, preprocessing = classes_of(saved), saved.preprocessing
    size, whole = preprocessing.input_size, preprocessing.crop_pct is None
    first, last = ("stem.0", "head.fc") if is_convnext(saved) else ("conv1", "fc")
    if is_vit(saved):
        first, last = "patch_embed.proj", "head"
    config = {
        "architecture": form.architecture,
        "num_classes": len(classes),
        "num_features": features_of(saved),
        "model_args": form.arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": is_vit(saved),
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
