"""ConvNeXt V2 as a classifier and as a fully convolutional masked autoencoder (FCMAE).

ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders (Woo et al. 2023).
State-dict names are those of the official dense release.

There is one encoder. Its tensors are *packed*, (N, V, b, b, C): V patches per image, each of b×b
cells. A dense image is a single patch as large as the image (V = 1); a masked image consists of its
visible 32×32-pixel patches (b = 8, 4, 2, 1 in the four stages). Normalisation, MLP and GRN work
directly on the packed tensor, and the stride-2 downsampling stays within a patch. Only the 7×7
depthwise convolution reads neighbouring cells, so only it needs the positions of the patches.
Masked cells are treated as zero, which makes this exactly the submanifold sparse convolution of
section 3.1, computed for the visible patches only. `ops.choice` finds the neighbours; `ops.packed`
implements the forward and backward pass of a block for CPUs, `ops.fused` for CUDA devices.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from backbones.convnextv2 import CONVNEXT_PATCH, ConvNeXtSize
from models_masked import (
    LayerNorm,
    MaskedAutoencoder,
    matmul_dtype,
    run_block,
    take_patches,
)
from ops.choice import find_neighbours, kernels_for, whole_images
from ops.dense import DenseDepthwise, depthwise_forward
from ops.fused import FusedMLP, TiledDepthwise
from ops.packed import (
    MLP,
    DenseCanvas,
    Depthwise,
    Neighbours,
    Tiles,
    WholeImages,
)

Near = DenseCanvas | Neighbours | Tiles | WholeImages | None
KERNELS = {
    "reference": "torch's convolution",
    "cpu": "windowed convolution",
    "triton": "Triton kernels",
}


class GRN(nn.Module):
    """Global response normalisation (section 4): channels compete within one image.

    Each image's statistics are taken over its visible cells.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(N, V, b, b, C) -> same."""
        energy = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
        scale = 1 + self.gamma * energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
        # Cast to x's dtype: fp32 parameters would promote everything that follows to fp32.
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))


class Block(nn.Module):
    """7×7 depthwise convolution, then LayerNorm → 4× MLP with GRN, and a residual (figure 5)."""

    def __init__(self, dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, near: Near = None) -> Tensor:
        """(N, V, b, b, C) -> same; without `near`, x holds whole images and torch convolves."""
        if isinstance(near, Neighbours | Tiles | WholeImages):
            return x + self.drop_path(self._packed(x, near))
        y = self.norm(depthwise(x, self.dwconv, near))
        y = self.grn(F.gelu(self.pwconv1(y)))
        return x + self.drop_path(self.pwconv2(y))

    def is_plain(self) -> bool:
        """Whether all layers are the original ones, without hooks.

        `_packed` reads their weights and does not call them, so wrapped layers (such as low-rank
        adapters) would be bypassed.
        """
        layers = (self.dwconv, self.norm, self.pwconv1, self.grn, self.pwconv2)
        kinds = (nn.Conv2d, nn.LayerNorm, nn.Linear, GRN, nn.Linear)
        return all(
            type(layer) is kind and not (layer._forward_hooks or layer._forward_pre_hooks)
            for layer, kind in zip(layers, kinds, strict=True)
        )

    def _packed(self, x: Tensor, near: Neighbours | Tiles | WholeImages) -> Tensor:
        """The residual branch, computed by `ops.packed` or `ops.fused`."""
        n, c = len(x), x.shape[-1]
        if isinstance(near, WholeImages):
            y = depthwise(x, self.dwconv, None)
        else:
            y = x.to(matmul_dtype(x)).reshape(-1, c)
            convolution = Depthwise if isinstance(near, Neighbours) else TiledDepthwise
            y = convolution.apply(y, self.dwconv.weight, self.dwconv.bias, near)
        layers = (self.norm, self.pwconv1, self.pwconv2)
        norm, first, second = ((layer.weight, layer.bias) for layer in layers)
        gamma, beta = self.grn.gamma.flatten(), self.grn.beta.flatten()
        mlp = MLP if isinstance(near, Neighbours) else FusedMLP
        return mlp.apply(y.reshape(n, -1, c), *norm, *first, gamma, beta, *second).view_as(x)


