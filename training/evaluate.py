"""A model on images that are not trained on: predictions, features, metrics – each image once."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets.labelled import LabelledImages
from datasets.labels import first_id, parse_order
from datasets.transforms import Normalise
from engine_train import Precision
from training.transfer import on_device
from util.class_order import (
    better_order,
    option_text,
    placed_by_elimination,
    scores,
    word_order,
)
from util.distributed import gather_objects, on_main
from util.metrics import evaluate
from util.wording import printable


@torch.no_grad()
def collect(
    function: Callable[[Tensor], Tensor],
    loader: DataLoader,
    normalise: Normalise,
    precision: Precision,
    between: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """`function` of all images, (n, D) float32 in their order, and which could be read, (n,) bool.

    On every rank, though each does only its own share; an image that several ranks have done counts
    once. `between` is called before each batch.
    """
    device, own = normalise.mean.device, []
    for imgs, index, readable in on_device(loader, device):
        between()
        with precision.autocast():
            value = function(normalise(imgs))
        own.append(tuple(x.cpu().numpy() for x in (index, readable, value.float())))
    batches = [batch for share in gather_objects(own) for batch in share]
    index, readable, values = (np.concatenate(part) for part in zip(*batches, strict=True))
    order = np.unique(index, return_index=True)[1]
    return values[order], readable[order]


def probabilities(model: nn.Module, flip: bool) -> Callable[[Tensor], Tensor]:
    """(N, 3, S, S) -> (N, K); with `flip` the mean of those of the image and its mirror image."""

    def function(x: Tensor) -> Tensor:
        p = model(x).float().softmax(dim=-1)
        return (p + model(x.flip(-1)).float().softmax(dim=-1)) / 2 if flip else p

    return function


class TestSet(NamedTuple):
    """A split to evaluate on, and what of a model's answers counts there."""

    images: LabelledImages  # labels are places in `classes`
    loader: DataLoader
    classes: Sequence[str]  # the model's
    common: Sequence[int]  # rising places of the classes that occur here: perhaps not all
    unknown: Mapping[str, int] = {}  # images left out, by classes that the model does not know
    unasked: Sequence[str] = ()  # the model's classes that do not occur here

    @property
    def common_classes(self) -> list[str]:
        """Their names."""
        return [self.classes[k] for k in self.common]

    @property
    def common_labels(self) -> np.ndarray:
        """The labels as places among them."""
        return np.searchsorted(self.common, self.images.labels)


class Evaluation(NamedTuple):
    result: dict  # util.metrics.evaluate, and `unreadable`, the number of images left out
    probabilities: np.ndarray  # (n, K) over the common classes
    readable: np.ndarray  # (n,) bool: where they mean something
    counts: np.ndarray  # (C, C) images by class (rows) and output, over all of the model's classes


def evaluate_model(
    model: nn.Module,
    test: TestSet,
    normalise: Normalise,
    precision: Precision,
    flip: bool = False,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Metrics of a classifier, equal on all ranks and for any number of them."""
    was_training = model.training
    model.eval()
    share_buffers(model)
    p, readable = collect(probabilities(model, flip), test.loader, normalise, precision, between)
    model.train(was_training)
    return judge(p, readable, test)


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Rank 0's batch-norm statistics, those a checkpoint holds, on every rank."""
    for own, value in zip(
        model.buffers(), on_main(lambda: [b.cpu() for b in model.buffers()]), strict=True
    ):
        own.copy_(value)


def judge(p: np.ndarray, readable: np.ndarray, test: TestSet) -> Evaluation:
    """Probabilities (n, C) of the model's classes -> metrics over those that occur in the test."""
    counts = np.zeros((len(test.classes), len(test.classes)), np.int64)
    np.add.at(counts, (test.images.labels[readable], p[readable].argmax(axis=1)), 1)
    p = p[:, test.common].clip(1e-30)  # all may be 0 where the model is sure of another class
    p = p / p.sum(axis=1, keepdims=True)
    result = evaluate(p[readable], test.common_labels[readable], test.common_classes)
    return Evaluation({**result, "unreadable": int((~readable).sum())}, p, readable, counts)


class OrderDoubt(NamedTuple):
    """That the classes of a model or a data set are probably in another order than assumed."""

    facts: dict  # for `eval.json`; {} without a doubt
    lines: list[str]  # for people


def doubt_order(
    evaluation: Evaluation, classes: Sequence[str], label_order: str | None = None
) -> OrderDoubt:
    """Whether another order of `classes`, the model's, fits the answers far better.

    `label_order` is how the data's class numbers were read, if they are numbers. See
    `util.class_order`.
    """
    order = better_order(evaluation.counts)
    if order is None:
        return OrderDoubt({}, [])
    now, then = scores(evaluation.counts), scores(evaluation.counts, order)
    wording = word_order(classes, order)
    moved = {name: shown for name, shown in wording.shows.items() if shown != name}
    lines = [
        "warning: the classes are probably in another order: with it accuracy would be "
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
    lines.append(f"  if the data's labels are: {labels or told}")
    if len(guessed := placed_by_elimination(evaluation.counts, order)) > 1:
        names = ", ".join(printable(classes[k]) for k in guessed)
        lines.append(f"  {names}: placed where the others left room, perhaps in each other's place")
    facts = {"accuracy": then.accuracy, "uar": then.uar, "shows": wording.shows}
    return OrderDoubt({"better_class_order": facts}, lines)
