"""What a classifier looks at: a map over the image, for people to judge.

A ViT by attention rollout (Quantifying Attention Flow in Transformers, Abnar & Zuidema 2020,
section 3), a convolutional network by Grad-CAM (Selvaraju et al. 2017, section 3). Rollout says
where the pooled features come from, whatever the class; Grad-CAM what speaks for one class. Neither
proves that the prediction rests on what it shows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import Attention, ViTClassifier


def attention_map(model: nn.Module, x: Tensor, target: Tensor | None = None) -> Tensor:
    """Normalised images (N, 3, S, S) -> (N, S, S) float32 in 0–1, each scaled to its own maximum.

    `target` (N,): the classes that Grad-CAM asks about, default the predicted ones; rollout has no
    use for it. An image that nothing speaks for has a map of zeros. The model may be in any mode,
    the caller in any grad mode; both stay, and no gradient is left behind. Blocks must not be
    compiled. Raises TypeError for a model that is no classifier of ours.
    """
    # In fp32, whatever the caller computes in: rollout multiplies as many matrices as blocks.
    with evaluating(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        method = getattr(model, "explained_by", "")
        if method == "attention rollout":
            heat = attention_rollout(model, x)
        elif method == "Grad-CAM":
            heat = grad_cam(model, x, target)
        else:
            raise TypeError(f"a {type(model).__name__} is no classifier whose attention is known")
        size = x.shape[-2:]
        heat = F.interpolate(heat[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        return heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def attention_rollout(model: ViTClassifier, x: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, g, g): each patch's share in the tokens that are pooled.

    Heads are averaged, and half of each layer is the identity, for the residual connection. The
    rows wanted are the class token's, or, where patches are pooled, the mean over all patches'.
    """
    rollout: Tensor | None = None

    def add_layer(attention: Attention, _module: nn.Module, _inputs: object, qkv: Tensor) -> None:
        nonlocal rollout
        q, k, _ = qkv.float().chunk(3, dim=-1)
        q, k = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in (q, k))
        mean = (q * attention.scale @ k.mT).softmax(-1).mean(dim=1)
        layer = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2  # rows still sum to 1
        rollout = layer if rollout is None else layer @ rollout

    # The fused kernel does not tell its weights: they are computed again from what it is given.
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

    The model is a convolutional classifier: `head(pool(encode(x)))`.
    Gradients are those of the target's logit, averaged over the cells; what speaks against the
    target counts as nothing.
    """
    cells = model.encode(x)  # (N, 1, h, w, D); nothing below it is differentiated
    with torch.inference_mode(False), torch.enable_grad():
        cells = cells.detach().clone().requires_grad_()
        logits = model.head(model.pool(cells))
        target = logits.argmax(dim=1) if target is None else target.to(logits.device)
        chosen = logits.gather(1, target[:, None]).sum()  # images do not touch each other
        (gradient,) = torch.autograd.grad(chosen, cells)
    weights = gradient.float().mean(dim=(1, 2, 3), keepdim=True)
    return (weights * cells.detach().float()).sum(dim=-1)[:, 0].relu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
