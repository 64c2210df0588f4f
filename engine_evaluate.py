"""A model on images that are not trained on: predictions, features, metrics – each image once."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets.labelled import LabelledImages
from datasets.transforms import Normalise
from engine_train import Precision
from util.distributed import gather_objects, on_main
from util.metrics import evaluate
from util.transfer import on_device


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
    """Probabilities (n, K) of the model's classes -> metrics over those that occur in the test."""
    p = p[:, test.common].clip(1e-30)  # all may be 0 where the model is sure of another class
    p = p / p.sum(axis=1, keepdims=True)
    result = evaluate(p[readable], test.common_labels[readable], test.common_classes)
    return Evaluation({**result, "unreadable": int((~readable).sum())}, p, readable)
