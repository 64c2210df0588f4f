"""Base class of the masked autoencoders: masking, prediction target, loss, reconstruction.

Masked Autoencoders Are Scalable Vision Learners (He et al. 2022), section 3.
A mask is 1 where a patch is masked. L is the number of patches, p their side length in pixels, C
the number of channels.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from util.patch_counts import predicted_patches, visible_patches

# The epsilon of both papers; torch's default is 1e-5.
LayerNorm = partial(nn.LayerNorm, eps=1e-6)

# What an encoder passes to its decoder: tokens, or the feature maps of several stages.
Latent = Tensor | list[Tensor]


class Reconstruction(NamedTuple):
    pred: Tensor  # (N, L, p*p*C), all patches, in target space
    mask: Tensor  # (N, L), 1 = masked


def take_patches(imgs: Tensor, ids: Tensor, p: int) -> Tensor:
    """(N, C, H, W), patch indices (N, V) -> (N, V, p, p, C); reads no other pixels."""
    n, c, h, w = imgs.shape
    grid = imgs.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
    image = torch.arange(n, device=ids.device)[:, None]
    return grid[image, ids // (w // p), ids % (w // p)]


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """(N, L, D), token indices (N, M) -> (N, M, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's dtype if autocast is enabled, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def run_block(recompute: bool, block: Callable[..., Tensor], *inputs: object) -> Tensor:
    """`block(*inputs)`; with `recompute`, activations are recomputed in the backward pass."""
    return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)


class MaskedAutoencoder(nn.Module):
    """Masks patches, predicts them from the visible ones, and computes the loss.

    Subclasses implement `forward_encoder`, `forward_decoder` and `kernels`.
    """

    predict_ratio = 1.0  # share of the masked patches that are predicted and enter the loss
    compiled: tuple[type, ...] = ()  # classes of the blocks that `compile_blocks` compiles

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_chans: int,
        mask_ratio: float,
        norm_pix_loss: bool,
    ) -> None:
        super().__init__()
        self.patch_size, self.in_chans = patch_size, in_chans
        self.full_size = input_size
        self._set_grid(input_size)
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        self.grad_checkpointing = False

    def set_resolution(self, size: int) -> None:
        """From now on take images with a side length of `size` pixels.

        Weights and state dict do not change. Raises ValueError for a size that is not a multiple
        of the patch size.
        """
        self._set_grid(size)

    def _set_grid(self, size: int) -> None:
        if size % self.patch_size:
            raise ValueError(
                f"input size {size} is not a multiple of the patch size {self.patch_size}"
            )
        self.input_size, self.grid = size, size // self.patch_size
        self.num_patches = self.grid**2

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def patchify(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, p*p*C)."""
        n, c, h, w = imgs.shape
        p = self.patch_size
        return (
            imgs.reshape(n, c, h // p, p, w // p, p)
            .permute(0, 2, 4, 3, 5, 1)
            .reshape(n, -1, p * p * c)
        )

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(N, L, p*p*C) -> (N, C, H, W)."""
        n, p, g = len(patches), self.patch_size, self.grid
        return (
            patches.reshape(n, g, g, p, p, -1)
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(n, -1, g * p, g * p)
        )

    def normalise_patches(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, M, D) -> (normalised, mean, deviation) of each patch (section 4.1, norm_pix_loss)."""
        mean = patches.mean(-1, keepdim=True)
        centred = patches - mean
        variance = centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
        deviation = (variance + 1e-6).sqrt()
        return centred / deviation, mean, deviation

    def forward(
        self, imgs: Tensor, mask_ratio: float | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """(N, C, H, W) normalised images -> scalar: mean squared error on the predicted patches.

        `noise` (N, L) orders the patches of each image: those with the smallest noise stay visible,
        the next ones are predicted (all masked patches, or a share `predict_ratio` of them). Random
        if None.
        """
        ids, keep = self.random_masking(imgs, mask_ratio, noise)
        # The order is random, so its first masked patches are a random subset of them.
        ids = ids[:, : keep + predicted_patches(self.num_patches - keep, self.predict_ratio)]
        latent = self.forward_encoder(imgs, ids[:, :keep])
        pred = self.forward_decoder(latent, ids, start=keep)
        return self.forward_loss(imgs, pred, ids[:, keep:])

    def reconstruct(
        self, imgs: Tensor, mask_ratio: float | None = None, noise: Tensor | None = None
    ) -> Reconstruction:
        """(N, C, H, W) normalised images -> predictions for all patches and the mask."""
        ids, keep = self.random_masking(imgs, mask_ratio, noise)
        restore = ids.argsort(dim=1)
        pred = self.forward_decoder(self.forward_encoder(imgs, ids[:, :keep]), ids, start=0)
        return Reconstruction(take_tokens(pred, restore), (restore >= keep).to(imgs.dtype))

    def random_masking(
        self, imgs: Tensor, mask_ratio: float | None, noise: Tensor | None
    ) -> tuple[Tensor, int]:
        """Patch indices in random order (N, L), visible ones first, and the number of these."""
        n, _, h, w = imgs.shape
        if h != self.input_size or w != self.input_size:
            raise ValueError(f"images are {h}x{w}, but the model is set to {self.input_size} px")
        if noise is None:
            noise = torch.rand(n, self.num_patches, device=imgs.device)
        keep = visible_patches(
            self.num_patches, self.mask_ratio if mask_ratio is None else mask_ratio
        )
        return noise.argsort(dim=1, stable=True), keep

    def forward_encoder(self, imgs: Tensor, visible: Tensor) -> Latent:
        """(N, C, H, W), indices of the visible patches (N, V) -> the input of `forward_decoder`.

        Must not depend on the pixels of other patches.
        """
        raise TypeError(f"{type(self).__name__} must define forward_encoder")

    def forward_decoder(self, latent: Latent, ids: Tensor, start: int) -> Tensor:
        """Predictions for the patches `ids[:, start:]`, (N, M - start, p*p*C), in this order.

        `ids` (N, M): the visible patches, then the masked ones (all, or only those to predict).
        """
        raise TypeError(f"{type(self).__name__} must define forward_decoder")

    def forward_loss(self, imgs: Tensor, pred: Tensor, ids: Tensor) -> Tensor:
        """(N, C, H, W), predictions (N, M, p*p*C) for the patches `ids` (N, M) -> scalar."""
        target = take_patches(imgs, ids, self.patch_size).flatten(2)
        if self.norm_pix_loss:
            target = self.normalise_patches(target)[0]
        # Every image has equally many predicted patches, so this is the papers' masked mean.
        return (pred.to(target.dtype) - target).square().mean()

    def kernels(self, device: torch.device, dtype: torch.dtype) -> str:
        """For the log: which of several equivalent implementations is used on this device."""
        raise TypeError(f"{type(self).__name__} must define kernels")

    def own_options(self) -> dict[str, object]:
        """Pre-training options specific to this family that are needed to rebuild the model."""
        return {}
