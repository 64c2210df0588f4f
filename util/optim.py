"""The optimizer: which parameters decay, and layer-wise learning rates."""

from collections.abc import Callable

import torch
from torch import nn

from util.errors import BadInput

# Tokens, position embeddings and GRN's parameters: several dimensions, but not matrices.
NOT_DECAYED = {"cls_token", "mask_token", "pos_embed", "decoder_pos_embed", "gamma", "beta"}


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices and filters only, see docs/deviations.md."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in NOT_DECAYED | {"bias"}


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict]:
    """Optimizer groups of all trainable parameters, by learning rate; decayed ones come first.

    `lr_scale(name)` is the factor by which a parameter's learning rate is scaled.
    """
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decayed = lr_scale(name), is_decayed(name, parameter)
        decay = {"decayed": decayed, "weight_decay": weight_decay if decayed else 0.0}
        group = groups.setdefault((scale, decayed), {"lr_scale": scale, **decay, "params": []})
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: not group["decayed"])


def set_rates(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float | None = None
) -> None:
    """Set the learning rate of each group, scaled, and the weight decay of decayed groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if weight_decay is not None and group.get("decayed", True):
            group["weight_decay"] = weight_decay


def adamw(groups: list[dict], lr: float, **options: object) -> torch.optim.AdamW:
    """AdamW, in one fused kernel if the device has one; `options`: betas and eps."""
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=lr, fused=device in ("cpu", "cuda", "mps"), **options)


def create_optimizer(
    name: str, groups: list[dict], lr: float, momentum: float, **options: object
) -> torch.optim.Optimizer:
    """The optimizer of `--opt`: fused AdamW, `lars` as in linear probing, others by timm's names.

    `options`: betas and eps, if given. Raises BadInput for a name that timm does not know.
    """
    if name == "adamw":
        return adamw(groups, lr, **options)
    from timm.optim import Lars, create_optimizer_v2

    if name == "lars":
        # MAE, appendix A.1: the trust ratio applies without weight decay, too, but not to biases.
        for group in groups:
            group["always_adapt"] = all(p.ndim > 1 for p in group["params"])
        return Lars(groups, lr=lr, momentum=momentum)
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr, momentum=momentum, **options)
    except ValueError as error:
        raise BadInput(f"--opt {name}: {error}; try adamw, adam, sgd or lars") from error


def step_if_finite(optimizer: torch.optim.Optimizer, values: torch.Tensor) -> bool:
    """Let a fused optimizer make a step on the device if all `values` there are finite.

    So the host need not wait for them first. Returns False, without a step, for an optimizer that
    is not fused, and on Apple GPUs.
    """
    if not optimizer.defaults.get("fused") or values.device.type not in ("cpu", "cuda"):
        return False
    # What torch's GradScaler sets. Fused optimizers change nothing at all if it is 1.
    optimizer.found_inf = values.isfinite().all().logical_not().float()
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf
    return True


def layer_decay_scale(layer: Callable[[str], int], decay: float) -> Callable[[str], float]:
    """Layer decay: learning-rate factor 1 for the last layer, times `decay` per layer before it."""
    last = layer("head.weight")
    return lambda name: decay ** (last - layer(name))
