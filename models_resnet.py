"""ResNet as a classifier and as a masked autoencoder.

Deep Residual Learning for Image Recognition (He et al. 2016). Masking follows Designing BERT for
Convolutional Networks: Sparse and Hierarchical Masked Modeling (Tian et al. 2023, SparK): masked
cells stay zero throughout the stages and do not enter the batch norms' statistics. Layers and
state-dict names are those of timm and torchvision, except that the classifier's `fc` is called
`head` here, as in our other models. `ops.gathered` implements the masked stages for CPUs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from backbones.resnet import RESNET_PATCHES, RESNET_STRIDES, ResNetSize
from models_convnextv2 import Block, init_weights
from models_masked import MaskedAutoencoder, take_tokens
from ops.choice import kernels_for, whole_images
from ops.gathered import Layer, batch_norm, layer_on_rows
from ops.packed import DenseCanvas, on_canvas


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(x)`, but the filters' gradient gets the filters' own strides, as DDP expects.

    Channels-last kernels return gradients with other strides; reshaping to a matrix and back
    restores them.
    """
    weight = conv.weight.flatten(1).view_as(conv.weight)
    return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)


def rows_of(x: Tensor, cells: Tensor) -> Tensor:
    """The cells of a map (N, C, H, W) at the flat indices (R,) into (N, H, W) -> (R, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, cells)


def map_of(rows: Tensor, cells: Tensor, n: int, side: int) -> Tensor:
    """The inverse of `rows_of`, zero elsewhere: (R, C) -> (N, C, side, side)."""
    x = rows.new_zeros(n * side * side, rows.shape[1]).index_copy(0, cells, rows)
    return x.view(n, side, side, -1).permute(0, 3, 1, 2)


def normalise(x: Tensor, norm: nn.BatchNorm2d, cells: Tensor | None) -> Tensor:
    """(N, C, H, W) -> same: batch norm of the given cells, zero elsewhere; None: of all cells."""
    if cells is None:
        return norm(x)
    rows = batch_norm(rows_of(x, cells), norm).to(x.dtype)
    return map_of(rows, cells, len(x), x.shape[2])


def layer_on_maps(cells: dict[int, Tensor]) -> Layer:
    """A convolution and batch norm for blocks that work on maps (N, C, H, W).

    `cells`: the visible cells of partly masked maps, by the side length of the map.
    """
    return lambda x, conv, norm: normalise(y := convolve(x, conv), norm, cells.get(y.shape[2]))


class _Block:
    """A residual block of timm's, on maps (N, C, H, W) or rows (R, C), whichever `layer` takes."""

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """`layer` applies a convolution, with its stride, and the batch norm that follows it."""
        layers = [(self.conv1, self.bn1), (self.conv2, self.bn2)]
        if isinstance(self, Bottleneck):
            layers.append((self.conv3, self.bn3))
        y = x
        for i, (conv, norm) in enumerate(layers):
            y = layer(F.relu(y) if i else y, conv, norm)
        if self.drop_path is not None:
            y = self.drop_path(y)
        return F.relu(y + (x if self.downsample is None else layer(x, *self.downsample)))


class RowBasicBlock(_Block, BasicBlock):
    """Two 3×3 convolutions."""


class RowBottleneck(_Block, Bottleneck):
    """1×1, 3×3 and 1×1 convolutions."""


