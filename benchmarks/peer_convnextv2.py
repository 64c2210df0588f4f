"""The peer of packed FCMAE: the same network as an efficient masked dense convolution.

It is channels-last throughout and masks only where a masked cell would otherwise be seen: at the
start of each stage, in GRN's statistics, and after each block. It uses `FCMAE`'s weights as they
are.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_convnextv2 import FCMAE, Block
from models_masked import matmul_dtype
from ops.packed import REACH, Windows, correlate, with_zero_row


class MaskedDense(nn.Module):
    """An FCMAE's weights applied to all cells, with masked ones held at zero."""

    def __init__(
        self, model: FCMAE, depthwise: Callable[[Tensor, nn.Conv2d], Tensor] | None = None
    ) -> None:
        """Share `model`'s parameters. `depthwise` replaces torch's convolution."""
        super().__init__()
        self.model, self.depthwise = model, depthwise or library_depthwise

    def block(self, block: Block, x: Tensor, seen: Tensor) -> Tensor:
        """(N, H, W, C), (N, H, W, 1) -> (N, H, W, C)."""
        h = F.gelu(block.pwconv1(block.norm(self.depthwise(x, block.dwconv)))) * seen
        energy = (h * h).sum(dim=(1, 2), keepdim=True).sqrt()
        response = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
        # Under autocast, parameters stay fp32; without a cast they would turn h into fp32.
        scale = (1 + block.grn.gamma * response).to(h.dtype)
        h = torch.addcmul(block.grn.beta.to(h.dtype), h, scale)
        return x + block.pwconv2(h) * seen

    def encode(self, imgs: Tensor, seen: Tensor) -> Tensor:
        """(N, 3, H, W), (N, grid, grid) 1 = visible -> (N, grid, grid, D), zero where masked."""
        x = imgs.contiguous(memory_format=torch.channels_last)
        encoder = self.model.encoder
        for i, down in enumerate(encoder.downsample_layers):
            for layer in down:
                if isinstance(layer, nn.Conv2d):
                    x = layer(x if i == 0 else x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                else:
                    x = layer(x)
            b = 8 >> i
            mask = seen.repeat_interleave(b, 1).repeat_interleave(b, 2)[..., None].to(x.dtype)
            x = x * mask
            for block in encoder.stages[i]:
                x = self.block(block, x, mask)
        return x

    def forward(self, imgs: Tensor, noise: Tensor) -> Tensor:
        """(N, 3, H, W), (N, L) -> the loss of `FCMAE.forward`."""
        model = self.model
        n, length = noise.shape
        keep = int(length * (1 - model.mask_ratio) + 1e-6)
        ids = noise.argsort(dim=1, stable=True)
        seen = torch.zeros_like(noise).scatter(1, ids[:, :keep], 1.0)
        grid = seen.view(n, model.grid, model.grid)
        x = self.encode(imgs, grid)
        x = F.linear(x, model.proj.weight.flatten(1), model.proj.bias)
        mask = grid[..., None].to(x.dtype)
        x = x * mask + model.mask_token.flatten().to(x.dtype) * (1 - mask)
        everything = torch.ones_like(mask)
        for block in model.decoder:
            x = self.block(block, x, everything)
        pred = F.linear(x, model.pred.weight.flatten(1), model.pred.bias).flatten(1, 2)
        target = model.patchify(imgs)
        if model.norm_pix_loss:
            target = model.normalise_patches(target)[0]
        errors = (pred - target).square().mean(-1)
        return (errors * (1 - seen)).sum() / (1 - seen).sum()


def library_depthwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(N, H, W, C) -> same, with torch's convolution and its gradients."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def tuned_depthwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The same with the gradients that packing uses, to measure what they contribute alone."""
    return TunedDepthwise.apply(x, conv.weight, conv.bias)


class TunedDepthwise(torch.autograd.Function):
    """A depthwise convolution that computes both of its gradients as convolutions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.to(matmul_dtype(x))
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        n, h, _, c = x.shape
        x, g = (with_zero_row(y.reshape(-1, c)) for y in (x, g))
        dweight = correlate(x, g, tiles(n, h, 7 if h % 8 else 8))
        dx = convolve(g[:-1].view(n, h, h, c), weight.flip(2, 3), None)
        return dx, dweight, g.sum(0)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, H, W, C) -> same."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=REACH, groups=x.shape[3])
    return y.permute(0, 2, 3, 1)


@cache
def tiles(n: int, side: int, s: int) -> Windows:
    """Split images of side × side cells, stored row by row, into windows of s × s cells."""
    rows = torch.arange(n * side * side).view(n, side, side)
    padded = F.pad(rows, 4 * (REACH,), value=rows.numel())
    around = padded.unfold(1, s + 2 * REACH, s).unfold(2, s + 2 * REACH, s).flatten(0, 2)
    return Windows(around, rows.unfold(1, s, s).unfold(2, s, s).flatten(0, 2), None)
