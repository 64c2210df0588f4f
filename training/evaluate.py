"""Predictions, features and metrics of a model on evaluation images, each counted once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets.labelled import LabelledImages
from datasets.labels import first_id, parse_order
from datasets.transforms import Normalise
from training.precision import Precision
from training.transfer import Batches, on_host
from util.class_order import (
    better_order,
    option_text,
    placed_by_elimination,
    scores,
    word_order,
)
from util.distributed import gather_objects, on_main
from util.metrics import classification_metrics
from util.wording import printable


@torch.no_grad()
def collect(
    function: Callable[[Tensor], Tensor],
    loader: DataLoader,
    normalise: Normalise,
    precision: Precision,
    between: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Apply `function` to all images -> (n, D) float32 in their order, (n,) bool: readable or not.

    Each rank processes its share, and all get the whole result; an image that several ranks have
    processed counts once. `between` is called before each batch.
    """

    def results() -> Iterator[tuple[Tensor, ...]]:
        for imgs, index, readable in Batches(loader, normalise.mean.device):
            between()
            with precision.autocast():
                value = function(normalise(imgs))
            yield index, readable, value.float()

    # Copied, so that the pinned memory of each batch can be used for the next.
    own = [tuple(x.numpy().copy() for x in result) for result in on_host(results())]
    batches = [batch for share in gather_objects(own) for batch in share]
    index, readable, values = (np.concatenate(part) for part in zip(*batches, strict=True))
    order = np.unique(index, return_index=True)[1]
    return values[order], readable[order]


def probabilities(model: nn.Module, flip: bool) -> Callable[[Tensor], Tensor]:
    """(N, 3, S, S) -> (N, K); with `flip`, averaged over each image and its mirror image."""

    def function(x: Tensor) -> Tensor:
        p = model(x).float().softmax(dim=-1)
        return (p + model(x.flip(-1)).float().softmax(dim=-1)) / 2 if flip else p

    return function


class TestSet(NamedTuple):
    """A split to evaluate on, and which of a model's classes are evaluated there."""

    images: LabelledImages  # labels are indices into `classes`
    loader: DataLoader
    classes: Sequence[str]  # the model's
    common: Sequence[int]  # ascending indices of the classes that occur in this split
    unknown: Mapping[str, int] = {}  # images left out, by class that the model does not know
    unasked: Sequence[str] = ()  # the model's classes that do not occur in this split

    @property
    def common_classes(self) -> list[str]:
        """The names of the classes in `common`."""
        return [self.classes[k] for k in self.common]

    @property
    def common_labels(self) -> np.ndarray:
        """The labels as indices into `common`."""
        return np.searchsorted(self.common, self.images.labels)


class Evaluation(NamedTuple):
    result: dict  # classification_metrics, and `unreadable`, the number of images left out
    probabilities: np.ndarray  # (n, K) over the common classes
    readable: np.ndarray  # (n,) bool: for which images the probabilities are valid
    counts: np.ndarray  # (C, C) images by true (rows) and predicted class, over all classes


def evaluate_model(
    model: nn.Module,
    test: TestSet,
    normalise: Normalise,
    precision: Precision,
    flip: bool = False,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Metrics of a classifier; the same on all ranks, whatever their number."""
    was_training = model.training
    model.eval()
    share_buffers(model)
    p, readable = collect(
        probabilities(model, flip),
        test.loader,
        normalise=normalise,
        precision=precision,
        between=between,
    )
    model.train(was_training)
    return judge(p, readable, test)


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers (batch-norm statistics), which checkpoints hold, to every rank."""
    for own, value in zip(
        model.buffers(), on_main(lambda: [b.cpu() for b in model.buffers()]), strict=True
    ):
        own.copy_(value)


def judge(p: np.ndarray, readable: np.ndarray, test: TestSet) -> Evaluation:
    """Probabilities (n, C) of the model's classes -> metrics over those in the test set."""
    counts = np.zeros((len(test.classes), len(test.classes)), np.int64)
    np.add.at(counts, (test.images.labels[readable], p[readable].argmax(axis=1)), 1)
    p = p[:, test.common].clip(1e-30)  # all may be 0 if the model is certain of another class
    p = p / p.sum(axis=1, keepdims=True)
    result = classification_metrics(p[readable], test.common_labels[readable], test.common_classes)
    return Evaluation({**result, "unreadable": int((~readable).sum())}, p, readable, counts)


class OrderWarning(NamedTuple):
    """Evidence that the classes of a model or a data set are in another order than assumed."""

    facts: dict  # for `eval.json`; {} if there is no doubt
    lines: list[str]  # for the log


def doubt_order(
    evaluation: Evaluation, classes: Sequence[str], label_order: str | None = None
) -> OrderWarning:
    """Check whether another order of the model's `classes` fits its predictions far better.

    `label_order`: how the data's class numbers were read, if the labels are numbers. See
    `util.class_order`.
    """
    order = better_order(evaluation.counts)
    if order is None:
        return OrderWarning({}, [])
    now, then = scores(evaluation.counts), scores(evaluation.counts, order)
    wording = word_order(classes, order)
    moved = {name: shown for name, shown in wording.shows.items() if shown != name}
    lines = [
        "warning: the classes are probably in another order: with it, accuracy would be "
        f"{then.accuracy:.2f} % instead of {now.accuracy:.2f} %, UAR {then.uar:.2f} % instead of "
        f"{now.uar:.2f} %"
    ]
    if wording.classes:
        lines.append(f"  if the model's outputs are misnamed: {wording.classes}")
    labels = None
    if label_order:
        names = [wording.shows.get(name, name) for name in parse_order(label_order)]
        labels = option_text("--label_order", names, first_id(label_order))
    told = ", ".join(f"{printable(a)} shows {printable(b)}" for a, b in moved.items())
    lines.append(f"  if the data's labels are misnamed: {labels or told}")
    if len(guessed := placed_by_elimination(evaluation.counts, order)) > 1:
        names = ", ".join(printable(classes[k]) for k in guessed)
        lines.append(f"  {names}: assigned by elimination, possibly swapped with each other")
    facts = {"accuracy": then.accuracy, "uar": then.uar, "shows": wording.shows}
    return OrderWarning({"better_class_order": facts}, lines)
