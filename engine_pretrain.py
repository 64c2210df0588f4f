"""Masked pre-training: starting weights, batch loss, resolutions, pictures of reconstructions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from backbones.family import DECODER
from datasets import PretrainDataset
from datasets.transforms import Normalise
from models_masked import MaskedAutoencoder
from training.gradients import BatchLoss
from util.checkpoint.read import read_checkpoint
from util.log import NullLog
from util.options.trained import trained_with
from util.report.figures import reconstruction_grid, save_png
from util.seeding import FIGURE, generator
from util.states import root
from util.weights import load_pretrained

Batch = tuple[Tensor, Tensor, list[str]]  # (N, 3, S, S) uint8, (N, L) noise, problems


def start_from_weights(model: MaskedAutoencoder, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Load weights of any known layout into a model, to start a new schedule from them.

    Returns the options they were trained with, as far as the file records them, and lines for the
    log about what was loaded. If the file has no decoder, the model's stays as initialised. Raises
    BadInput when the encoder does not fit.
    """
    saved = read_checkpoint(path)
    report = load_pretrained(model, path, checkpoint=saved)
    lines = str(report).splitlines()
    if any(root(name) in DECODER for name in report.missing):
        lines.append("  the decoder is newly initialised: the file holds an encoder only")
    if "optimizer" in saved or "optimizer_state_dict" in saved:
        lines.append("  the optimizer state is ignored: only this program's own can be resumed")
    return trained_with(saved, path), lines


class MaskedLoss(BatchLoss):
    """Normalises on the device, masks by the given noise."""

    def __init__(self, normalise: Normalise) -> None:
        self.normalise = normalise
        self.problems: set[str] = set()  # unreadable images of this rank, not yet collected

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See BatchLoss: images and noise."""
        imgs, noise, problems = batch
        self.problems.update(problem for problem in problems if problem)
        return imgs, noise

    def loss(self, model: nn.Module, imgs: Tensor, noise: Tensor) -> Tensor:
        """The mean squared error on the predicted patches of one micro-batch."""
        return model(self.normalise(imgs), noise=noise)

    def blank_batch(self, batch_size: int, input_size: int, patches: int) -> Batch:
        """A batch of zeros, for a pass whose result is discarded."""
        imgs = torch.zeros(batch_size, 3, input_size, input_size, dtype=torch.uint8)
        return imgs, torch.zeros(batch_size, patches), []


class Resolution:
    """Sets the model to the resolution of each epoch, and back to the full one in between."""

    def __init__(
        self, model: MaskedAutoencoder, size_at: Callable[[int], int], log: NullLog
    ) -> None:
        """`size_at(epoch)`: the side length of images in pixels."""
        self.model, self.size_at, self.log = model, size_at, log
        self.full = self.logged = model.input_size

    def begin(self, epoch: int) -> None:
        """Call before an epoch, or before the rest of one when resuming."""
        size = self.size_at(epoch)
        self.model.set_resolution(size)
        if size != self.logged:
            self.log.line(f"epoch {epoch}: {size} px from now on, {self.model.grid}² patches")
        self.logged = size

    def end(self, epoch: int) -> dict[str, float]:
        """Call after an epoch; returns its resolution, for the log."""
        self.model.set_resolution(self.full)
        return {"resolution": self.size_at(epoch)}


class Reconstructions:
    """Reconstructs the same few images with the same masks throughout training."""

    def __init__(
        self,
        dataset: PretrainDataset,
        normalise: Normalise,
        folder: Path,
        every: int,
        crop_pct: float,
        seed: int,
        count: int = 8,
    ) -> None:
        """Takes `count` readable images spread over the data; saves pictures to `folder`."""
        spread = np.linspace(0, len(dataset) - 1, 4 * count).astype(int)
        views = (dataset.view(int(i), crop_pct) for i in np.unique(spread))
        readable = [view for view in views if view is not None]
        self.imgs = torch.stack(readable[:: max(1, len(readable) // count)][:count])
        self.noise = torch.from_numpy(
            generator(FIGURE, seed).random((len(self.imgs), dataset.patches), dtype="float32")
        )
        self.normalise, self.folder, self.every = normalise, folder, every

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether to save a picture after `epoch` of `epochs`."""
        return (epoch + 1) % self.every == 0 or epoch + 1 == epochs

    def save(self, model: MaskedAutoencoder, epoch: int, log: NullLog) -> None:
        """Save the reconstructions after `epoch` to a file and to the log."""
        picture = self.draw(model, f"after epoch {epoch}")
        try:
            save_png(picture, self.folder / f"reconstruction-{epoch:04d}.png")
        except OSError as error:
            log.line(f"warning: the reconstruction picture could not be written: {error}")
        log.picture("reconstruction", picture, epoch + 1)

    def draw(self, model: MaskedAutoencoder, title: str) -> np.ndarray:
        """One picture (h, w, 3) uint8 with each image's `Stages` side by side."""
        stages = reconstruct(model, self.normalise, self.imgs, noise=self.noise)
        return reconstruction_grid(*stages, title=title, note=shown_with(model))


class Stages(NamedTuple):
    """The same images in three versions, (N, S, S, 3) uint8 each."""

    original: np.ndarray
    masked: np.ndarray  # masked patches in the data's mean colour
    # Masked patches as predicted. Visible ones are the original's: what is predicted there is not
    # in the loss, and is noise.
    reconstructed: np.ndarray


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder,
    normalise: Normalise,
    imgs: Tensor,
    mask_ratio: float | None = None,
    noise: Tensor | None = None,
) -> Stages:
    """Mask (N, 3, S, S) uint8 images and reconstruct them, on `normalise`'s device.

    `mask_ratio` and `noise` (N, L) as in MaskedAutoencoder. The model may be in either mode and is
    left in it. With norm_pix_loss it does not predict the mean and contrast of a patch, so these
    are taken from the original, see `shown_with`.
    """
    device = normalise.mean.device
    x = normalise(imgs.to(device))
    was_training = model.training
    model.eval()
    noise = None if noise is None else noise.to(device)
    pred, mask = model.reconstruct(x, mask_ratio, noise)
    model.train(was_training)
    if model.norm_pix_loss:
        _, mean, deviation = model.normalise_patches(model.patchify(x))
        pred = pred * deviation + mean
    hidden = model.unpatchify(mask[:, :, None].expand_as(pred)).bool()
    versions = (x, *(torch.where(hidden, y, x) for y in (0.0, model.unpatchify(pred))))
    pictures = (normalise.pixels(y).permute(0, 2, 3, 1) for y in versions)
    return Stages(*(picture.cpu().numpy() for picture in pictures))


def shown_with(model: MaskedAutoencoder) -> str:
    """The note for pictures of reconstructions on what was taken from the original, or ""."""
    if not model.norm_pix_loss:
        return ""
    return "each patch shown with the original's own mean and contrast (norm_pix_loss)"
