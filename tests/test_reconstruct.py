"""The three pictures of a reconstruction: which pixels are the image's and which the model's."""

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets.transforms import Normalise
from engine_pretrain import reconstruct, shown_with
from models_masked import MaskedAutoencoder


class Remembers(MaskedAutoencoder):
    """A model that predicts the patches of an image that it has stored, in target space."""

    def __init__(self, x: Tensor, norm_pix_loss: bool) -> None:
        super().__init__(x.shape[2], 16, 3, 0.5, norm_pix_loss)
        self.known = self.patchify(x)
        if norm_pix_loss:
            self.known = self.normalise_patches(self.known)[0]
        self.modes = []

    def forward_encoder(self, imgs: Tensor, visible: Tensor) -> Tensor:
        self.modes.append(self.training)
        return imgs

    def forward_decoder(self, latent: Tensor, ids: Tensor, start: int) -> Tensor:
        return torch.stack([known[i] for known, i in zip(self.known, ids, strict=True)])[:, start:]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_visible_pixels_are_the_images_and_masked_ones_the_models(norm_pix_loss):
    rng = np.random.default_rng(0)
    imgs, other = (
        torch.from_numpy(rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)) for _ in "ab"
    )
    normalise = Normalise()
    model = Remembers(normalise(imgs if norm_pix_loss else other), norm_pix_loss)
    noise = torch.from_numpy(rng.random((2, 16), dtype=np.float32))
    stages = reconstruct(model, normalise, imgs, 0.75, noise)
    assert model.modes == [False]
    assert model.training
    original, said = (x.permute(0, 2, 3, 1).numpy() for x in (imgs, other))
    np.testing.assert_array_equal(stages.original, original)
    # With each patch's mean and contrast restored, a correct prediction is the original.
    said = original if norm_pix_loss else said
    kept = noise.argsort(dim=1)[:, :4]
    removed = np.ones((2, 4, 4), bool)
    for n in range(2):
        removed[n].flat[kept[n].numpy()] = False
    removed = removed.repeat(16, 1).repeat(16, 2)[..., None]
    np.testing.assert_array_equal(stages.reconstructed, np.where(removed, said, original))
    mean = normalise.mean.round().byte().view(3).numpy()
    np.testing.assert_array_equal(stages.masked, np.where(removed, mean, original))
    assert ("own mean and contrast" in shown_with(model)) == norm_pix_loss


def test_the_default_mask_ratio_is_the_models():
    imgs = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    model = Remembers(Normalise()(imgs), False)
    masked = reconstruct(model, Normalise(), imgs).masked
    assert (masked[0, ::16, ::16] > 0).all(axis=-1).sum() == 8
