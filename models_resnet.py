"""ResNet as a classifier and as a masked autoencoder.

Deep Residual Learning for Image Recognition (He et al. 2016). Masked as in Designing BERT for
Convolutional Networks: Sparse and Hierarchical Masked Modeling (Tian et al. 2023, SparK): removed
cells stay zero through the stages and do not enter the batch norms' statistics. Layers and
state-dict names are timm's, which are torchvision's, but for the classifier's `head`, here as in
our other models, there `fc`.
"""

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from models_convnextv2 import Block, init_weights
from models_masked import MaskedAutoencoder, in_order, take_tokens
from util.sizes import RESNET_PATCHES, RESNET_STRIDES, ResNetSize

Cells = dict[int, Tensor]  # side of a feature map -> its visible cells, numbers into (N*side*side)


def visible_cells(ids: Tensor, grid: int, b: int) -> Tensor:
    """Patches (N, V) of a grid -> the numbers (N*V*b*b,) of their b×b cells in all N images."""
    inside = torch.arange(b, device=ids.device)
    row = (ids // grid * b)[:, :, None, None] + inside[:, None]
    column = (ids % grid * b)[:, :, None, None] + inside
    image = torch.arange(len(ids), device=ids.device)[:, None, None, None]
    return ((image * grid * b + row) * grid * b + column).flatten()


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(x)`."""
    return F.conv2d(x, in_order(conv.weight), conv.bias, conv.stride, conv.padding)


def normalise(x: Tensor, norm: nn.BatchNorm2d, cells: Tensor | None) -> Tensor:
    """(N, C, H, W) -> same: batch norm of the cells named, zero elsewhere; None: of all."""
    if cells is None:
        return norm(x)
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    # Not by calling `norm`: it wants an image, and as one, torch returns wrong gradients of this.
    if norm.training:
        norm.num_batches_tracked.add_(1)
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    how = (norm.training, norm.momentum, norm.eps)
    kept = F.batch_norm(rows.index_select(0, cells), *statistics, *how)
    rows = torch.zeros_like(rows).index_copy(0, cells, kept.to(rows.dtype))
    return rows.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


class _Masked:
    """A residual block of timm's that can be told which cells are visible."""

    def forward(self, x: Tensor, cells: Cells | None = None) -> Tensor:
        """(N, C, H, W) -> (N, D, H / stride, W / stride); see `normalise`."""
        cells = cells or {}
        layers = [(self.conv1, self.bn1), (self.conv2, self.bn2)]
        if isinstance(self, Bottleneck):
            layers.append((self.conv3, self.bn3))
        y = x
        for i, (conv, norm) in enumerate(layers):
            y = convolve(F.relu(y) if i else y, conv)
            y = normalise(y, norm, cells.get(y.shape[2]))
        if self.drop_path is not None:
            y = self.drop_path(y)
        if self.downsample is not None:
            conv, norm = self.downsample
            x = normalise(convolve(x, conv), norm, cells.get(y.shape[2]))
        return F.relu(y + x)


class MaskedBasicBlock(_Masked, BasicBlock):
    """Two 3×3 convolutions."""


class MaskedBottleneck(_Masked, Bottleneck):
    """1×1, 3×3 and 1×1 convolutions."""


class ResNetEncoder(ResNet):
    """timm's layers without a head."""

    def __init__(self, size: ResNetSize, in_chans: int = 3, drop_path: float = 0.0) -> None:
        block = MaskedBottleneck if size.bottleneck else MaskedBasicBlock
        depths = list(size.depths)
        super().__init__(block, depths, num_classes=0, in_chans=in_chans, drop_path_rate=drop_path)

    def stages(self, imgs: Tensor, visible: Tensor | None = None, grid: int = 0) -> list[Tensor]:
        """(N, C, H, W) -> the four stages' maps, (N, D, H/s, W/s) for s = 4, 8, 16, 32.

        `visible` (N, V): numbers of the patches of a `grid`×`grid` that are there. Pixels elsewhere
        have to be zero; so are, then, cells of all maps whose cells are no larger than a patch.
        """
        cells: Cells = {}
        if visible is not None:
            patch = imgs.shape[2] // grid
            sides = [patch // stride for stride in (2, *RESNET_STRIDES) if stride <= patch]
            cells = {grid * b: visible_cells(visible, grid, b) for b in sides}
        x = convolve(imgs.contiguous(memory_format=torch.channels_last), self.conv1)
        x = self.maxpool(F.relu(normalise(x, self.bn1, cells.get(x.shape[2]))))
        if x.shape[2] in cells:  # which the pooling fills from beside
            there = x.new_zeros(len(x) * x.shape[2] ** 2).index_fill(0, cells[x.shape[2]], 1)
            x = x * there.view(len(x), 1, *x.shape[2:])
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, cells)
            maps.append(x)
        return maps


class ResNetClassifier(ResNetEncoder):
    """Global average pooling and a linear head. Images may have any size."""

    def __init__(
        self, size: ResNetSize, num_classes: int, in_chans: int = 3, drop_path: float = 0.0
    ) -> None:
        super().__init__(size, in_chans, drop_path)
        self.head = nn.Linear(self.num_features, num_classes)

    def encode(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> the last stage's cells, (N, 1, h, w, D)."""
        return self.stages(imgs)[-1].permute(0, 2, 3, 1)[:, None]

    def pool(self, cells: Tensor) -> Tensor:
        """What `encode` returns -> (N, D): the mean over all cells."""
        return cells.mean(dim=(1, 2, 3))

    def forward_features(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D), pooled."""
        return self.pool(self.encode(imgs))

    def forward(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        return self.head(self.forward_features(imgs))


class MaskedResNet(MaskedAutoencoder):
    """A ResNet of the visible patches, and FCMAE's decoder on all stages of a patch or more a cell.

    `patch_size` is 8, 16 or 32 pixels: 32 leaves the decoder the last stage alone, as FCMAE does;
    smaller ones suit small images. SparK predicts pixels from all stages, by upsampling.
    """

    def __init__(
        self,
        size: ResNetSize,
        input_size: int = 224,
        patch_size: int = RESNET_STRIDES[-1],
        in_chans: int = 3,
        mask_ratio: float = 0.6,
        norm_pix_loss: bool = True,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 1,
    ) -> None:
        super().__init__(input_size, patch_size, in_chans, mask_ratio, norm_pix_loss)
        if patch_size not in RESNET_PATCHES:
            raise ValueError(f"patches of {patch_size} pixels; a ResNet's are {RESNET_PATCHES}")
        width = decoder_embed_dim
        self.encoder = ResNetEncoder(size, in_chans)
        self.first = RESNET_STRIDES.index(patch_size)  # stage that the decoder sees
        self.proj = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in size.dims[self.first :])
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder = nn.Sequential(*(Block(width) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(width, patch_size**2 * in_chans, 1)
        for part in (self.proj, self.decoder, self.pred):
            init_weights(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def kernels(self, device: torch.device, dtype: torch.dtype) -> str:
        """See MaskedAutoencoder."""
        return "convolution by the library"

    def forward_features(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D): the mean over all cells of the dense pass."""
        return self.encoder.stages(imgs)[-1].mean(dim=(2, 3))

    def predict(self, imgs: Tensor, ids: Tensor, keep: int, start: int) -> Tensor:
        """See MaskedAutoencoder."""
        n, g, p = len(imgs), self.grid, self.patch_size
        visible = ids[:, :keep]
        there = imgs.new_zeros(n, g * g).scatter_(1, visible, 1).view(n, 1, g, g)
        pixels = imgs * there.repeat_interleave(p, dim=2).repeat_interleave(p, dim=3)
        maps = self.encoder.stages(pixels, visible, g)[self.first :]
        fine, *coarse = map(convolve, maps, self.proj)
        x = torch.where(there > 0, fine, self.mask_token.to(fine.dtype))
        for other in coarse:
            x = x + F.interpolate(other, (g, g), mode="bilinear", align_corners=False)
        x = self.decoder(x.permute(0, 2, 3, 1)[:, None]).flatten(1, 3)
        weight = self.pred.weight.flatten(1)
        return F.linear(take_tokens(x, ids[:, start:]), weight, self.pred.bias)
