"""Charts of an evaluation: confusion matrix, classes, reliability."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from util.metrics import BINS, COVERAGE, calibration
from util.report.drawing import (
    CHART,
    DARK,
    DPI,
    GREY,
    INK,
    PLAIN,
    clipped,
    drawable,
    font,
    pixels,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = ("#f4f7fc", "#c3d9f7", "#7fb0f2", "#3b82f6", "#1c4fb4", "#122f73")  # none to all of a row


def confusion_figure(
    matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str
) -> np.ndarray:
    """(K, K) counts, rows: truth, columns: prediction -> (h, w, 3) uint8.

    Each cell shows its share of the true class in %, also as its colour, and its count below. A
    class without images has an empty row.
    """
    from matplotlib import figure, rc_context

    counts = np.asarray(matrix, np.int64)
    k = len(counts)
    cell = min(0.85, max(0.43, 8.5 / k))  # side length in inches
    size = min(13, 19 * cell)  # points
    label = max(8, 0.85 * size)
    ink, grey = (tuple(np.array(colour) / 255) for colour in (INK, GREY))
    names = [clipped(name) for name in classes]
    tilted = max(map(len, names)) * 0.6 * label > 72 * cell
    tilt = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if tilted else {}
    middles = np.arange(k) + 0.5
    width = round(max(cell * k, 4.3) * DPI)
    heading = "\n".join(wrap(drawable(title), font(round(label * DPI / 60)), width))
    with rc_context(PLAIN):
        picture = figure.Figure(figsize=(cell * k, cell * k))
        axes = picture.add_axes((0, 0, 1, 1), frame_on=False)  # labels are outside
        _draw_cells(axes, counts, size=size, ink=ink, grey=grey)
        axes.set_xticks(middles, names, fontsize=label, color=ink, **tilt)
        axes.set_yticks(middles, names, fontsize=label, color=ink)
        axes.tick_params(length=0)
        soft = {"color": grey, "fontsize": label}
        axes.set_xlabel(
            "predicted class: % of the true class, number of images", **soft, labelpad=8
        )
        axes.set_ylabel("true class", **soft, labelpad=8)
        support = [f"{n:,}" for n in counts.sum(axis=1)]
        right = k + (6 + 0.62 * label * max(map(len, support))) / 72 / cell
        for text, y in zip(["n", *support], [-9 / 72 / cell, *middles], strict=True):
            axes.text(right, y, text, ha="right", va="center", **soft)
        axes.set_title(heading, loc="left", fontsize=1.15 * label, color=ink, pad=22)
        return pixels(picture)


def _draw_cells(axes: "Axes", counts: np.ndarray, size: float, ink: tuple, grey: tuple) -> None:
    """The coloured squares of `confusion_figure` and the text in them."""
    from matplotlib.colors import LinearSegmentedColormap

    support = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(support, 1)
    shades = LinearSegmentedColormap.from_list("shades", SHADES)
    axes.pcolormesh(shares, cmap=shades, vmin=0, vmax=1, edgecolors="white", linewidth=2)
    axes.invert_yaxis()
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        colour = "white" if share > 0.5 else ink if count else grey
        percent = f"{100 * share:.1f}" if 0 < share < 1 else f"{100 * share:.0f}"
        lines = [(percent, 0 if count else -0.35, 1, 1.0), (f"{count:,}", -1.15, 0.72, 0.75)]
        for text, down, scale, alpha in lines[: 2 if count else 1 if support[row] else 0]:
            axes.annotate(
                text,
                (column + 0.5, row + 0.5),
                (0, down * size),
                textcoords="offset points",
                ha="center",
                color=colour,
                alpha=alpha,
                fontsize=scale * size,
                weight="bold" if row == column and scale == 1 else None,
            )


# --------------------------------------------------------------------------------------- classes

RECALL, F1, GAP, SOFT = "#3b82f6", "#d55e00", "#e69f00", "#9aa0a8"
WIDTH = 4.4  # inches, of charts: narrow enough for a phone
AT_RIGHT = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "color": SOFT}


def class_figure(result: dict) -> np.ndarray:
    """Recall and F1 of each class, from `classification_metrics` -> (h, w, 3) uint8.

    A bar shows the recall, a line its interval, a diamond the F1. A class without images has
    neither bar nor line.
    """
    from matplotlib import figure, rc_context

    classes = result["classes"]
    k, middles = len(classes), np.arange(len(classes))
    recall, f1 = (
        np.array([result[key][name] for name in classes], float) for key in ("recall", "f1")
    )
    ends = np.array([result["recall_ci"][name] or [np.nan] * 2 for name in classes], float)
    with rc_context(CHART):
        height = 0.42 * k + 0.1  # inches
        picture = figure.Figure(figsize=(WIDTH, height))
        axes = picture.add_axes((0, 0, 1, 1))
        axes.barh(middles, recall, 0.62, color=RECALL, label="recall")
        spread = np.stack([recall - ends[:, 0], ends[:, 1] - recall]).clip(0)
        label = f"its {COVERAGE} % interval"
        style = {"ecolor": DARK, "elinewidth": 1.4, "capsize": 3.5, "capthick": 1.4}
        axes.errorbar(recall, middles, xerr=spread, fmt="none", label=label, **style)
        style = {"color": F1, "edgecolors": "white", "linewidths": 1, "zorder": 3}
        axes.scatter(f1, middles, 46, marker="D", label="F1", clip_on=False, **style)
        style = {"color": SOFT, "linestyle": (0, (4, 3)), "linewidth": 1.2}
        axes.axvline(result["uar"], label="UAR, the mean recall", **style)
        axes.set_xlim(0, 100)
        axes.set_ylim(k - 0.5, -0.5)
        axes.set_yticks(middles, [clipped(name) for name in classes], color=DARK)
        axes.set_xlabel("%")
        axes.grid(axis="x")
        for y, name in enumerate(classes):
            count = f"{result['support'][name]:,}"
            axes.annotate(count, (1, y), (6, 0), va="center", **AT_RIGHT)
        axes.annotate("n", (1, -0.5), (6, 3), va="bottom", **AT_RIGHT)
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.47 / height), ncols=2)
        title = f"UAR {result['uar']:.1f} %, macro-F1 {result['macro_f1']:.1f} %"
        axes.set_title(title, pad=20)
        return pixels(picture)


# ----------------------------------------------------------------------------------- reliability


def reliability_figure(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Probability of the predicted class and whether it is right, (n,) each -> (h, w, 3) uint8.

    Top: the accuracy in each bin of confidence, beside that of a calibrated model (the diagonal).
    Bottom: how many images are in it. Bins and expected calibration error are those of eval.json.
    (On Calibration of Modern Neural Networks, Guo et al. 2017, figure 1.)
    """
    from matplotlib import figure, rc_context

    bins = calibration(confidence, right)
    some = np.flatnonzero(bins.count)
    middles, width = (some + 0.5) / BINS, 0.9 / BINS
    accuracy, said = bins.accuracy[some], bins.confidence[some]
    with rc_context(CHART):
        picture = figure.Figure(figsize=(WIDTH, WIDTH * 1.15))
        above = picture.add_axes((0, 0.28, 1, 0.72))
        below = picture.add_axes((0, 0, 1, 0.22), sharex=above)
        above.plot([0, 1], [0, 1], color=SOFT, linestyle=(0, (4, 3)), label="calibrated")
        above.bar(middles, accuracy, width, color=RECALL, label="accuracy")
        style = {"fill": False, "hatch": "/////", "edgecolor": GAP, "linewidth": 1}
        above.bar(middles, said - accuracy, width, accuracy, label="gap to confidence", **style)
        above.set_ylabel("accuracy")
        below.bar(middles, bins.count[some] / len(right), width, color=SOFT)
        below.set_ylabel("images")
        below.set_xlabel("confidence: the probability of the predicted class")
        for value, colour, name in (
            (np.mean(right), RECALL, "accuracy"),
            (np.mean(confidence), "#b37700", "mean confidence"),
        ):
            below.axvline(value, color=colour, linewidth=2, label=f"{name} {100 * value:.1f} %")
        below.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, fontsize=8.5)
        above.legend(loc="upper left")
        above.set_xlim(0, 1)
        above.set_ylim(0, 1)
        above.tick_params(labelbottom=False)
        for axes in (above, below):
            axes.grid()
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        below.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        above.set_title(f"expected calibration error {100 * bins.error:.1f} %, n = {len(right):,}")
        return pixels(picture)
