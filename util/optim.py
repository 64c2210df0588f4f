"""The optimizer and what it decays."""

import torch
from torch import nn

# Tokens, position embeddings and GRN's parameters have more than one dimension but are no weights.
NOT_DECAYED = {"cls_token", "mask_token", "pos_embed", "decoder_pos_embed", "gamma", "beta"}


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Weight decay is for matrices and filters: see docs/deviations.md."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in NOT_DECAYED | {"bias"}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two optimizer groups, decayed or not, of all trained parameters in the model's order."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if is_decayed(name, p)]
    rest = [p for name, p in trained if not is_decayed(name, p)]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW in one fused kernel where the device has one."""
    groups = decay_groups(model, weight_decay)
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device in ("cpu", "cuda", "mps"))
