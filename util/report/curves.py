"""Learning curves from log.txt: of one run for its report, of several side by side."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import TYPE_CHECKING

import numpy as np

from util.report.drawing import CHART, PALETTE, PLAIN, clipped, drawable, pixels, short
from util.safe_json import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mid tones: at least 3:1 against white and against near-black.
COLOURS, AXES, LOST = ("#3b82f6", "#d9730d", "#2a9d63", "#9b6cf3"), "#888888", "#e5484d"
ROLES = dict(zip(("train", "test", "test_ema", "val"), COLOURS, strict=True))  # in every panel
POINTS = 1000  # per line: more than a screen shows
PANELS = {  # title: the keys of log.txt that are drawn together
    "Loss": "train_loss|(test|val)_loss(_ema)?",
    "Accuracy, %": "(test|val)_acc1(_ema)?",
    "Mean class accuracy (UAR), %": "(test|val)_uar(_ema)?",
    "Macro-F1, %": "(test|val)_f1(_ema)?",
    "Accuracy on frozen features, %": "probe_.*_acc1",
    "UAR on frozen features, %": "probe_.*_uar",
    "Learning rate": "train_lr",
    "Images per second": "images_per_s",
    "Gradient norm": "train_grad_norm",
}
METRIC = re.compile("_(loss|acc1|uar|f1)(?=_ema$|$)")  # in the title, so not in the legend
STYLE = {
    **PLAIN,
    **dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color"), AXES),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "xtick.bottom", "ytick.left"), False),
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
}


def learning_curves(epochs: list[dict], run: str = "") -> list[str]:
    """One SVG element per panel of curves for which the log holds values; [] if there are none.

    `epochs` are the objects of log.txt. The panels are transparent, in mid tones that are readable
    on light and dark backgrounds, and refer to nothing outside; their ids are unique if every `run`
    on a page has another name. Uses matplotlib's settings, which belong to the whole process: do
    not call it from two threads at once.
    """
    # Thinned from the end, so that the newest epoch always stays.
    epochs = epochs[:: -max(1, -(-len(epochs) // POINTS))][::-1]
    keys = dict.fromkeys(key for entry in epochs for key in entry)
    series = {key: np.array([number(e.get(key)) for e in epochs], float) for key in keys}
    series = {key: values for key, values in series.items() if np.isfinite(values).any()}
    panels: dict[str, list[str]] = {title: [] for title in PANELS}
    for key, values in series.items():
        title = next((title for title, keys in PANELS.items() if re.fullmatch(keys, key)), None)
        if title is None and key.startswith(("test_", "val_", "probe_")):
            # Metrics that share an axis must share a scale.
            largest = np.nanmax(np.abs(values[np.isfinite(values)]))
            title = "Test, 0–1" if largest <= 1 else "Test, 0–100" if largest <= 100 else "Test"
        if title:
            panels.setdefault(title, []).append(key)
    most = len(COLOURS)
    return [
        _panel(f"{title} ({i // most + 1})" if i else title, shown, epochs, run)
        for title, keys in panels.items()
        for i in range(0, len(keys), most)
        for shown in [{key: series[key] for key in keys[i : i + most]}]
    ]


def _panel(title: str, lines: dict[str, np.ndarray], epochs: list[dict], run: str) -> str:
    """One set of axes with a line per key; crosses at the bottom mark non-finite values."""
    from matplotlib import figure, rc_context, ticker

    xs = [i if (x := number(e.get("epoch"))) is None else x for i, e in enumerate(epochs)]
    finite = np.concatenate([values[np.isfinite(values)] for values in lines.values()])
    low, high = finite.min(), finite.max()
    # A value that exists but is not finite (NaN, infinity) is marked, not skipped.
    lost = [any(key in e and number(e[key]) is None for key in lines) for e in epochs]
    heading = title
    salt = (title + run).encode("utf-8", "backslashreplace").decode()  # a path may hold any bytes
    with rc_context({**STYLE, "svg.hashsalt": salt}):  # for ids unique to the panel
        picture = figure.Figure(figsize=(6.1, 3.2))
        axes = picture.add_axes((0.13, 0.11, 0.85, 0.7))  # fixed, so that panels line up
        axes.set_prop_cycle(color=COLOURS)
        dots = {"marker": "o" if len(epochs) <= 30 else None, "ms": 4, "clip_on": False}
        for key, values in lines.items():
            name = METRIC.sub("", key) if re.fullmatch(PANELS.get(title, ""), key) else key
            label = drawable(f"{name} {short(values[np.isfinite(values)][-1])}")
            axes.plot(xs, values, label=label, color=ROLES.get(name), **dots)
        if title in ("Loss", "Gradient norm") and 0 < 10 * low <= high:
            heading += ", log scale"
            axes.set_yscale("log")
            subs = (1, 2, 5) if high <= 1000 * low else (1,)
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
            axes.yaxis.minorticks_off()
        whole = ticker.MaxNLocator("auto", steps=(1, 2, 5, 10), integer=True, min_n_ticks=1)
        axes.xaxis.set_major_locator(whole)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: short(value))
        foot = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(np.compress(lost, xs), np.full(sum(lost), 0.03), "x", color=LOST, **foot)
        axes.grid(color=AXES, alpha=0.25, clip_on=False)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=len(lines))
        axes.set_title(heading, loc="left", pad=24, fontsize=11)
        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # leaves no metadata at all
        picture.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue().decode()
    # Drop the prolog, whose DTD is a web address, and the ids of groups, the same in all panels.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg ") :])
    return svg.replace("<svg ", f'<svg role="img" aria-label="{heading}" ', 1)


# --------------------------------------------------------------------------- several runs compared

COMPARED = tuple(PANELS)[: list(PANELS).index("Learning rate") + 1]
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # for more runs than colours
MOST_PANELS = 16


def compared_curves(runs: Mapping[str, Sequence[dict]]) -> np.ndarray | None:
    """log.txt's objects of each run, by its name -> (h, w, 3) uint8: a panel per metric.

    Every run has one colour in all panels. None if no log holds anything to draw.
    """
    from matplotlib import figure, rc_context, ticker
    from matplotlib.lines import Line2D

    held = {key for epochs in runs.values() for entry in epochs for key in entry}
    wanted = [
        (f"{title}: {METRIC.sub('', key)}" if key != "train_lr" else title, key)
        for title in COMPARED
        for key in sorted(held, key=lambda key: (not key.startswith("train"), key))
        if re.fullmatch(PANELS[title], key)
        and any(number(e.get(key)) is not None for epochs in runs.values() for e in epochs)
    ][:MOST_PANELS]
    if not wanted:
        return None
    rows, columns = -(-len(wanted) // 2), min(2, len(wanted))
    looks = dict(zip(runs, cycle(product(DASHES, PALETTE)), strict=False))
    with rc_context({**CHART, "axes.titlesize": 10}):
        picture = figure.Figure(figsize=(4.1 * columns, 2.5 * rows), layout="constrained")
        grid = picture.subplots(rows, columns, squeeze=False)
        for axes, (title, key) in zip(grid.flat, wanted, strict=False):
            for name, epochs in runs.items():
                dashes, colour = looks[name]
                _draw_run(axes, epochs, key, color=colour, linestyle=dashes)
            axes.set_title(drawable(title))
            axes.grid()
            axes.xaxis.set_major_locator(ticker.MaxNLocator("auto", integer=True, min_n_ticks=1))
            axes.yaxis.set_major_formatter(lambda value, _: short(value))
        for axes in grid.flat[len(wanted) :]:
            axes.set_axis_off()
        lines = [Line2D([], [], color=c, linestyle=d, linewidth=2) for d, c in looks.values()]
        names = [_shown(name) for name in runs]
        picture.legend(lines, names, loc="outside upper left", ncols=2)
        return pixels(picture)


def _draw_run(axes: "Axes", epochs: Sequence[dict], key: str, **look: object) -> None:
    """Draw the finite values of one metric from one run's log."""
    points = []
    for i, entry in enumerate(epochs):
        epoch, value = number(entry.get("epoch")), number(entry.get(key))
        if value is not None:
            points.append((i if epoch is None else epoch, value))
    points = points[:: -max(1, -(-len(points) // POINTS))][::-1]
    if points:
        dots = {"marker": "o", "ms": 3.5} if len(points) <= 30 else {}
        axes.plot(*zip(*points, strict=True), **look, **dots)


def _shown(name: str) -> str:
    """A run's name in a legend; matplotlib ignores labels that begin with an underscore."""
    shown = clipped(name, 40)
    return " " * shown.startswith("_") + shown
