"""Classification metrics: the content of `eval.json`, and its lines for a terminal.

Accuracy is what the field calls WAR; UAR is the mean of the classes' recalls, also called mean
class accuracy. Both come with an interval, since a point on a few thousand images may well be
chance.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from util.errors import Fault
from util.seeding import BOOTSTRAP, generator
from util.wording import one_line

RESAMPLES, COVERAGE = 1000, 95  # bootstrap samples; % of them inside an interval
BINS = 15  # for the calibration error
MATRIX_CLASSES = 10  # more do not fit the width of a terminal


def classification_metrics(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], seed: int = 0
) -> dict[str, object]:
    """(n, K) probabilities, (n,) true class indices -> plain values, ready for `eval.json`.

    In %, unrounded: accuracy, uar, macro_f1, accuracy_ci and uar_ci ([low, high]); by class,
    recall, recall_ci, precision and f1; ece (expected calibration error of the predicted class).
    log_loss is in nats. n, support by class and confusion_matrix (rows: truth, columns: prediction)
    count images. None stands for the recall of a class without images, which is left out of UAR;
    the precision of a class that is never predicted; and the f1 of a class with neither, which is
    left out of macro_f1.

    Raises Fault if a probability is not finite, ValueError if the arrays do not match.
    """
    from sklearn import metrics  # slow to import, and training does not need it

    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    shape = (len(labels), len(classes))
    if probabilities.shape != shape or not len(labels) or len(classes) < 2:
        raise ValueError(f"probabilities {probabilities.shape} for (images, classes) {shape}")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels {labels.min()}–{labels.max()} for {len(classes)} classes")
    if lost := np.count_nonzero(~np.isfinite(probabilities).all(axis=1)):
        raise Fault(f"the model's outputs are not finite for {lost:,} of {len(labels):,} images")

    ids, predicted = np.arange(len(classes)), probabilities.argmax(axis=1)
    matrix = metrics.confusion_matrix(labels, predicted, labels=ids)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predicted, labels=ids, zero_division=np.nan
    )
    intervals = _intervals(matrix, seed)
    shares = probabilities / probabilities.sum(axis=1, keepdims=True)  # float32 sums to about 1
    return {
        "n": len(labels),
        "accuracy": 100 * float(np.mean(predicted == labels)),
        "uar": 100 * float(np.nanmean(recall)),
        "macro_f1": 100 * float(np.nanmean(f1)),
        "accuracy_ci": intervals[0],
        "uar_ci": intervals[1],
        "recall": _percent(classes, recall),
        "recall_ci": dict(zip(classes, _recall_intervals(matrix), strict=True)),
        "precision": _percent(classes, precision),
        "f1": _percent(classes, f1),
        "support": dict(zip(classes, matrix.sum(axis=1).tolist(), strict=True)),
        "confusion_matrix": matrix.tolist(),
        "classes": list(classes),
        "log_loss": float(metrics.log_loss(labels, shares, labels=ids)),
        "ece": 100 * calibration(probabilities.max(axis=1), predicted == labels).error,
    }


def _percent(classes: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    shown = [None if np.isnan(value) else 100 * float(value) for value in values]
    return dict(zip(classes, shown, strict=True))


def _intervals(matrix: np.ndarray, seed: int) -> list[list[float]]:
    """(K, K) counts -> [low, high] of accuracy and of UAR in %: percentile bootstrap over images.

    Images in one cell of the matrix are interchangeable here, so that resampling n of them with
    replacement means drawing the cells' counts from a multinomial distribution. A class without
    images in a bootstrap sample is left out of that sample's UAR.
    """
    n, rng = matrix.sum(), generator(BOOTSTRAP, seed)
    draws = rng.multinomial(n, matrix.ravel() / n, RESAMPLES).reshape(-1, *matrix.shape)
    right, support = draws.diagonal(axis1=1, axis2=2), draws.sum(axis=2)
    recall = np.where(support, right / np.maximum(support, 1), np.nan)
    values = np.stack([right.sum(axis=1) / n, np.nanmean(recall, axis=1)], axis=1)
    tail = (100 - COVERAGE) / 2
    return (100 * np.percentile(values, (tail, 100 - tail), axis=0)).T.tolist()


class Calibration(NamedTuple):
    """Predictions in BINS equal bins of confidence, (low, high]; arrays are (BINS,)."""

    count: np.ndarray
    confidence: np.ndarray  # mean in the bin, like accuracy; 0 if it is empty
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error, 0–1: mean gap between confidence and accuracy, by images."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.count * gaps).sum() / self.count.sum())


def calibration(confidence: np.ndarray, right: np.ndarray) -> Calibration:
    """From the probability of the predicted class and whether it was right, (n,) each."""
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    sums = (np.bincount(bins, weights, BINS) for weights in (confidence, right))
    return Calibration(count, *(total / np.maximum(count, 1) for total in sums))


def _recall_intervals(matrix: np.ndarray) -> list[list[float] | None]:
    """(K, K) counts -> [low, high] of each class's recall in %: Wilson's score interval (1927).

    No bootstrap: classes have few images, and one that is always right would get no interval at
    all.
    """
    from scipy.stats import binomtest

    return [
        [100 * float(end) for end in binomtest(right, n).proportion_ci(COVERAGE / 100, "wilson")]
        if n
        else None
        for right, n in zip(matrix.diagonal().tolist(), matrix.sum(axis=1).tolist(), strict=True)
    ]


def summary_lines(result: dict) -> list[str]:
    """The result of `classification_metrics` as lines for a terminal."""
    accuracy, uar = (
        f"{result[key]:.2f} % ({low:.2f}–{high:.2f})"
        for key in ("accuracy", "uar")
        for low, high in [result[f"{key}_ci"]]
    )
    left_out = result.get("unreadable")
    unreadable = f", {left_out:,} more cannot be read" if left_out else ""
    names = [one_line(name) for name in result["classes"]]
    width = max(len("class"), *map(len, names))
    lines = [
        f"accuracy {accuracy}, UAR {uar}, macro-F1 {result['macro_f1']:.2f} %, "
        f"{result['n']:,} images{unreadable}; in brackets: {COVERAGE} % interval",
        f"  {'class':{width}}  {'recall':>7}  {'precision':>9}  {'n':>7}",
    ]
    for name, key in zip(names, result["classes"], strict=True):
        recall, precision = (_or_dash(result[kind][key]) for kind in ("recall", "precision"))
        support = result["support"][key]
        lines.append(f"  {name:{width}}  {recall:>7}  {precision:>9}  {support:>7,}")
    if len(names) <= MATRIX_CLASSES:
        lines.append("confusion matrix, rows: truth, columns: prediction")
        heads = [name if len(name) <= 8 else name[:7] + "…" for name in names]
        columns = [
            max(len(head), *(len(str(count)) for count in counts))
            for head, counts in zip(
                heads, zip(*result["confusion_matrix"], strict=True), strict=True
            )
        ]
        for name, row in [("", heads), *zip(names, result["confusion_matrix"], strict=True)]:
            cells = (f"{cell!s:>{w}}" for cell, w in zip(row, columns, strict=True))
            lines.append(f"  {name:{width}}  {'  '.join(cells)}")
    return lines


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
