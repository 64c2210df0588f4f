"""Masked pre-training: the loss of a batch, pictures of reconstructions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datasets import PretrainDataset
from datasets.transforms import Normalise
from models_masked import MaskedAutoencoder
from util.checkpoint import read_checkpoint
from util.log import NullLog
from util.options.trained import trained_with
from util.report.figures import reconstruction_grid, save_png
from util.seeding import FIGURE, generator
from util.weights import load_pretrained
from util.weights.layouts import DECODER, root

Batch = tuple[Tensor, Tensor, list[str]]  # (N, 3, S, S) uint8, (N, L) noise, problems


def begin_with_weights(model: MaskedAutoencoder, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Weights of any known layout into a model before a new schedule.

    -> what they were trained with, as far as the file knows, and lines that say what fitted. Of an
    encoder alone the decoder is new. Raises BadInput when the encoder does not fit.
    """
    saved = read_checkpoint(path)
    report = load_pretrained(model, path, checkpoint=saved)
    lines = str(report).splitlines()
    if any(root(name) in DECODER for name in report.missing):
        lines.append("  the decoder is new: the file holds an encoder only")
    if "optimizer" in saved or "optimizer_state_dict" in saved:
        lines.append("  its optimizer state is not used: only this program's own can be resumed")
    return trained_with(saved, path), lines


class MaskedLoss:
    """`batch_loss` of the training loop: normalise on the device, mask by the given noise."""

    def __init__(self, normalise: Normalise) -> None:
        self.normalise = normalise
        self.problems: set[str] = set()  # of this rank, since they were last taken

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean squared error on the removed patches of one micro-batch."""
        imgs, noise, problems = batch
        self.problems.update(problem for problem in problems if problem)
        return model(self.normalise(imgs), noise=noise)

    def blank(self, batch_size: int, input_size: int, patches: int) -> Batch:
        """A batch of nothing, for a pass whose result is thrown away."""
        imgs = torch.zeros(batch_size, 3, input_size, input_size, dtype=torch.uint8)
        return imgs, torch.zeros(batch_size, patches), []


class Resolution:
    """Sets the model to each epoch's resolution, and to the full one for all who look at it."""

    def __init__(
        self, model: MaskedAutoencoder, size_at: Callable[[int], int], log: NullLog
    ) -> None:
        """`size_at(epoch)`: pixels a side."""
        self.model, self.size_at, self.log = model, size_at, log
        self.full = self.told = model.input_size

    def begin(self, epoch: int) -> None:
        """Before an epoch, or what is left of one."""
        size = self.size_at(epoch)
        self.model.set_resolution(size)
        if size != self.told:
            self.log.line(f"epoch {epoch}: {size} px from here on, {self.model.grid}² patches")
        self.told = size

    def end(self, epoch: int) -> dict[str, float]:
        """After it; -> what the epoch's log line holds of it."""
        self.model.set_resolution(self.full)
        return {"resolution": self.size_at(epoch)}


class Reconstructions:
    """The same few images under the same masks, drawn again and again while a model learns."""

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
        """`count` readable images from all over the data; drawn to `folder` every few epochs."""
        spread = np.linspace(0, len(dataset) - 1, 4 * count).astype(int)
        views = (dataset.view(int(i), crop_pct) for i in np.unique(spread))
        readable = [view for view in views if view is not None]
        self.imgs = torch.stack(readable[:: max(1, len(readable) // count)][:count])
        self.noise = torch.from_numpy(
            generator(FIGURE, seed).random((len(self.imgs), dataset.patches), dtype="float32")
        )
        self.normalise, self.folder, self.every = normalise, folder, every

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether to draw after `epoch` of `epochs`."""
        return (epoch + 1) % self.every == 0 or epoch + 1 == epochs

    def save(self, model: MaskedAutoencoder, epoch: int, log: NullLog) -> None:
        """Draw the model after `epoch` to a file and to the log."""
        picture = self.draw(model, f"after epoch {epoch}")
        try:
            save_png(picture, self.folder / f"reconstruction-{epoch:04d}.png")
        except OSError as error:
            log.line(f"warning: no picture was written: {error}")
        log.picture("reconstruction", picture, epoch + 1)

    def draw(self, model: MaskedAutoencoder, title: str) -> np.ndarray:
        """Original, masked, reconstructed, pasted: one picture (h, w, 3) uint8."""
        stages = reconstruct(model, self.normalise, self.imgs, noise=self.noise)
        return reconstruction_grid(*stages, title=title, note=shown_with(model))


class Stages(NamedTuple):
    """Of the same images, (N, S, S, 3) uint8 each."""

    original: np.ndarray
    masked: np.ndarray  # removed patches in the data's mean colour
    reconstructed: np.ndarray  # all that the model says
    pasted: np.ndarray  # what it says of the removed patches, among the visible ones


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder,
    normalise: Normalise,
    imgs: Tensor,
    mask_ratio: float | None = None,
    noise: Tensor | None = None,
) -> Stages:
    """Mask (N, 3, S, S) uint8 images and let the model fill them in, on `normalise`'s device.

    `mask_ratio` and `noise` (N, L) as in MaskedAutoencoder. The model may be in any mode and stays
    in it. With norm_pix_loss it says no patch's mean and contrast: the original's are taken, as
    `shown_with` tells.
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
    filled = model.unpatchify(pred)
    masked, pasted = torch.where(hidden, 0.0, x), torch.where(hidden, filled, x)
    pictures = (normalise.pixels(y).permute(0, 2, 3, 1) for y in (x, masked, filled, pasted))
    return Stages(*(picture.cpu().numpy() for picture in pictures))


def shown_with(model: MaskedAutoencoder) -> str:
    """What a picture of reconstructions has to say of what was added to them, perhaps ""."""
    if not model.norm_pix_loss:
        return ""
    return "each patch shown with the original's own mean and contrast (norm_pix_loss)"
