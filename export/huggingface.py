"""A saved model in the form of Hugging Face's transformers: names of weights, and settings.

Nothing is approximated: where the class with the obvious name computes something else, another one
that computes the same is used. Names are those of transformers before release 5, which later
releases read as well.
"""

from typing import Any, NamedTuple

from backbones import size_of
from backbones.convnextv2 import with_last_norm
from export.weights import (
    classes_of,
    family,
    plain_state,
    without_decoder,
)
from models_saved import Preprocessing, Saved, SavedAutoencoder, SavedClassifier, SavedEncoder
from util.errors import BadInput
from util.patch_counts import visible_patches
from util.states import State, root
from util.weights.hf_settings import EPS, RESAMPLE
from util.weights.layouts_foreign import to_transformers_convnext, to_transformers_vit

MASK_RATIO = 0.75  # for encoders, whose mask ratio is not recorded


class HFForm(NamedTuple):
    """The content of `config.json`, and the weights for the class it names."""

    config: dict[str, Any]
    state: State


def hf_form(saved: Saved) -> HFForm:
    """The model as the transformers class that computes the same, named by `architectures`.

    Raises BadInput for a family without such a class: ResNet.
    """
    form = FORMS.get(family(saved).transformers)
    if form is None:
        raise BadInput(
            f"--to hf: takes ViT and ConvNeXt V2 only; export {saved.name} --to timm or onnx"
        )
    config, state = form(saved)
    if classes := classes_of(saved):
        config["id2label"] = {str(k): name for k, name in enumerate(classes)}
        config["label2id"] = {name: k for k, name in enumerate(classes)}
    return HFForm({**config, "dtype": "float32"}, state)


def _hf_convnext(saved: Saved) -> HFForm:
    size, classes = size_of(saved.name), classes_of(saved)
    state = with_last_norm(without_decoder(plain_state(saved.model)))
    state = to_transformers_convnext(state)
    config = {
        "architectures": ["ConvNextV2ForImageClassification" if classes else "ConvNextV2Model"],
        "model_type": "convnextv2",
        "num_channels": 3,
        "patch_size": 4,
        "num_stages": 4,
        "hidden_sizes": list(size.dims),
        "depths": list(size.depths),
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
        "drop_path_rate": 0.0,
        "image_size": saved.preprocessing.input_size,
    }
    return HFForm(config, _under(state, "convnextv2") if classes else state)


def _hf_vit(saved: Saved) -> HFForm:
    """ViT for class-token pooling, BEiT for mean pooling, ViTMAE for pre-trained models."""
    size = size_of(saved.name)
    config = {
        "hidden_size": size.dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.dim,
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
        "image_size": saved.preprocessing.input_size,
        "patch_size": saved.model.own_options()["patch_size"],
        "num_channels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    state = plain_state(saved.model)
    if isinstance(saved, SavedEncoder):
        state = without_decoder(state)
    state = to_transformers_vit(state)
    if not isinstance(saved, SavedClassifier):
        return _hf_mae(saved, config, state)
    if saved.model.global_pool == "token":
        config |= {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
        return HFForm({**config, "qkv_bias": True}, _under(state, "vit"))
    # transformers' ViT only classifies by the class token. Its BEiT, without relative positions and
    # layer scale, is the same transformer with our pooling. BEiT has no key bias, but that bias
    # adds the same value to a query's score with every key, so it cancels in the softmax.
    config |= {
        "model_type": "beit",
        "architectures": ["BeitForImageClassification"],
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.0,
    }
    state = {name: value for name, value in state.items() if not name.endswith(".key.bias")}
    return HFForm(config, _under(state, "beit"))


def _hf_mae(saved: Saved, config: dict[str, Any], state: State) -> HFForm:
    model, decoder = saved.model, isinstance(saved, SavedAutoencoder)
    config |= {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining" if decoder else "ViTMAEModel"],
        "qkv_bias": True,
        "mask_ratio": _their_mask_ratio(model.num_patches, float(model.mask_ratio)),
        "norm_pix_loss": bool(model.norm_pix_loss),
    }
    if not decoder:
        return HFForm({**config, "mask_ratio": MASK_RATIO}, state)
    width = model.decoder_embed.out_features
    config |= {
        "decoder_hidden_size": width,
        "decoder_intermediate_size": 4 * width,
        "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": int(model.decoder_blocks[0].attn.num_heads),
    }
    return HFForm(config, _under(state, "vit"))


FORMS = {"vit": _hf_vit, "convnextv2": _hf_convnext}  # see Family.transformers


def _their_mask_ratio(patches: int, ratio: float) -> float:
    """A ratio that makes transformers, which rounds without our epsilon, keep as many patches."""
    keep = visible_patches(patches, ratio)
    return ratio if int(patches * (1 - ratio)) == keep else 1 - (keep + 0.5) / patches


def _under(state: State, prefix: str) -> State:
    """Put the prefix before the names of the backbone, but not of the head and the decoder."""
    beside = ("classifier", "decoder")
    return {n if root(n) in beside else f"{prefix}.{n}": value for n, value in state.items()}


def image_processor(preprocessing: Preprocessing) -> dict[str, Any]:
    """The content of `preprocessor_config.json`: the same preprocessing in transformers' terms."""
    size = {"height": preprocessing.input_size, "width": preprocessing.input_size}
    config = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": RESAMPLE[preprocessing.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    if preprocessing.crop_pct is None:  # the whole image, squeezed into a square
        return config
    config |= {"image_processor_type": "BitImageProcessor", "do_center_crop": True}
    short = round(preprocessing.input_size / preprocessing.crop_pct)
    return {**config, "size": {"shortest_edge": short}, "crop_size": size}
