"""Masked pre-training: the loss of a batch, unreadable images, pictures of reconstructions."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datasets import PretrainDataset
from datasets.decode import UnreadableImage
from datasets.transforms import Normalise
from engine_observe import RunObserver
from engine_train import Trainer
from models_masked import MaskedAutoencoder
from util.distributed import gather_objects, on_main
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

    def __init__(
        self, loss: MaskedLoss, count: int, record: Path, fresh: bool, log: NullLog
    ) -> None:
        """Of `count` images; `record` is bad_images.txt, gone on from unless the run is `fresh`."""
        self.loss, self.count, self.record, self.log = loss, count, record, log
        self.known: dict[str, str] = on_main(lambda: self._named_before(fresh))

    def _named_before(self, fresh: bool) -> dict[str, str]:
        if fresh:
            self.record.unlink(missing_ok=True)
        if not self.record.exists():
            return {}
        lines = self.record.read_text("utf-8", errors="replace").splitlines()
        return dict(line.partition("\t")[::2] for line in lines)

    def tell(self) -> None:
        """Gather all ranks' finds (call it on all of them) and name those not named before.

        Raises BadInput when more than 5 % of the data cannot be read.
        """
        found = {p for problems in gather_objects(self.loss.problems) for p in problems}
        self.loss.problems = set()
        pairs = sorted(problem.partition("\t")[::2] for problem in found)
        new = {name: reason for name, reason in pairs if name not in self.known}
        self.known.update(new)
        for name, reason in new.items():
            self.log.line(f"warning: cannot read {name}: {reason}; another takes its place")
            self.log.append(self.record, f"{name}\t{reason}")
        if len(self.known) > MAX_BAD_SHARE * self.count:
            name, reason = next(iter(self.known.items()))
            raise BadInput(
                f"--data_path: {len(self.known)} of {self.count} images cannot be read, more than "
                f"{MAX_BAD_SHARE:.0%} (first: {name}: {reason}; all: {self.record}); "
                "remove or repair them"
            )


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

    def save(self, model: MaskedAutoencoder, epoch: int, log: NullLog) -> None:
        """Draw the model after `epoch` to a file and to the log."""
        picture = self.draw(model, f"after epoch {epoch}")
        save_png(picture, self.folder / f"reconstruction-{epoch:04d}.png")
        log.picture("reconstruction", picture, epoch + 1)

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


def finish_epoch(trainer: Trainer, observer: RunObserver, pictures: Reconstructions | None) -> None:
    """Log an epoch, draw, go to the next, save: in this order, so that a log line is never lost.

    A run killed before the save does the epoch again and writes its line again.
    """
    state, steps = trainer.state, observer.steps
    epoch, sums = state.position.epoch, state.position.sums
    observer.log.epoch(
        {
            "epoch": epoch,
            "train_loss": sums.loss / sums.steps if sums.steps else None,
            "train_lr": trainer.lr_at(epoch + (steps - 1) / steps),
            "train_grad_norm": sums.grad_norm / sums.steps if sums.steps else None,
            "skipped_steps": sums.skipped,
            "images_per_s": round(steps * observer.global_batch / max(sums.seconds, 1e-9), 1),
            "data_wait": round(sums.waited / max(sums.seconds, 1e-9), 4),
            "epoch_s": round(sums.seconds, 2),
        }
    )
    last = epoch + 1 == observer.epochs
    if pictures and (last or (epoch + 1) % pictures.every == 0):
        pictures.save(state.model, epoch, observer.log)
    state.position.next_epoch()
    if observer.saver:
        observer.saver.save(state)
