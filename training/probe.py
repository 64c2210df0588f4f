"""How well frozen features predict expressions, by nearest neighbours and a linear classifier."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import nn

from datasets.augment import Augment
from datasets.finetune import PlainImages, stratified
from datasets.labelled import LabelledImages
from datasets.loader import build_test_loader
from datasets.transforms import Normalise
from training.evaluate import collect
from training.precision import Precision
from util.distributed import ProcessInfo, on_main
from util.metrics import classification_metrics

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of a neighbour's weight, exp(similarity / T), as in DINO (Caron et al. 2021)
BATCH = 64
MOST_IMAGES = 20_000  # for training: more make the probe slower, not better


class Features(NamedTuple):
    """Features of one split."""

    x: np.ndarray  # (n, D) float32
    labels: np.ndarray  # (n,)
    readable: np.ndarray  # (n,) bool

    def counts(self) -> dict[str, int]:
        """The numbers of readable and unreadable training images, for `eval.json`."""
        readable = int(self.readable.sum())
        return {"train_images": readable, "train_unreadable": len(self.readable) - readable}

    def lines(self, total: int) -> list[str]:
        """A log line if these are not all of the `total` training images."""
        count, unreadable = self.counts().values()
        if count == total:
            return []
        why = f"; {unreadable:,} cannot be read" if unreadable else ""
        return [f"nearest neighbours are found among {count:,} of {total:,} training images{why}"]


class Probe:
    """Labelled images to test the features of a backbone on, also while it is pre-trained."""

    def __init__(
        self,
        train: LabelledImages,
        test: LabelledImages,
        classes: Sequence[str],
        view: Augment,
        normalise: Normalise,
        process: ProcessInfo,
        **loading: object,
    ) -> None:
        """`loading`: further arguments of `build_test_loader`."""
        if len(train) > MOST_IMAGES:
            share = MOST_IMAGES / len(train)
            train = train.take(np.flatnonzero(stratified(train.labels, share, seed=0)))
        self.sets, self.classes, self.normalise = (train, test), classes, normalise
        self.loaders = [
            build_test_loader(PlainImages(images.source, view), BATCH, process, **loading)
            for images in self.sets
        ]

    def features(
        self, model: nn.Module, precision: Precision, between: Callable[[], None] = lambda: None
    ) -> list[Features]:
        """Features of train and test, the same on all ranks; `between` as in `collect`."""
        was_training = model.training
        model.eval()
        found = []
        for images, loader in zip(self.sets, self.loaders, strict=True):
            x, readable = collect(
                model.forward_features,
                loader,
                normalise=self.normalise,
                precision=precision,
                between=between,
            )
            found.append(Features(x, images.labels, readable))
        model.train(was_training)
        return found

    def measure(
        self, model: nn.Module, precision: Precision, between: Callable[[], None]
    ) -> dict[str, float]:
        """`probe_{knn,linear}_{acc1,uar}` in %, the same on all ranks.

        Also `probe_unreadable`, the number of images that could not be read, if there are any.
        """
        train, test = self.features(model, precision, between)
        unreadable = sum(int((~split.readable).sum()) for split in (train, test))
        scores = {"probe_unreadable": unreadable} if unreadable else {}
        for name, classify in (("knn", knn), ("linear", linear)):
            p = on_main(lambda: classify(train, test.x, len(self.classes)))  # noqa: B023
            result = classification_metrics(
                p[test.readable], test.labels[test.readable], self.classes
            )
            scores |= {f"probe_{name}_acc1": result["accuracy"], f"probe_{name}_uar": result["uar"]}
        return scores


def knn(train: Features, queries: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities (m, classes) by weighted votes of the nearest training images (cosine)."""
    from sklearn.neighbors import KNeighborsClassifier

    def weight(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / TEMPERATURE)

    neighbours = min(NEIGHBOURS, int(train.readable.sum()))
    model = KNeighborsClassifier(neighbours, metric="cosine", weights=weight)
    return _fit_and_predict(model, train, queries, classes)


def linear(train: Features, queries: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities (m, classes) by logistic regression on standardised features."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    with warnings.catch_warnings():  # full convergence is not needed
        warnings.simplefilter("ignore", ConvergenceWarning)
        return _fit_and_predict(model, train, queries, classes)


def _fit_and_predict(
    model: "ClassifierMixin", train: Features, queries: np.ndarray, classes: int
) -> np.ndarray:
    """Fit, and predict probabilities; those of classes without training images are 0."""
    model.fit(train.x[train.readable], train.labels[train.readable])
    p = np.zeros((len(queries), classes))
    p[:, model.classes_] = model.predict_proba(queries)
    return p
