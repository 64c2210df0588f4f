"""Loads weights of any known layout into a model, exactly or not at all.

Here, a model is only known by its state dict; util/weights/layouts.py translates layouts.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbones import titles
from backbones.family import DECODER
from util.checkpoint.read import read_checkpoint
from util.errors import BadInput
from util.positions import sincos_position_embedding
from util.states import State, root
from util.weights.hf_settings import check_config
from util.weights.layouts import (
    HEAD,
    Architecture,
    encoder_roots,
    head_classes,
    identify_architecture,
    translate,
)
from util.weights.layouts_foreign import S2D_ADDS, TRANSFORMERS
from util.wording import did_you_mean

OTHER_KEYS = ("model_ema", "state_dict", "state_dict_ema", "model_state_dict")


class LoadReport(NamedTuple):
    """What was loaded. Names are the model's; `unexpected`: the checkpoint's, translated."""

    source: str
    entry: str  # of the checkpoint; "" for a bare state dict
    layout: str
    loaded: list[str]
    missing: list[str]  # not in the checkpoint: stays as initialised
    unexpected: list[str]  # in the checkpoint, not used by the model
    resized: list[str]  # loaded, position embeddings interpolated from another grid
    recomputed: list[str]  # fixed position embeddings of another grid, replaced by the model's
    replaced_head: str  # "1000 -> 7 classes"; "" if no head was replaced

    def __str__(self) -> str:
        """One or two lines to print."""
        entry = f" from '{self.entry}'" if self.entry else ""
        line = f"{self.source}: {self.layout}, {len(self.loaded)} tensors loaded{entry}"
        notes = {
            "interpolated": ", ".join(self.resized),
            "recomputed for this input size": ", ".join(self.recomputed),
            "head replaced": self.replaced_head,
            "newly initialised": ", ".join(roots(self.missing)),
            "not used": ", ".join(roots(self.unexpected)),
        }
        told = "; ".join(f"{what}: {names}" for what, names in notes.items() if names)
        return f"{line}\n  {told}" if told else line


def read_source(source: str | Path, cache_dir: str | None = None) -> dict[str, Any]:
    """The checkpoint at a path or of a released name, read without running code in it.

    A fine-tuned one of ours has `classes`, `preprocessing` and `evaluated` besides its weights. A
    bare state dict is returned as it is. Raises BadInput.
    """
    return read_checkpoint(find_source(source, cache_dir))


def find_source(source: str | Path, cache_dir: str | None = None) -> Path:
    """The path of a source; a released name is downloaded (to `cache_dir`)."""
    if os.path.exists(source):
        return Path(source)
    from util.download import RELEASED, fetch  # rarely needed, and it needs more packages

    if str(source) in RELEASED:
        return fetch(str(source), cache_dir)
    hint = did_you_mean(str(source), RELEASED) or f"those are {', '.join(RELEASED)}"
    raise BadInput(f"{source}: no such file, and no released weights of this name; {hint}")


def load_pretrained(
    model: nn.Module,
    source: str | Path,
    *,
    key: str = "model|module",
    prefix: str = "",
    keep_head: bool = False,
    checkpoint: dict[str, Any] | None = None,
) -> LoadReport:
    """Load a checkpoint into a classifier or a pre-training model, in place.

    `key`: the checkpoint's entries to look in, in this order (`a|b`). `prefix`: use only tensors
    whose names begin with it, and strip it. `keep_head`: for evaluation; everything must fit, the
    head included, while otherwise a classifier's head and last norm may stay as initialised.
    `checkpoint`: what `read_source` returned, if it was called before. Raises BadInput if anything
    else does not fit, and then leaves the model as it was.
    """
    checkpoint = read_source(source) if checkpoint is None else checkpoint
    weights, entry = pick_state(source, checkpoint, key, prefix)
    weights, layout = translate(weights)
    # Masked convolutional networks hold their encoder under `encoder.`; the others at the top.
    state = model.state_dict()
    names = {name.removeprefix("encoder."): name for name in state}
    own = {short: state[name] for short, name in names.items()}
    wanted, held = identify_architecture(own), identify_architecture(weights)
    check_architecture(source, held, wanted, weights)
    if layout.startswith(TRANSFORMERS):
        check_config(source, held)

    pretrain = any(root(name) in DECODER for name in own)
    replaced_head = ""
    if keep_head:
        check_alone(source, weights)
        check_head(source, head_classes(weights), head_classes(own))
    elif head_classes(weights) and not pretrain:
        replaced_head = f"{head_classes(weights)} -> {head_classes(own)} classes"
        weights = {name: value for name, value in weights.items() if root(name) != "head"}
    recomputed = recompute_positions(weights, own) if pretrain else []
    resized = resize_positions(weights, own)

    optional, strict = parts(weights, wanted, pretrain, keep_head)
    check_exact(source, weights, own=own, optional=optional, strict=strict)
    loaded = {name: value for name, value in weights.items() if name in own}
    check_values(source, loaded, own)
    model.load_state_dict(state | {names[n]: value for n, value in loaded.items()})
    return LoadReport(
        source=str(source),
        entry=entry,
        layout=layout,
        loaded=[names[n] for n in loaded],
        missing=[names[n] for n in own if n not in loaded],
        unexpected=[n for n in weights if n not in own],
        resized=[names[n] for n in resized],
        recomputed=[names[n] for n in recomputed],
        replaced_head=replaced_head,
    )


def pick_state(
    source: str | Path, checkpoint: dict[str, Any], key: str, prefix: str
) -> tuple[State, str]:
    """The tensors of the first entry that has any, and its name; "" for the checkpoint itself."""
    entries = [*key.split("|"), *OTHER_KEYS]
    entry = next((e for e in entries if tensors(checkpoint.get(e))), "")
    state = tensors(checkpoint[entry] if entry else checkpoint)
    if not state:
        raise BadInput(
            f"{source}: no weights under {', '.join(entries)}; it holds {listed(checkpoint)}: "
            "name the right one with --model_key"
        )
    if prefix:
        part = {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
        if not part:
            raise BadInput(
                f"--model_prefix {prefix}: no tensor of {source} is named so; "
                f"its names begin with {listed(roots(state))}"
            )
        return part, entry
    return state, entry


def tensors(entry: object) -> State:
    """The named tensors of an entry; {} if it is not a dict."""
    items = entry.items() if isinstance(entry, dict) else ()
    return {n: v for n, v in items if isinstance(n, str) and isinstance(v, Tensor)}


def check_architecture(
    source: str | Path, held: Architecture | None, wanted: Architecture, weights: State
) -> None:
    """Raises BadInput unless the weights have the architecture of the model."""
    if held is None:
        raise BadInput(
            f"{source}: no {titles()} in a known layout (it holds {listed(weights)}), but --model "
            f"is {wanted}; choose a part of a larger model with --model_key and --model_prefix"
        )
    if held == wanted:
        return
    if held.in_chans != wanted.in_chans:
        raise BadInput(
            f"{source}: holds a model of images with {held.in_chans} channels, "
            f"but --model takes {wanted.in_chans}"
        )
    what = f"{source}: holds {held}, but --model is {wanted}"
    if not held.size:
        raise BadInput(f"{what}; we have no such model, the nearest is {held.option}")
    misnamed = (held.classifier, held.patch) == ("vit_small_patch16", 32)
    note = " (MAE-SFER's own vit_small_patch16 is one of these)" if misnamed else ""
    other_patch = held._replace(patch=wanted.patch) == wanted
    if other_patch and not held.family.free_patch:
        kernels = f"{held.patch}×{held.patch} instead of {wanted.patch}×{wanted.patch}"
        raise BadInput(f"{what}: its first convolution is {kernels}; we have no such model")
    use = f"--patch_size {held.patch}" if other_patch else held.option
    raise BadInput(f"{what}: use {use}{note}")


def check_alone(source: str | Path, weights: State) -> None:
    """Raises BadInput for weights of which our model would use only a part."""
    if added := [name for name in roots(weights) if name in S2D_ADDS]:
        raise BadInput(
            f"{source}: S2D's model, which predicts differently without {', '.join(added)}; "
            f"fine-tune from it instead: main_finetune.py --finetune {source} --data_path …"
        )


def check_head(source: str | Path, held: int, wanted: int) -> None:
    """Raises BadInput unless a head to be kept has the model's number of classes."""
    if not held:
        raise BadInput(f"{source}: holds no head to evaluate; train one with --finetune {source}")
    if held != wanted:
        raise BadInput(
            f"{source}: its head has {held} classes, the model {wanted}; use data with the same "
            "classes (see --nb_classes)"
        )


