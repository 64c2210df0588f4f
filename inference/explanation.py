"""Attention maps: which parts of an image a classifier looks at.

ViTs use attention rollout (Quantifying Attention Flow in Transformers, Abnar & Zuidema 2020,
section 3), convolutional networks Grad-CAM (Selvaraju et al. 2017, section 3). Rollout shows where
the pooled features come from, whatever the class; Grad-CAM shows what speaks for one class. Neither
proves that the prediction is based on what it shows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import Attention, ViTClassifier

NOTES = {  # on attention maps, by method
    "attention rollout": "which patches the features come from, whatever the class",
    "Grad-CAM": "what speaks for the predicted class",
}


def attention_map(model: nn.Module, x: Tensor, target: Tensor | None = None) -> Tensor:
    """Normalised images (N, 3, S, S) -> (N, S, S) float32 in 0–1, each scaled to its own maximum.

    `target` (N,): the classes that Grad-CAM explains, by default the predicted ones; rollout
    ignores it. If nothing speaks for the class, the map is zero. Leaves the model's mode, the
    caller's grad mode and all gradients as they are. Blocks must not be compiled. Raises TypeError
    for a model that is not one of our classifiers.
    """
    # In fp32 under any autocast: rollout multiplies one matrix per block.
    with evaluating(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        method = getattr(model, "explained_by", "")
        if method == "attention rollout":
            heat = attention_rollout(model, x)
        elif method == "Grad-CAM":
            heat = grad_cam(model, x, target)
        else:
            raise TypeError(f"attention maps are not implemented for {type(model).__name__}")
        size = x.shape[-2:]
        heat = F.interpolate(heat[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        return heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def attention_rollout(model: ViTClassifier, x: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, g, g): the share of each patch in the pooled features.

    Attention is averaged over heads and mixed equally with the identity, for the residual
    connection. The result is the class token's row, or the mean over the patches' rows with mean
    pooling.
    """
    rollout: Tensor | None = None

    def add_layer(attention: Attention, _module: nn.Module, _inputs: object, qkv: Tensor) -> None:
        nonlocal rollout
        q, k, _ = qkv.float().chunk(3, dim=-1)
        q, k = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in (q, k))
        mean = (q * attention.scale @ k.mT).softmax(-1).mean(dim=1)
        layer = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2  # rows still sum to 1
        rollout = layer if rollout is None else layer @ rollout

    # The fused kernel does not return attention weights, so they are recomputed from its inputs.
    hooks = [
        block.attn.qkv.register_forward_hook(partial(add_layer, block.attn))
        for block in model.blocks
    ]
    try:
        model.forward_features(x)
    finally:
        for hook in hooks:
            hook.remove()
    to_patches = rollout[:, :, 1:]
    rows = to_patches[:, 0] if model.global_pool == "token" else to_patches[:, 1:].mean(dim=1)
    return rows.unflatten(1, model.patch_embed.grid_size)


def grad_cam(model: nn.Module, x: Tensor, target: Tensor | None = None) -> Tensor:
    """(N, 3, H, W) -> (N, H/32, W/32): the last stage's channels, each weighted by its gradient.

    The model must be a convolutional classifier: `head(pool(encode(x)))`. Gradients are those of
    the target's logit, averaged over the cells. Negative values, which speak against the target,
    are set to zero.
    """
    cells = model.encode(x)  # (N, 1, h, w, D); nothing below it is differentiated
    with torch.inference_mode(False), torch.enable_grad():
        cells = cells.detach().clone().requires_grad_()
        logits = model.head(model.pool(cells))
        target = logits.argmax(dim=1) if target is None else target.to(logits.device)
        chosen = logits.gather(1, target[:, None]).sum()  # images are independent of each other
        (gradient,) = torch.autograd.grad(chosen, cells)
    weights = gradient.float().mean(dim=(1, 2, 3), keepdim=True)
    return (weights * cells.detach().float()).sum(dim=-1)[:, 0].relu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode; on exit, restore the mode of each of its modules."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
