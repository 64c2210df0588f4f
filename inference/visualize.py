"""Figures of a trained model on a data set: chooses the images and draws the figures."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.augment import Augment
from datasets.decode import UnreadableImage
from datasets.finetune import PlainImages, stratified
from datasets.labelled import LabelledImages, Source
from datasets.loader import build_test_loader
from engine_finetune import result_figures
from engine_pretrain import reconstruct, shown_with
from inference.explanation import NOTES, attention_map
from models_saved import Saved
from training.evaluate import TestSet, collect, evaluate_model, probabilities
from training.precision import Precision
from util.distributed import ProcessInfo
from util.errors import BadInput, Fault
from util.report.features import FEWEST, feature_figure, project
from util.report.figures import Verdict, attention_grid, overlay, ratio_grid
from util.seeding import FIGURE, generator

MOST_POINTS = 2000  # in a feature map: more take long and hide each other
MOST_TRIES = 50  # images tried, in case they cannot be read, for each that is shown


def pick_images(
    source: Source, labels: np.ndarray | None, view: Augment, count: int, seed: int
) -> tuple[Tensor, np.ndarray]:
    """Up to `count` readable images, balanced over classes -> (N, 3, S, S) uint8, indices (N,).

    Sorted by class; the same for the same data and seed. Raises BadInput when none can be read.
    """
    labels = np.zeros(len(source), int) if labels is None else labels
    shown: dict[int, Tensor] = {}
    for i in in_turn(labels, seed)[: MOST_TRIES * count].tolist():
        try:
            shown[i] = view(source.image(i))
        except UnreadableImage as error:
            problem = f"{source.name(i)}: {error.reason}"
        if len(shown) == count:
            break
    if not shown:
        raise BadInput(f"--data_path: none of the images tried can be read (the last: {problem})")
    chosen = sorted(shown, key=lambda i: (labels[i], i))
    return torch.stack([shown[i] for i in chosen]), np.array(chosen)


def in_turn(labels: np.ndarray, seed: int) -> np.ndarray:
    """Class labels (n,) -> indices of all images, cycling through the classes in random order."""
    order = generator(FIGURE, seed).permutation(len(labels))
    shuffled = labels[order]
    return order[np.lexsort((shuffled, turns(shuffled)))]


def turns(labels: np.ndarray) -> np.ndarray:
    """Class labels (n,) -> (n,) int: how many images of the same class come before each."""
    turn = np.zeros(len(labels), int)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        turn[own] = np.arange(len(own))
    return turn


class FigureData(NamedTuple):
    """The images for the figures: one split, without images of classes unknown to the model."""

    source: Source
    labels: np.ndarray | None  # (n,) indices into `classes`; None for data without labels
    classes: Sequence[str]  # a classifier's own, else the data set's
    common: Sequence[int]  # as in TestSet


class Viewer:
    """Draws figures of a trained model on a data set; each is (h, w, 3) uint8."""

    def __init__(
        self,
        saved: Saved,
        data: FigureData,
        device: torch.device,
        batch_size: int,
        workers: int,
        seed: int,
    ) -> None:
        """`seed` determines the choice of images, the masks and the feature map."""
        self.saved, self.model, self.data, self.seed = saved, saved.model.to(device), data, seed
        self.normalise = saved.preprocessing.normalise.to(device)
        self.precision = Precision("auto", device)
        self.batch_size = batch_size
        self.unreadable = 0  # images left out of charts and feature map
        self.loading = {"workers": workers, "pin_memory": device.type == "cuda"}

    def reconstructions(self, count: int, ratios: Sequence[float]) -> np.ndarray:
        """`count` images at several mask ratios; a higher ratio masks the same patches and more."""
        imgs, _ = self._pick(count)
        shape = len(imgs), self.model.num_patches
        noise = torch.from_numpy(generator(FIGURE, self.seed, 1).random(shape, dtype=np.float32))
        stages = [
            reconstruct(self.model, self.normalise, imgs=imgs, mask_ratio=r, noise=noise)
            for r in ratios
        ]
        columns = [(r, s.masked, s.reconstructed) for r, s in zip(ratios, stages, strict=True)]
        return ratio_grid(stages[0].original, columns, self.saved.name, shown_with(self.model))

    @torch.no_grad()
    def attention(self, count: int) -> np.ndarray:
        """`count` images beside the classifier's attention maps."""
        imgs, chosen = self._pick(count)
        x = self.normalise(imgs.to(self.normalise.mean.device))
        flip = getattr(self.saved, "flip", False)
        p, predicted = probabilities(self.model, flip)(x).max(dim=1)
        heat = attention_map(self.model, x, predicted).cpu().numpy()
        pictures, names = imgs.permute(0, 2, 3, 1).numpy(), self.data.classes
        verdicts = [
            Verdict(names[label], names[k], share)
            for label, k, share in zip(
                self.data.labels[chosen], predicted.tolist(), p.tolist(), strict=True
            )
        ]
        overlays = np.stack([overlay(i, h) for i, h in zip(pictures, heat, strict=True)])
        method = self.model.explained_by
        return attention_grid(
            pictures,
            overlays,
            verdicts=verdicts,
            title=self.saved.name,
            note=f"{method}: {NOTES[method]}",
        )

    def results(self) -> dict[str, np.ndarray]:
        """The charts of an evaluation by name, see engine_finetune.result_figures."""
        images = LabelledImages(self.data.source, self.data.labels)
        test = TestSet(images, self._loader(images), self.data.classes, self.data.common)
        flip = getattr(self.saved, "flip", False)
        evaluation = evaluate_model(
            self.model, test, normalise=self.normalise, precision=self.precision, flip=flip
        )
        self.unreadable = max(self.unreadable, evaluation.result["unreadable"])
        return result_figures(evaluation, test)

    def features(self) -> np.ndarray:
        """A map of the features of at most MOST_POINTS images, sampled in proportion to class.

        Raises BadInput for too few images, Fault for features that are not finite.
        """
        images = LabelledImages(self.data.source, self.data.labels)
        if len(images) > MOST_POINTS:
            share = MOST_POINTS / len(images)
            images = images.take(np.flatnonzero(stratified(images.labels, share, self.seed)))
        function, loader = self.model.forward_features, self._loader(images)
        x, readable = collect(function, loader, self.normalise, self.precision)
        count = int(readable.sum())
        # The charts may have seen more images than this sample.
        self.unreadable = max(self.unreadable, len(readable) - count)
        if count < FEWEST:
            what = f"{count} images can be read; a feature map needs at least {FEWEST}"
            raise BadInput(f"--data_path: {what}")
        if not np.isfinite(x[readable]).all():
            raise Fault("the model's features are not finite, so no feature map can be drawn")
        points, labels = project(x[readable], self.seed), images.labels[readable]
        title = f"{self.saved.name}, {count:,} images"
        return feature_figure(points, labels, self.data.classes, title)

    def _pick(self, count: int) -> tuple[Tensor, np.ndarray]:
        view = self.saved.preprocessing.view
        return pick_images(
            self.data.source, self.data.labels, view=view, count=count, seed=self.seed
        )

    def _loader(self, images: LabelledImages) -> DataLoader:
        dataset = PlainImages(images.source, self.saved.preprocessing.view)
        return build_test_loader(dataset, self.batch_size, ProcessInfo(), **self.loading)