def recompute_positions(weights: State, own: State) -> list[str]:
    """Replace fixed position embeddings of another grid by the model's own, in place; -> names.

    Those of pre-training are sines and cosines of patch positions, which are exact on any grid.
    """
    recomputed = []
    for name in ("pos_embed", "decoder_pos_embed"):
        value = weights.get(name)
        if value is None or name not in own or value.ndim != 3 or value.shape[2] % 4:
            continue
        grid = math.isqrt(max(value.shape[1] - 1, 0))
        if value.shape == own[name].shape or value.shape[1] != 1 + grid**2:
            continue
        fixed = sincos_position_embedding(value.shape[2], grid)
        if torch.allclose(value.float(), fixed, atol=1e-4):
            weights[name] = own[name]
            recomputed.append(name)
    return recomputed


def resize_positions(weights: State, own: State) -> list[str]:
    """Interpolate position embeddings (1, 1 + g*g, D) to the model's grid, in place; -> names.

    Bicubic, as in the official code; the class token's is kept. One that is not a square grid is
    left, to be refused for its shape.
    """
    from timm.layers import resample_abs_pos_embed

    resized = []
    for name in ("pos_embed", "decoder_pos_embed"):
        if name not in weights or name not in own or weights[name].shape == own[name].shape:
            continue
        value, side = weights[name], math.isqrt(own[name].shape[1] - 1)
        patches = value.shape[1] - 1 if value.ndim == 3 else 0
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            weights[name] = resample_abs_pos_embed(value, [side, side], antialias=False)
            resized.append(name)
    return resized


