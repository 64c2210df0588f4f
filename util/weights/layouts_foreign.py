"""Layouts of transformers, mmpretrain and S2D under our names, and transformers' from ours.

A tensor that has no place in our models keeps its name, so that loading it fails visibly.
"""

import re

import torch
from torch import Tensor

from util.states import Pairs, State, renamed, root, to_ours, to_theirs

TRANSFORMERS = "transformers"  # its layouts in words begin with this


def _blocks(ours: str, theirs: str, parts: Pairs) -> Pairs:
    """The name pairs of all tensors in transformer blocks."""
    return [(f"{ours}.{{}}.{own}.", f"{theirs}.{{}}.{other}.") for own, other in parts]


# Names that releases 4.50 to 5.24 of transformers save. ViT, ViTMAE and BEiT differ only outside
# the blocks.
_HF_BLOCK = [
    ("norm1", "layernorm_before"),
    ("attn.query", "attention.attention.query"),
    ("attn.key", "attention.attention.key"),
    ("attn.value", "attention.attention.value"),
    ("attn.proj", "attention.output.dense"),
    ("norm2", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
]
HF_VIT = [
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    *_blocks("blocks", "encoder.layer", _HF_BLOCK),
    ("norm.", "layernorm."),
    ("fc_norm.", "pooler.layernorm."),
    ("head.", "classifier."),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("decoder_embed.", "decoder.decoder_embed."),
    *_blocks("decoder_blocks", "decoder.decoder_layers", _HF_BLOCK),
    ("decoder_norm.", "decoder.decoder_norm."),
    ("decoder_pred.", "decoder.decoder_pred."),
]
HF_CONVNEXT = [
    ("downsample_layers.0.0.", "embeddings.patch_embeddings."),
    ("downsample_layers.0.1.", "embeddings.layernorm."),
    ("downsample_layers.{}.", "encoder.stages.{}.downsampling_layer."),
    ("stages.{}.{}.dwconv.", "encoder.stages.{}.layers.{}.dwconv."),
    ("stages.{}.{}.norm.", "encoder.stages.{}.layers.{}.layernorm."),
    ("stages.{}.{}.pwconv1.", "encoder.stages.{}.layers.{}.pwconv1."),
    ("stages.{}.{}.grn.gamma", "encoder.stages.{}.layers.{}.grn.weight"),
    ("stages.{}.{}.grn.beta", "encoder.stages.{}.layers.{}.grn.bias"),
    ("stages.{}.{}.pwconv2.", "encoder.stages.{}.layers.{}.pwconv2."),
    ("norm.", "layernorm."),
    ("head.", "classifier."),
]
# Other spellings: models with a head put their backbone under a prefix; releases from 5 on save
# ViTMAE's decoder under another name, and use other names in memory (`state_dict()`).
_HF_SPELLINGS = [
    (r"^(vit|beit|convnextv2)\.", ""),
    (r"^layers\.", "encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]

_MMPRETRAIN_BLOCK = [
    ("norm1", "ln1"),
    ("attn.qkv", "attn.qkv"),
    ("attn.proj", "attn.proj"),
    ("norm2", "ln2"),
    ("mlp.fc1", "ffn.layers.0.0"),
    ("mlp.fc2", "ffn.layers.1"),
]
MMPRETRAIN = [
    ("patch_embed.proj.", "patch_embed.projection."),
    ("norm_pre.", "pre_norm."),
    *_blocks("blocks", "layers", _MMPRETRAIN_BLOCK),
    ("norm.", "ln1."),
    ("fc_norm.", "ln2."),
    ("mask_token", "neck.mask_token"),
    ("decoder_pos_embed", "neck.decoder_pos_embed"),
    ("decoder_embed.", "neck.decoder_embed."),
    *_blocks("decoder_blocks", "neck.decoder_blocks", _MMPRETRAIN_BLOCK),
    ("decoder_norm.", "neck.ln1."),
    ("decoder_pred.", "neck.decoder_pred."),
    ("pre_logits.", "head.layers.pre_logits."),
    ("head.", "head.layers.head."),
    ("head.", "head.fc."),
]
# A linear probe has a batch norm before its head, so the head is the second layer here.
_MMPRETRAIN_PROBE = [
    ("head.0.", "neck.bn."),
    ("head.1.", "head.layers.head."),
    ("head.1.", "head.fc."),
]

S2D = [("norm.", "ln_post."), ("head.", "head.fc_cls."), ("head.", "fc_cls.")]
# What S2D adds to its ViT: landmarks, adapters and time. Without them it predicts differently.
S2D_ADDS = {"patch_embed_prompt", "prompt_blocks", "prompt_norms", "temporal_embedding"}


def from_foreign(state: State) -> tuple[State, str] | None:
    """The weights under our names, and the layout in words; None if it is none of these."""
    if any(re.match(r"((vit|beit|convnextv2)\.)?embeddings\.", name) for name in state):
        return _from_transformers(state)
    if any(re.match(r"(backbone\.)?layers\.\d+\.ln1\.", name) for name in state):
        return _from_mmpretrain(state)
    roots = {root(name) for name in state}
    if "patch_embed" in roots and roots & {"ln_post", *S2D_ADDS}:
        return renamed(state, to_ours(S2D)), "S2D"
    return None


def _from_transformers(state: State) -> tuple[State, str]:
    state = renamed(state, _HF_SPELLINGS)
    if any(name.startswith("encoder.stages.") for name in state):
        return renamed(state, to_ours(HF_CONVNEXT)), f"{TRANSFORMERS} ConvNeXt V2"
    state = renamed(state, to_ours(HF_VIT))
    kind = "ViT" if any(name.endswith(".key.bias") for name in state) else "BEiT"
    if any(root(name) == "decoder_pred" for name in state):
        kind = "ViTMAE"
    return fused(state), f"{TRANSFORMERS} {kind}"


def _from_mmpretrain(state: State) -> tuple[State, str]:
    probe = any(name.startswith("neck.bn.") for name in state)
    pairs = [*_MMPRETRAIN_PROBE, *MMPRETRAIN] if probe else MMPRETRAIN
    state = renamed(state, [(r"^backbone\.", ""), *to_ours(pairs)])
    decoder = any(root(name) == "decoder_pred" for name in state)
    return state, f"mmpretrain {'MAE' if decoder else 'ViT'}"


def to_transformers_vit(state: State) -> State:
    """Our ViT's or MAE's weights under transformers' names, without the prefix of a backbone."""
    return renamed(separated(state), to_theirs(HF_VIT))


def to_transformers_convnext(state: State) -> State:
    """Our ConvNeXt V2's weights under transformers' names, without the prefix of a backbone."""
    return renamed(state, to_theirs(HF_CONVNEXT))


def separated(state: State) -> State:
    """Split every `qkv`, (3 D, D) or (3 D), into `query`, `key`, `value`, (D, D) or (D)."""
    result = {}
    for name, value in state.items():
        if ".qkv." not in name:
            result[name] = value
            continue
        for part, own in zip(("query", "key", "value"), value.chunk(3), strict=True):
            result[name.replace(".qkv.", f".{part}.")] = own
    return result


def fused(state: State) -> State:
    """Join every `query`, `key` and `value`, (D, D) or (D), into one `qkv`, (3 D, D) or (3 D).

    A BEiT has no key biases. Any value would do: it adds the same to a query's scores with all keys
    and cancels in the softmax. If one of the three is missing, the others keep their names.
    """
    biased = any(name.endswith(".key.bias") for name in state)
    result = dict(state)
    for name, query in state.items():
        if not (match := re.fullmatch(r"(.+\.attn\.)query\.(weight|bias)", name)):
            continue
        whole, key, value = (f"{match[1]}{part}.{match[2]}" for part in ("qkv", "key", "value"))
        parts = [query, state.get(key), state.get(value)]
        if match[2] == "bias" and not biased and _alike([query, state.get(value)]):
            parts[1] = torch.zeros_like(query)
        if _alike(parts) and whole not in state:
            for old in (name, key, value):
                result.pop(old, None)
            result[whole] = torch.cat(parts)
    return result


def _alike(parts: list[Tensor | None]) -> bool:
    """Whether these are plain tensors of one type and shape, so that they can be joined.

    A file may hold anything under their names.
    """
    kinds = {v is not None and (v.shape, v.dtype, v.layout, v.device) for v in parts}
    first = parts[0]
    if len(kinds) > 1 or first is None or not first.ndim:
        return False
    return first.layout == torch.strided and not any(v.is_quantized for v in parts)
