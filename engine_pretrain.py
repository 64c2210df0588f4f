"""Masked pre-training: the loss of a batch, unreadable images, pictures of reconstructions."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datasets import PretrainDataset
from datasets.decode import UnreadableImage
from datasets.sampler import GlobalBatchSampler
from datasets.transforms import Normalise
from engine_observe import Saver
from engine_train import Trainer
from models_masked import MaskedAutoencoder
from util.distributed import gather_objects
from util.errors import BadInput
from util.figures import reconstruction_grid, save_png
from util.log import NullLog
from util.seeding import FIGURE, generator

MAX_BAD_SHARE = 0.05
PREFLIGHT_IMAGES = 32
Batch = tuple[Tensor, Tensor, list[str]]  # (N, 3, S, S) uint8, (N, L) noise, problems


class MaskedLoss:
    """`batch_loss` of the training loop: normalise on the device, mask by the given noise."""

    def __init__(self, normalise: Normalise, device: torch.device) -> None:
        self.normalise, self.device = normalise, device
        self.problems: set[str] = set()  # of this rank, since they were last taken

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean squared error on the removed patches of one micro-batch."""
        imgs, noise, problems = batch
        self.problems.update(problem for problem in problems if problem)
        imgs = imgs.to(self.device, non_blocking=True)
        return model(self.normalise(imgs), noise=noise.to(self.device, non_blocking=True))

    def blank(self, batch_size: int, input_size: int, patches: int) -> Batch:
        """A batch of nothing, for a pass whose result is thrown away."""
        imgs = torch.zeros(batch_size, 3, input_size, input_size, dtype=torch.uint8)
        return imgs, torch.zeros(batch_size, patches), []


class BadImages:
    """Files that could not be decoded: counted, named once, too many end the run."""

    def __init__(self, count: int, record: Path | None) -> None:
        """Of `count` images; `record` is `bad_images.txt` (rank 0), going on from what it names."""
        self.count, self.record = count, record
        known = record.read_text("utf-8").splitlines() if record and record.exists() else []
        self.known = dict(line.partition("\t")[::2] for line in known)

    def collect(self, loss: MaskedLoss) -> list[str]:
        """Gather all ranks' finds (call it on all of them); return those not named before.

        Raises BadInput when more than 5 % of the data cannot be read.
        """
        found = {p for problems in gather_objects(loss.problems) for p in problems}
        loss.problems = set()
        pairs = sorted(line.partition("\t")[::2] for line in found)
        new = {name: reason for name, reason in pairs if name not in self.known}
        self.known.update(new)
        lines = [f"{name}\t{reason}" for name, reason in new.items()]
        if lines and self.record:
            with open(self.record, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(line + "\n" for line in lines)
        if len(self.known) > MAX_BAD_SHARE * self.count:
            name, reason = next(iter(self.known.items()))
            raise BadInput(
                f"--data_path: {len(self.known)} of {self.count} images cannot be read, more than "
                f"{MAX_BAD_SHARE:.0%} (first: {name}: {reason}; all: bad_images.txt); "
                "remove or repair them"
            )
        return lines


def check_readable(dataset: PretrainDataset) -> None:
    """Decode a few images from all over the data set; raises BadInput when none can be read."""
    sample = np.unique(np.linspace(0, len(dataset) - 1, PREFLIGHT_IMAGES).astype(int))
    for index in sample:
        try:
            dataset.source.image(int(index))
            return
        except UnreadableImage as error:
            problem = f"{dataset.source.name(int(index))}: {error.reason}"
    raise BadInput(
        f"--data_path: none of the {len(sample)} images tried can be read (the last: {problem})"
    )


class Reconstructions:
    """The same few images under the same masks, drawn again and again while a model learns."""

    def __init__(
        self,
        dataset: PretrainDataset,
        crop_pct: float,
        seed: int,
        normalise: Normalise,
        count: int = 8,
    ) -> None:
        spread = np.linspace(0, len(dataset) - 1, 4 * count).astype(int)
        views = (dataset.view(int(i), crop_pct) for i in np.unique(spread))
        readable = [view for view in views if view is not None]
        imgs = torch.stack(readable[:: max(1, len(readable) // count)][:count])
        self.noise = torch.from_numpy(
            generator(FIGURE, seed).random((len(imgs), dataset.patches), dtype="float32")
        )
        self.imgs, self.normalise = imgs, normalise

    @torch.no_grad()
    def draw(self, model: MaskedAutoencoder, title: str) -> np.ndarray:
        """Original, masked, reconstructed, pasted: one picture (h, w, 3) uint8."""
        device = self.normalise.mean.device
        was_training = model.training
        model.eval()
        x = self.normalise(self.imgs.to(device))
        pred, mask = model.reconstruct(x, noise=self.noise.to(device))
        model.train(was_training)
        note = ""
        if model.norm_pix_loss:
            _, mean, deviation = model.normalise_patches(model.patchify(x))
            pred = pred * deviation + mean
            note = "each patch shown with the original's own mean and contrast (norm_pix_loss)"
        hidden = model.unpatchify(mask[:, :, None].expand_as(pred)).bool()
        filled = model.unpatchify(pred)
        grey = torch.full_like(x, 0.0)  # the data's mean colour
        columns = (x, torch.where(hidden, grey, x), filled, torch.where(hidden, filled, x))
        pictures = [self.normalise.pixels(c).permute(0, 2, 3, 1).cpu().numpy() for c in columns]
        return reconstruction_grid(*pictures, title=title, note=note)


def finish_epoch(
    trainer: Trainer,
    sampler: GlobalBatchSampler,
    log: NullLog,
    saver: Saver | None,
    pictures: Reconstructions | None,
    output: Path | None,
    vis_freq: int,
    epochs: int,
) -> None:
    """Log an epoch, draw, go to the next, save: in this order, so that a log line is never lost.

    A run killed before the save does the epoch again and writes its line again.
    """
    state = trainer.state
    epoch, sums = state.position.epoch, state.position.sums
    seconds, steps = max(sums.seconds, 1e-9), max(sums.steps, 1)
    record = {
        "epoch": epoch,
        "train_loss": sums.loss / steps if sums.steps else None,
        "train_lr": trainer.lr_at(epoch + (sampler.steps - 1) / sampler.steps),
        "train_grad_norm": sums.grad_norm / steps if sums.steps else None,
        "skipped_steps": sums.skipped,
        "images_per_s": round(sampler.steps * sampler.global_batch / seconds, 1),
        "data_wait": round(sums.waited / seconds, 4),
        "epoch_s": round(sums.seconds, 2),
    }
    log.epoch(record)
    last = epoch + 1 == epochs
    if pictures and output and vis_freq and (last or (epoch + 1) % vis_freq == 0):
        picture = pictures.draw(state.model, f"after epoch {epoch}")
        save_png(picture, output / "figures" / f"reconstruction-{epoch:04d}.png")
        log.picture("reconstruction", picture, epoch + 1)
    state.position.next_epoch()
    if saver:
        saver.save(state)
