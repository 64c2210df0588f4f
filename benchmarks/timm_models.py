"""timm's classifiers as rivals of ours: created, laid out in memory, explained by Grad-CAM."""

import time
from functools import lru_cache

import timm
import torch
from torch import Tensor, nn

from inference.explanation import evaluating


def create(name: str, size: int, classes: int) -> nn.Module:
    """A model with random weights; a ViT gets 8 × 8 patches."""
    sized = {"img_size": size, "patch_size": size // 8} if name.startswith("vit_") else {}
    return timm.create_model(name, num_classes=classes, **sized)


@lru_cache
def faster_order(name: str, size: int, batch: int, device: torch.device) -> torch.memory_format:
    """Channels last or first: on CPUs, either can take 1.5 × as long, by model and batch size."""
    if device.type != "cpu":
        return torch.channels_last
    seconds, x = {}, torch.randn(batch, 3, size, size)
    for order in (torch.channels_last, torch.contiguous_format):
        model = create(name, size, 2).to(memory_format=order)
        steps = []
        for _ in range(4):
            start = time.perf_counter()
            model(x.contiguous(memory_format=order)).sum().backward()
            steps.append(time.perf_counter() - start)
        seconds[order] = min(steps)
    return min(seconds, key=seconds.get)


class Explained(nn.Module):
    """A timm classifier whose features are maps, in the form that `attention_map` takes."""

    explained_by = "Grad-CAM"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode(self, x: Tensor) -> Tensor:
        """(N, 3, S, S) -> cells (N, 1, h, w, D)."""
        return self.model.forward_features(x).permute(0, 2, 3, 1)[:, None]

    def pool(self, cells: Tensor) -> Tensor:
        """The inverse of `encode`'s change of axes, since timm's heads pool themselves."""
        return cells[:, 0].permute(0, 3, 1, 2)

    def head(self, features: Tensor) -> Tensor:
        """(N, D, h, w) -> logits."""
        return self.model.forward_head(features)


def explained(model: nn.Module, size: int) -> nn.Module | None:
    """The model for `attention_map`; None if its features, as of a ViT, are not (N, D, h, w)."""
    x = next(model.parameters()).new_zeros(1, 3, size, size)
    with evaluating(model), torch.no_grad():
        maps = model.forward_features(x).ndim == 4
    return Explained(model) if maps and getattr(model, "output_fmt", "NCHW") == "NCHW" else None