def parts(
    weights: State, wanted: Architecture, pretrain: bool, keep_head: bool
) -> tuple[set[str], set[str]]:
    """First components of names: which weights may omit, and which must be used completely."""
    if pretrain:
        # A decoder must be complete or absent: half of one would be neither trained nor new.
        decoder = any(root(name) in DECODER for name in weights)
        pooled = {"norm"} if "fc_norm.weight" in weights else set()  # a classifier's, after pooling
        return pooled if decoder else DECODER | pooled, encoder_roots() | DECODER
    if keep_head:
        # Our ViTs never have both norms, one before and one after pooling.
        return set(), encoder_roots() | HEAD | {"norm", "fc_norm"}
    return {"head", wanted.family.new_norm}, encoder_roots()


def check_exact(
    source: str | Path, weights: State, own: State, optional: set[str], strict: set[str]
) -> None:
    """Raises BadInput for a missing tensor, an unused one in `strict`, or another shape."""
    lacking = [n for n in own if n not in weights and root(n) not in optional]
    surplus = [n for n in weights if n not in own and root(n) in strict]
    others = [n for n, v in weights.items() if n in own and v.shape != own[n].shape]
    misfits = [f"{n} {shape(weights[n])} instead of {shape(own[n])}" for n in others]
    found = {"missing": lacking, "unexpected": surplus, "wrong shape": misfits}
    told = "; ".join(f"{what} {listed(names)}" for what, names in found.items() if names)
    if told:
        advice = pooling(lacking, weights)
        if all(root(name) in DECODER for name in (*lacking, *surplus, *others)):
            advice = other_decoder(weights, own)
        raise BadInput(f"{source}: does not fit the model: {told}{advice}")


def other_decoder(weights: State, own: State) -> str:
    """Advice if the weights' decoder has another depth or width than the model's."""

    def depth_and_width(state: State) -> list[int]:
        blocks = {n.split(".")[1] for n in state if root(n) in ("decoder", "decoder_blocks")}
        return [len(blocks), state["mask_token"].numel() if "mask_token" in state else 0]

    names = ("--decoder_depth", "--decoder_embed_dim")
    pairs = zip(names, depth_and_width(weights), depth_and_width(own), strict=True)
    options = [f"{name} {held}" for name, held, wanted in pairs if held and held != wanted]
    return f"; its decoder differs: use {' '.join(options)}" if options else ""


def pooling(lacking: list[str], weights: State) -> str:
    """Advice if a ViT was fine-tuned with the pooling that the model does not have."""
    if "norm.weight" in lacking and "fc_norm.weight" in weights:
        return "; it was fine-tuned with average pooling: leave out --cls_token"
    if "fc_norm.weight" in lacking and "norm.weight" in weights:
        return "; it was fine-tuned with the class token: use --cls_token"
    return ""


def check_values(source: str | Path, weights: State, own: State) -> None:
    """Raises BadInput for weights that are not plain, finite numbers."""
    for name, value in weights.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise BadInput(f"{source}: {name} holds {value.dtype}, not {own[name].dtype}")
        if value.is_floating_point() and not value.float().isfinite().all():
            raise BadInput(f"{source}: {name} is not finite; the run that wrote it had diverged")


def roots(names: State | list[str]) -> list[str]:
    """The distinct first components of names, in order."""
    return list(dict.fromkeys(root(name) for name in names))


def listed(names: dict | list[str]) -> str:
    """Up to five names."""
    first = [str(name) for name in names][:5]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def shape(value: Tensor) -> str:
    """A tensor's shape as 3x4."""
    return "x".join(map(str, value.shape)) or "a number"