class ResNetEncoder(ResNet):
    """timm's ResNet without a head."""

    def __init__(self, size: ResNetSize, in_chans: int = 3, drop_path: float = 0.0) -> None:
        block = RowBottleneck if size.bottleneck else RowBasicBlock
        depths = list(size.depths)
        super().__init__(block, depths, num_classes=0, in_chans=in_chans, drop_path_rate=drop_path)
        self.bottleneck = size.bottleneck

    def stages(
        self, imgs: Tensor, visible: Tensor | None = None, grid: int = 0, first: int = 3
    ) -> list[Tensor]:
        """(N, C, H, W) -> the maps of the stages `first` (0 to 3) to 3.

        They are (N, D, H/s, W/s), with s = 4, 8, 16, 32 in the four stages.
        `visible` (N, V): indices of the visible patches on a grid of `grid`×`grid`. Pixels of other
        patches must be zero. Their cells are then zero in every map whose cells are no larger than
        a patch.
        """
        known: dict[int, DenseCanvas] = {}  # partly masked maps, by side length
        if visible is not None:
            patch = imgs.shape[2] // grid
            sides = [patch // stride for stride in (2, *RESNET_STRIDES) if stride <= patch]
            known = {grid * b: on_canvas(visible, grid, b) for b in sides}
        cells = {side: canvas.cells for side, canvas in known.items()}
        # Rows are gathered from channels-last maps, which GPUs prefer as well. CPUs convolve small
        # maps up to twice as fast with channels first, except by 1×1 filters.
        own = kernels_for(imgs.device) == "cpu"
        channels_first = own and visible is None and not self.bottleneck
        order = torch.contiguous_format if channels_first else torch.channels_last
        x = convolve(imgs.contiguous(memory_format=order), self.conv1)
        x = self.maxpool(F.relu(normalise(x, self.bn1, cells.get(x.shape[2]))))
        if own and visible is not None:
            return self._on_rows(x, known, first)
        if x.shape[2] in cells:  # max pooling has spread visible values into masked cells
            here = cells[x.shape[2]]
            x = map_of(rows_of(x, here), here, len(x), x.shape[2])
        maps, layer = [], layer_on_maps(cells)
        for stage in self._stages():
            for block in stage:
                x = block(x, layer)
            maps.append(x)
        return maps[first:]

    def _on_rows(self, x: Tensor, known: dict[int, DenseCanvas], first: int) -> list[Tensor]:
        """The four stages on the stem's output (N, C, H, H), computed by `ops.gathered`."""
        n, side, before, maps = len(x), x.shape[2], None, []
        rows = rows_of(x, known[side].cells)
        for i, stage in enumerate(self._stages()):
            # Where cells are larger than patches, all cells are computed.
            after = known.get(side) or DenseCanvas(
                torch.arange(n * side * side, device=x.device), side
            )
            layer = layer_on_rows(before, after, n)
            for block in stage:
                rows = block(rows, layer)
            if i >= first:
                maps.append(map_of(rows, after.cells, n, side))
            before, side = after, (side + 1) // 2
        return maps

    def _stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4


class ResNetClassifier(ResNetEncoder):
    """Global average pooling and a linear head. Images may have any size."""

    compiled = ()
    explained_by = "Grad-CAM"

    def __init__(
        self, size: ResNetSize, num_classes: int, in_chans: int = 3, drop_path: float = 0.0
    ) -> None:
        super().__init__(size, in_chans, drop_path)
        self.head = nn.Linear(self.num_features, num_classes)

    def encode(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> the last stage's cells, (N, 1, h, w, D)."""
        return self.stages(imgs)[-1].permute(0, 2, 3, 1)[:, None]

    def pool(self, cells: Tensor) -> Tensor:
        """The output of `encode` -> (N, D): the mean over all cells."""
        return cells.mean(dim=(1, 2, 3))

    def forward_features(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D), pooled."""
        return self.pool(self.encode(imgs))

    def forward(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        return self.head(self.forward_features(imgs))

    def own_options(self) -> dict[str, object]:
        """Fine-tuning options specific to this family that are needed to rebuild the model."""
        return {}

    def layer_numbers(self, grouped: bool = False) -> Callable[[str], int]:
        """See `resnet_layers`."""
        return resnet_layers(tuple(map(len, self._stages())))


def resnet_layers(depths: tuple[int, ...]) -> Callable[[str], int]:
    """Maps a parameter's name to its layer number, for layer-wise learning-rate decay.

    The stem is layer 0, block b is layer b + 1, and the head is one above the last block.
    """
    before = [sum(depths[:stage]) for stage in range(len(depths) + 1)]

    def layer(name: str) -> int:
        part, *rest = name.split(".")
        if part.startswith("layer"):
            return before[int(part.removeprefix("layer")) - 1] + int(rest[0]) + 1
        return before[-1] + 1 if part == "head" else 0

    return layer


class MaskedResNet(MaskedAutoencoder):
    """A ResNet encodes the visible patches, and FCMAE's decoder predicts the masked ones.

    `patch_size` is 8, 16 or 32 pixels; small ones suit small images. The decoder sees the stages
    whose stride is at least the patch size: with 32 only the last stage, as in FCMAE. SparK's
    decoder differs: it upsamples and predicts pixels from all stages.
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
            raise ValueError(f"patch size {patch_size}: a ResNet takes {RESNET_PATCHES} pixels")
        width = decoder_embed_dim
        self.encoder = ResNetEncoder(size, in_chans)
        self.first = RESNET_STRIDES.index(patch_size)  # first stage that the decoder sees
        self.proj = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in size.dims[self.first :])
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder = nn.Sequential(*(Block(width) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(width, patch_size**2 * in_chans, 1)
        for part in (self.proj, self.decoder, self.pred):
            init_weights(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def own_options(self) -> dict[str, object]:
        """See MaskedAutoencoder."""
        return {"patch_size": self.patch_size}

    def kernels(self, device: torch.device, dtype: torch.dtype) -> str:
        """See MaskedAutoencoder."""
        own = kernels_for(device) == "cpu"
        return "convolution by gathered matrix products" if own else "torch's convolution"

    def forward_features(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D): the mean over all cells of the dense pass."""
        return self.encoder.stages(imgs)[-1].mean(dim=(2, 3))

    def forward_encoder(self, imgs: Tensor, visible: Tensor) -> list[Tensor]:
        """(N, C, H, W), indices of the visible patches (N, V) -> visibility (N, 1, g, g; 1 =
        visible) and the maps of the stages that the decoder sees.
        """
        n, g, p = len(imgs), self.grid, self.patch_size
        there = imgs.new_zeros(n, g * g).scatter_(1, visible, 1).view(n, 1, g, g)
        pixels = imgs * there.repeat_interleave(p, dim=2).repeat_interleave(p, dim=3)
        return [there, *self.encoder.stages(pixels, visible, g, self.first)]

    def forward_decoder(self, latent: list[Tensor], ids: Tensor, start: int) -> Tensor:
        """See MaskedAutoencoder."""
        there, *maps = latent
        g = self.grid
        fine, *coarse = map(convolve, maps, self.proj)
        x = torch.where(there > 0, fine, self.mask_token.to(fine.dtype))
        for other in coarse:
            x = x + F.interpolate(other, (g, g), mode="bilinear", align_corners=False)
        x = x.permute(0, 2, 3, 1)[:, None]
        near = whole_images(x)
        for block in self.decoder:
            x = block(x, near)
        asked = take_tokens(x.flatten(1, 3), ids[:, start:])
        return F.linear(asked, self.pred.weight.flatten(1), self.pred.bias)
