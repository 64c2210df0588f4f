"""A backbone in a single file, as a user would add one: patches mixed by convolutions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.family import Family
from models_masked import MaskedAutoencoder, take_tokens
from util.states import State, root

PATCH = 8
PRETRAIN = {"mask_ratio": 0.5, "norm_pix_loss": True, "blr": 1e-3, "epochs": 2, "decoder_depth": 1}
FINETUNE = {"epochs": 2, "warmup_epochs": 0, "blr": 1e-3, "layer_decay": 0.7, "drop_path": 0.0}


class ToySize(NamedTuple):
    width: int
    depths: tuple[int, ...]

    @property
    def features(self) -> int:
        return self.width


SIZES = {"toy_small": ToySize(16, (2,))}


class ToyFamily(Family):
    title, masked_title = "Toy", "masked toy"
    module, classifier, autoencoder = "toy_backbone", "ToyClassifier", "MaskedToy"
    sizes = SIZES
    masked_prefix = "masked_"
    pretrain_defaults = PRETRAIN
    finetune_defaults = FINETUNE
    stem, stages = "toy_stem.weight", ("toy_blocks",)
    roots = frozenset({"toy_stem", "toy_blocks"})

    def patch_step(self, name: str, patch_size: int | None, masked: bool) -> int:
        return PATCH

    def translate(self, state: State) -> tuple[State, str] | None:
        known = any(root(name) == "toy_stem" for name in state)
        return (state, self.layout(state)) if known else None

    def masked_patch(self, weights: State, patch: int, given: object) -> int:
        return PATCH


class ToyEncoder(nn.Module):
    def __init__(self, size: ToySize, in_chans: int = 3) -> None:
        super().__init__()
        self.toy_stem = nn.Conv2d(in_chans, size.width, PATCH, stride=PATCH)
        self.toy_blocks = nn.ModuleList(
            nn.Conv2d(size.width, size.width, 3, padding=1) for _ in range(*size.depths)
        )

    def encode(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 1, g, g, D)."""
        x = self.toy_stem(imgs)
        for block in self.toy_blocks:
            x = x + F.gelu(block(x))
        return x.permute(0, 2, 3, 1)[:, None]

    def forward(self, imgs: Tensor) -> Tensor:
        return self.encode(imgs)


class ToyClassifier(ToyEncoder):
    compiled = ()
    explained_by = "Grad-CAM"

    def __init__(self, size: ToySize, num_classes: int, drop_path: float = 0.0) -> None:
        super().__init__(size)
        self.head = nn.Linear(size.width, num_classes)

    def pool(self, cells: Tensor) -> Tensor:
        return cells.mean(dim=(1, 2, 3))

    def forward_features(self, imgs: Tensor) -> Tensor:
        return self.pool(self.encode(imgs))

    def forward(self, imgs: Tensor) -> Tensor:
        return self.head(self.forward_features(imgs))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        pass

    def own_options(self) -> dict[str, object]:
        return {}

    def layer_numbers(self, grouped: bool = False) -> Callable[[str], int]:
        last = len(self.toy_blocks) + 1

        def layer(name: str) -> int:
            first, *rest = name.split(".")
            if first == "toy_blocks":
                return int(rest[0]) + 1
            return last if first == "head" else 0

        return layer


class MaskedToy(MaskedAutoencoder):
    def __init__(
        self,
        size: ToySize,
        input_size: int,
        mask_ratio: float = 0.5,
        norm_pix_loss: bool = True,
        decoder_embed_dim: int = 32,
        decoder_depth: int = 1,
    ) -> None:
        super().__init__(input_size, PATCH, 3, mask_ratio, norm_pix_loss)
        width = decoder_embed_dim
        self.encoder = ToyEncoder(size)
        self.proj = nn.Linear(size.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1) for _ in range(decoder_depth))
        )
        self.pred = nn.Linear(width, 3 * PATCH**2)

    def kernels(self, device: torch.device, dtype: torch.dtype) -> str:
        return "convolution by the library"

    def forward_features(self, imgs: Tensor) -> Tensor:
        return self.encoder(imgs).mean(dim=(1, 2, 3))

    def forward_encoder(self, imgs: Tensor, visible: Tensor) -> list[Tensor]:
        n, g = len(imgs), self.grid
        there = imgs.new_zeros(n, g * g).scatter_(1, visible, 1).view(n, 1, g, g)
        return [there, self.encoder(imgs * F.interpolate(there, scale_factor=PATCH))]

    def forward_decoder(self, latent: list[Tensor], ids: Tensor, start: int) -> Tensor:
        there, cells = latent
        x = self.proj(cells.flatten(1, 3))
        x = torch.where(there.flatten(1)[:, :, None] > 0, x, self.mask_token)
        x = self.decoder(x.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        return self.pred(take_tokens(x.flatten(2).transpose(1, 2), ids[:, start:]))