def depthwise(x: Tensor, conv: nn.Conv2d, canvas: DenseCanvas | None) -> Tensor:
    """Depthwise convolution of packed patches with torch's kernel, (N, V, b, b, C) -> same.

    Without a canvas, the only patch is the whole image.
    """
    n, v, b, _, c = x.shape
    if canvas is None:
        y = x.flatten(0, 1)
    else:
        side = canvas.side
        y = x.new_zeros(n * side * side, c).index_copy(0, canvas.cells, x.reshape(-1, c))
        y = y.view(n, side, side, c)
    if torch.is_grad_enabled():
        y = DenseDepthwise.apply(y.to(matmul_dtype(y)), conv.weight, conv.bias)
    else:
        y = depthwise_forward(y, conv.weight, conv.bias)
    if canvas is None:
        return y.unflatten(0, (n, v))
    return y.reshape(-1, c).index_select(0, canvas.cells).view(n, v, b, b, c)


def downsample(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A k×k convolution of stride k within each patch, (N, V, b, b, C) -> (N, V, b/k, b/k, D)."""
    n, v, h, w, c = x.shape
    k = conv.stride[0]
    x = x.reshape(n, v, h // k, k, w // k, k, c).transpose(3, 4).reshape(n, v, h // k, w // k, -1)
    return F.linear(x, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


class ConvNeXtV2Encoder(nn.Module):
    """The four stages: `encoder(x)` is the dense pass, `encoder(x, visible)` the packed one."""

    def __init__(self, size: ConvNeXtSize, in_chans: int = 3, drop_path: float = 0.0) -> None:
        super().__init__()
        dims, depths = size.dims, size.depths
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4), LayerNorm(dims[0]))]
        )
        for i in range(3):
            conv = nn.Conv2d(dims[i], dims[i + 1], 2, stride=2)
            self.downsample_layers.append(nn.Sequential(LayerNorm(dims[i]), conv))
        # Stochastic depth rises linearly from the first block to the last.
        rates = iter(drop_path * k / (sum(depths) - 1) for k in range(sum(depths)))
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, next(rates)) for _ in range(depth))
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def encode(self, imgs: Tensor, visible: Tensor | None = None) -> Tensor:
        """(N, C, H, W), visible patches (N, V) -> (N, V, 1, 1, D), reading only their pixels.

        Without `visible`: the dense pass, -> (N, 1, H/32, W/32, D). Raises ValueError when H or W
        is not a multiple of 32, or when `visible` is given and the images are not square.
        """
        h, w = imgs.shape[-2:]
        if h % CONVNEXT_PATCH or w % CONVNEXT_PATCH or (visible is not None and h != w):
            raise ValueError(f"images are {h}x{w}; ConvNeXt V2 needs multiples of {CONVNEXT_PATCH}")
        if visible is None:
            x = imgs.permute(0, 2, 3, 1)[:, None]
        else:
            x = take_patches(imgs, visible, CONVNEXT_PATCH)
        for i, (down, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            for layer in down:
                x = downsample(x, layer) if isinstance(layer, nn.Conv2d) else layer(x)
            near = None
            if visible is not None:
                near = find_neighbours(visible, h // CONVNEXT_PATCH, 8 >> i)
            elif self.training and all(block.is_plain() for block in stage):
                near = whole_images(x)
            for block in stage:
                x = run_block(self.grad_checkpointing, block, x, near)
        return x

    def forward(self, imgs: Tensor, visible: Tensor | None = None) -> Tensor:
        """See `encode`."""
        return self.encode(imgs, visible)


class ConvNeXtV2(ConvNeXtV2Encoder):
    """The classifier: dense encoder, global average pooling, LayerNorm, linear head."""

    compiled = (Block,)
    explained_by = "Grad-CAM"

    def __init__(
        self,
        size: ConvNeXtSize,
        num_classes: int,
        in_chans: int = 3,
        drop_path: float = 0.0,
        head_init_scale: float = 1.0,
    ) -> None:
        super().__init__(size, in_chans, drop_path)
        self.norm = LayerNorm(size.dims[-1])
        self.head = nn.Linear(size.dims[-1], num_classes)
        init_weights(self)
        self.head.weight.data.mul_(head_init_scale)

    def pool(self, cells: Tensor) -> Tensor:
        """The output of `encode` -> (N, D): the mean over all cells, normalised."""
        return self.norm(cells.mean(dim=(1, 2, 3)))

    def forward_features(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D), pooled and normalised."""
        return self.pool(self.encode(imgs))

    def forward(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        return self.head(self.forward_features(imgs))

    def own_options(self) -> dict[str, object]:
        """Fine-tuning options specific to this family that are needed to rebuild the model."""
        return {}

    def layer_numbers(self, grouped: bool = False) -> Callable[[str], int]:
        """See `convnext_layers`."""
        return convnext_layers(tuple(map(len, self.stages)), grouped)


def convnext_layers(depths: tuple[int, ...], grouped: bool) -> Callable[[str], int]:
    """Maps a parameter's name to its layer number, for layer-wise learning-rate decay.

    Every block is a layer. With `grouped`, there are twelve layers, and three blocks of the long
    third stage share one (the official code's rule for Base and Large).
    """
    before = [sum(depths[:stage]) for stage in range(len(depths))]
    last = 12 if grouped else sum(depths)

    def layer(name: str) -> int:
        part, *rest = name.split(".")
        if part not in ("downsample_layers", "stages"):
            return last + 1
        stage = int(rest[0])
        if not grouped:  # downsampling layers, including the stem, belong to the block after them
            return before[stage] + 1 + (int(rest[1]) if part == "stages" else 0)
        if part == "downsample_layers":
            return (0, 2, 3, 12)[stage]
        return (1, 2, 3 + int(rest[1]) // 3, 12)[stage]

    return layer


class FCMAE(MaskedAutoencoder):
    """The packed encoder and a dense decoder of one block (section 3)."""

    compiled = (Block,)

    def __init__(
        self,
        size: ConvNeXtSize,
        input_size: int = 224,
        in_chans: int = 3,
        mask_ratio: float = 0.6,
        norm_pix_loss: bool = True,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 1,
    ) -> None:
        super().__init__(input_size, CONVNEXT_PATCH, in_chans, mask_ratio, norm_pix_loss)
        width = decoder_embed_dim
        self.encoder = ConvNeXtV2Encoder(size, in_chans)
        self.proj = nn.Conv2d(size.dims[-1], width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder = nn.Sequential(*(Block(width) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(width, CONVNEXT_PATCH**2 * in_chans, 1)
        init_weights(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """For the encoder's blocks only: the decoder has one cell per patch and needs little."""
        self.encoder.set_grad_checkpointing(enable)

    def kernels(self, device: torch.device, dtype: torch.dtype) -> str:
        """See MaskedAutoencoder."""
        return KERNELS[kernels_for(device)]

    def forward_features(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D): the mean over all cells of the dense pass."""
        return self.encoder(imgs).mean(dim=(1, 2, 3))

    def forward_encoder(self, imgs: Tensor, visible: Tensor) -> Tensor:
        """(N, C, H, W), indices of the visible patches (N, V) -> (N, V, 1, 1, D)."""
        return self.encoder(imgs, visible)

    def forward_decoder(self, latent: Tensor, ids: Tensor, start: int) -> Tensor:
        """See MaskedAutoencoder. Cells stay in shuffled order: `near` holds their positions."""
        (n, length), visible = ids.shape, latent.shape[1]
        x = F.linear(latent, self.proj.weight.flatten(1), self.proj.bias)
        masked = self.mask_token.to(x.dtype).view(-1).expand(n, length - visible, 1, 1, -1)
        x, near = torch.cat([x, masked], dim=1), find_neighbours(ids, self.grid, 1)
        for block in self.decoder:
            x = block(x, near)
        return F.linear(x[:, start:].flatten(2), self.pred.weight.flatten(1), self.pred.bias)


def init_weights(model: nn.Module) -> None:
    """Truncated normal weights with standard deviation 0.02, zero biases: the dense model's rule.

    The official sparse pre-training code ends up with a deviation of 1: see docs/deviations.md.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
