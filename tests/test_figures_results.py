"""util.report.charts: the charts of an evaluation show the values of eval.json."""

import warnings

import numpy as np
import pytest

from util.metrics import BINS, calibration, classification_metrics
from util.report.charts import (
    F1,
    GAP,
    RECALL,
    WIDTH,
    class_figure,
    confusion_figure,
    reliability_figure,
)
from util.report.drawing import DPI


@pytest.mark.parametrize("k", [2, 7])
def test_confusion_figure_has_truth_downwards_and_predictions_rightwards(k):
    def middle(row, column):
        """The middle of the cell with all images: the only one in the darkest shade."""
        counts = np.zeros((k, k), int)
        counts[row, column] = 5
        image = confusion_figure(counts, [f"class {i}" for i in range(k)], "a title")
        assert (image.dtype, image.shape[2]) == (np.uint8, 3)
        ys, xs = np.nonzero((image == (0x12, 0x2F, 0x73)).all(axis=2))
        assert np.ptp(ys) == pytest.approx(np.ptp(xs), abs=2)
        return np.array([np.ptp(ys) / 2 + ys.min(), np.ptp(xs) / 2 + xs.min()])

    first, last, side = middle(0, 0), k - 1, 0.85 * DPI
    np.testing.assert_allclose(middle(last, 0) - first, (last * side, 0), atol=2)
    np.testing.assert_allclose(middle(0, last) - first, (0, last * side), atol=2)


def test_confusion_figure_of_many_classes_fits_a_screen():
    counts = np.random.default_rng(0).integers(0, 2000, (20, 20))
    height, width, _ = confusion_figure(counts, [f"class {i}" for i in range(20)], "t").shape
    assert max(height, width) < 1500


