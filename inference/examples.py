"""A figure of test images with their predictions, right and wrong, and what the model looked at."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.transforms import Normalise
from inference.explanation import attention_map
from inference.visualize import NOTES, turns
from models_registry import uncompiled
from training.evaluate import Evaluation, TestSet
from util.report.figures import Verdict, attention_grid, overlay, save_png
from util.seeding import FIGURE, generator

EACH = 6  # right and wrong predictions in the figure


def write_examples(
    output: Path,
    evaluation: Evaluation,
    test: TestSet,
    normalise: Normalise,
    model: nn.Module | None = None,
) -> None:
    """Write `figures/predictions.png` of an evaluation; see `example_figure`."""
    picture = example_figure(evaluation, test, normalise, model)
    save_png(picture, output / "figures" / "predictions.png")


def example_figure(
    evaluation: Evaluation, test: TestSet, normalise: Normalise, model: nn.Module | None
) -> np.ndarray:
    """Up to EACH right and EACH wrong predictions at random -> (h, w, 3) uint8.

    They are spread over the true classes, and the same whenever the predictions are. `model`: what
    made the predictions, to show what it looked at; the images stand alone if it is None or has no
    attention maps.
    """
    p, labels = evaluation.probabilities, test.common_labels
    is_right = p.argmax(axis=1) == labels
    kinds = [np.flatnonzero(evaluation.readable & kind) for kind in (is_right, ~is_right)]
    chosen = np.concatenate([_spread(kind, labels) for kind in kinds])
    views = torch.stack([test.loader.dataset[int(i)][0] for i in chosen])  # (N, 3, S, S) uint8
    names, pictures = test.common_classes, views.permute(0, 2, 3, 1).numpy()
    verdicts = [
        Verdict(names[labels[i]], names[k], float(p[i, k])) for i in chosen for k in [p[i].argmax()]
    ]
    right, wrong = (min(EACH, len(kind)) for kind in kinds)
    note = f"{right} right and {wrong} wrong predictions, chosen at random from each class in turn"
    overlays, method = None, getattr(model, "explained_by", None)
    if method:
        targets = [test.common[p[i].argmax()] for i in chosen]
        overlays = _overlays(model, normalise, views, targets)
        note += f"; {method}: {NOTES[method]}"
    count, total = len(kinds[0]), sum(map(len, kinds))
    title = f"{count:,} of {total:,} images classified correctly"
    return attention_grid(pictures, overlays, verdicts=verdicts, title=title, note=note, across=2)


def _spread(indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """EACH of these images at random, by class: no class twice before every class once."""
    order = generator(FIGURE, 0).permutation(indices)
    chosen = order[np.argsort(turns(labels[order]), kind="stable")][:EACH]
    return chosen[np.argsort(labels[chosen], kind="stable")]


def _overlays(
    model: nn.Module, normalise: Normalise, views: torch.Tensor, targets: list[int]
) -> np.ndarray:
    """(N, 3, S, S) uint8 and their predicted classes -> (N, S, S, 3) uint8: attention maps.

    One image at a time: rollout multiplies large matrices.
    """
    maps = []
    with uncompiled():
        for view, target in zip(views, targets, strict=True):
            x = normalise(view[None].to(normalise.mean.device))
            heat = attention_map(model, x, torch.tensor([target])).cpu().numpy()[0]
            maps.append(overlay(view.permute(1, 2, 0).numpy(), heat))
    return np.stack(maps)