def test_confusion_figure_shows_awkward_names_and_empty_classes():
    names = ["$x^2$", "\udce9\0漢", "a class name that does not come to an end at all"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = confusion_figure([[0, 0, 0], [0, 9, 0], [1, 10**6, 0]], names, "word " * 60)
    assert image.shape[1] < 1000
    assert (image[:, -5:] == 255).all()  # nothing is cut off
    assert (image[:, :5] == 255).all()


def colour(image, name):
    """Where an image has a colour of the charts, (h, w) bool."""
    wanted = [int(name[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(image.astype(int) - wanted).max(axis=2) < 12


def evaluated(k=4, n=200, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())
    p = rng.random((n, k)) + 0.6 * np.eye(k)[labels]
    p /= p.sum(axis=1, keepdims=True)
    return classification_metrics(p, labels, [f"class {i}" for i in range(k)]), p, labels


def test_bars_show_the_recall_and_diamonds_the_f1():
    result, _, _ = evaluated()
    names = result["classes"]
    result["recall"] = dict(zip(names, (100.0, 20.0, 50.0, 0.0), strict=True))
    result["recall_ci"] = {name: [value, value] for name, value in result["recall"].items()}
    result["f1"] = dict(zip(names, (40.0, 80.0, 90.0, 60.0), strict=True))
    image = class_figure(result)
    bars, diamonds = colour(image, RECALL), colour(image, F1)
    height = round((0.42 * 4 + 0.1) * DPI)
    top = np.nonzero(bars.any(axis=1))[0][0] - round(0.19 * height / 4)
    left = np.nonzero(bars.any(axis=0))[0][0]
    scale = WIDTH * DPI / 100
    for row, name in enumerate(names):
        rows = slice(top + row * height // 4, top + (row + 1) * height // 4)
        columns = np.nonzero(bars[rows].any(axis=0))[0]
        ends = (columns[-1] - left) / scale if len(columns) else 0
        assert ends == pytest.approx(result["recall"][name], abs=1.5)
        at = np.nonzero(diamonds[rows])[1]
        assert (at.mean() - left) / scale == pytest.approx(result["f1"][name], abs=1.5)


def test_lines_show_the_confidence_intervals():
    result, _, _ = evaluated(k=2)
    result["recall"] = dict.fromkeys(result["classes"], 50.0)
    result["f1"] = dict.fromkeys(result["classes"])
    result["recall_ci"] = {"class 0": [30.0, 80.0], "class 1": None}
    image = class_figure(result)
    bars = np.nonzero(colour(image, RECALL).any(axis=0))[0]
    scale = WIDTH * DPI / 100
    rows = np.nonzero(colour(image, RECALL).any(axis=1))[0]
    middle = rows[0] + round(0.31 * (0.84 + 0.1) * DPI / 2)  # of the upper bar
    line = (image[middle - 3 : middle + 4, bars[0] :] < 60).all(axis=2).any(axis=0)
    ends = np.nonzero(line[: round(99 * scale)])[0][[0, -1]] / scale
    np.testing.assert_allclose(ends, (30, 80), atol=1.2)


def test_class_chart_of_awkward_values_is_not_cut_off():
    result, _, _ = evaluated(k=3)
    names = ["$x^2$", "_\ud800\0漢", "a class name that does not come to an end at all"]
    for key in ("recall", "recall_ci", "f1", "support"):
        result[key] = dict(zip(names, result[key].values(), strict=True))
    result["recall"][names[0]] = result["recall_ci"][names[0]] = result["f1"][names[0]] = None
    result["support"][names[0]] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = class_figure({**result, "classes": names})
    for edge in (image[:, -5:], image[:, :5], image[:5], image[-5:]):
        assert (edge == 255).all()


def test_confidence_intervals_of_recall_are_wilsons():
    p = np.eye(2)[[0] * 8 + [1] * 2 + [1] * 5]
    result = classification_metrics(p, np.array([0] * 10 + [1] * 5), ["a", "b"])
    z, n, share = 1.959964, 10, 0.8
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert result["recall_ci"]["a"] == pytest.approx([100 * (centre - half), 100 * (centre + half)])
    assert result["recall_ci"]["b"][1] == pytest.approx(100)
    assert result["recall_ci"]["b"][0] == pytest.approx(100 * 5 / (5 + z * z))


def test_reliability_bars_show_the_accuracy_in_each_bin():
    # In bin (0.6, 0.667], 5 of 10 are right, in the last bin all 10; other bins are empty.
    confidence = np.array([0.65] * 10 + [0.99] * 10)
    right = np.array([1, 0] * 5 + [1] * 10, bool)
    image = reliability_figure(confidence, right)
    bars = colour(image, RECALL)
    bottom = np.nonzero(bars.sum(axis=1) > 60)[0][-1]  # where both bars stand
    width, height = WIDTH * DPI, 0.72 * 1.15 * WIDTH * DPI
    upper = bars[round(bottom - 1.01 * height) : bottom + 1]
    columns, heights = np.nonzero(upper[-1])[0], []
    for part in np.split(columns, np.nonzero(np.diff(columns) > 1)[0] + 1):
        rows = np.nonzero(upper[:, part].mean(axis=1) > 0.3)[0]
        heights.append((len(upper) - rows[0]) / height)
        assert len(part) == pytest.approx(0.9 / BINS * width, abs=3)
    np.testing.assert_allclose(heights, (0.5, 1), atol=0.02)
    assert colour(image, GAP).any()


def test_reliability_and_eval_json_have_one_calibration_error():
    result, p, labels = evaluated()
    bins = calibration(p.max(axis=1), p.argmax(axis=1) == labels)
    assert 100 * bins.error == result["ece"]
    assert bins.count.sum() == len(labels)
    used = bins.count > 0
    edges = np.arange(BINS) / BINS
    assert (bins.confidence[used] > edges[used]).all()
    assert (bins.confidence[used] <= edges[used] + 1 / BINS + 1e-12).all()
    assert reliability_figure(p.max(axis=1), p.argmax(axis=1) == labels).dtype == np.uint8
    assert reliability_figure(np.ones(1), np.ones(1, bool)).shape[2] == 3
