"""Pictures of a run: reconstructions as one labelled grid, learning curves, confusion matrices.

Everything returns a value (an array, texts) and leaves no plotting state behind. matplotlib is
imported where it is used: a program that draws nothing does not wait for it.
"""

import io
import re
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.files import write_file
from util.untrusted import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("original", "masked", "reconstructed", "pasted")
GAP, MARGIN = 4, 16  # pixels; the margin stands between two blocks, too
INK, GREY = (24, 26, 30), (98, 104, 112)


def save_png(image: np.ndarray, path: str | Path) -> None:
    """Write (h, w, 3) or (h, w) uint8 as PNG, whole or not at all; makes missing folders.

    Raises OSError as the disk does.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue())


def reconstruction_grid(*stages: np.ndarray, title: str, note: str = "") -> np.ndarray:
    """COLUMNS as (K, H, W, 3) uint8 each -> (h, w, 3) uint8: a row an image, a column a stage.

    From six images on, the second half stands right of the first. Images under 128 px are enlarged
    by a whole factor with nearest neighbours, so that a patch keeps its sharp edge. `note` stands
    small under the title; both are wrapped to the width. Raises ValueError when the stages are not
    four, differ in shape or are no uint8 images.
    """
    shape = np.shape(stages[0])
    equal = all(np.shape(a) == shape and a.dtype == np.uint8 for a in stages)
    if len(stages) != 4 or not equal or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        got = ", ".join(f"{a.shape} {a.dtype}" for a in stages)
        raise ValueError(f"expected uint8, four times the same (K, H, W, 3) above 0; got {got}")
    factor = -(-128 // shape[2])
    enlarged = [a.repeat(factor, axis=1).repeat(factor, axis=2) for a in stages]
    count, height, width = enlarged[0].shape[:3]
    blocks = 2 if count >= 6 else 1  # so that the picture is no taller than a screen
    rows = -(-count // blocks)
    block_width = len(stages) * (width + GAP) - GAP + MARGIN

    total_width = MARGIN + blocks * block_width
    inner = total_width - 2 * MARGIN
    big, small, label = (max(low, width // part) for low, part in ((17, 11), (13, 16), (13, 14)))
    text = [(line, big, INK) for line in _wrap(title, _font(big), inner)]
    text += [(line, small, GREY) for line in _wrap(note, _font(small), inner)]
    text_height = sum(size * 7 // 5 for _, size, _ in text) + (label // 2 if text else 0)
    top = MARGIN + text_height + label * 8 // 5
    total_height = top + rows * (height + GAP) - GAP + MARGIN

    image = Image.new("RGB", (total_width, total_height), "white")
    draw = ImageDraw.Draw(image)
    y = MARGIN
    for line, size, colour in text:
        draw.text((MARGIN, y), line, colour, _font(size))
        y += size * 7 // 5
    for column, (name, stage) in enumerate(zip(COLUMNS, enlarged, strict=True)):
        for i, picture in enumerate(stage):
            block, row = divmod(i, rows)
            x = MARGIN + block * block_width + column * (width + GAP)
            image.paste(Image.fromarray(picture), (x, top + row * (height + GAP)))
            if row == 0:
                draw.text((x, top - label // 2), name, INK, _font(label), anchor="ls")
    return np.array(image)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 under a map (H, W) in 0–1 -> (H, W, 3) uint8.

    The picture turns grey and shows through; heat rises from violet over orange to yellow, which is
    read without telling red from green, and covers more the hotter it is. Raises ValueError when
    the two differ in size.
    """
    from matplotlib import colormaps

    if image.shape != (*heat.shape, 3):
        raise ValueError(f"a map of {heat.shape} for a picture of {image.shape}")
    heat = np.clip(heat, 0, 1)[:, :, None]
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[:, :, None]
    colour = 255 * colormaps["inferno"](0.15 + 0.8 * heat[:, :, 0])[:, :, :3]
    cover = 0.15 + 0.5 * heat
    return ((1 - cover) * grey + cover * colour).round().astype(np.uint8)


def _font_file() -> str:
    """DejaVu Sans: matplotlib ships it and draws with it; Pillow's own font lacks – and ×."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font in pixels."""
    return ImageFont.truetype(_font_file(), size)


@cache
def _glyphs() -> frozenset[int]:
    """The code points that the font has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_file()).get_charmap())


def _drawable(text: str) -> str:
    """`text` with a question mark for what the font lacks; names may come from anywhere."""
    return "".join(c if c.isprintable() and ord(c) in _glyphs() else "?" for c in text)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The lines of `text`, each at most `width` pixels; words longer than a line are broken."""
    for columns in range(min(len(text), 400), 0, -1):
        lines = textwrap.wrap(text, columns)
        if columns == 1 or all(font.getlength(line) <= width for line in lines):
            return lines
    return []


# --------------------------------------------------------------------------------------- curves

# Mid tones: at least 3:1 against white and against near-black.
COLOURS, AXES, LOST = ("#3b82f6", "#d9730d", "#2a9d63", "#9b6cf3"), "#888888", "#e5484d"
ROLES = dict(zip(("train", "test", "test_ema", "val"), COLOURS, strict=True))  # in every panel
POINTS = 1000  # a line: more than a screen shows
PANELS = {  # title: the keys of log.txt that are drawn together
    "Loss": "train_loss|(test|val)_loss(_ema)?",
    "Accuracy, %": "(test|val)_acc1(_ema)?",
    "Mean class accuracy (UAR), %": "(test|val)_uar(_ema)?",
    "Macro-F1, %": "(test|val)_f1(_ema)?",
    "Accuracy on frozen features, %": "probe_.*_acc1",
    "UAR on frozen features, %": "probe_.*_uar",
    "Learning rate": "train_lr",
    "Images a second": "images_per_s",
    "Gradient norm": "train_grad_norm",
}
METRIC = re.compile("_(loss|acc1|uar|f1)(?=_ema$|$)")  # what the title says, the legend need not
PLAIN = {  # of every drawing by matplotlib
    "axes.titleweight": "bold",
    "font.sans-serif": "DejaVu Sans",
    "text.parse_math": False,  # names come from a file; a $ in them is a $
}
STYLE = {
    **PLAIN,
    **dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color"), AXES),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "xtick.bottom", "ytick.left"), False),
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
}


def learning_curves(epochs: list[dict], run: str = "") -> list[str]:
    """One SVG element for every panel of curves the log holds; [] without any.

    `epochs` are the objects of log.txt. The panels are transparent, in mid tones that read on
    light and dark, and refer to nothing outside; their ids are their own if every `run` on a page
    has another name. matplotlib's settings belong to the whole process: not to be called from two
    threads at once.
    """
    # Thinned from the end, so that the newest epoch is always there.
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
    """One set of axes with a line a key; crosses at the foot where a value was not finite."""
    from matplotlib import figure, rc_context, ticker

    xs = [i if (x := number(e.get("epoch"))) is None else x for i, e in enumerate(epochs)]
    finite = np.concatenate([values[np.isfinite(values)] for values in lines.values()])
    low, high = finite.min(), finite.max()
    # A value that is there but no number (NaN, infinity) is marked, not passed over.
    lost = [any(key in e and number(e[key]) is None for key in lines) for e in epochs]
    heading = title
    with rc_context({**STYLE, "svg.hashsalt": title + run}):  # ids no other panel has
        picture = figure.Figure(figsize=(6.1, 3.2))
        axes = picture.add_axes((0.13, 0.11, 0.85, 0.7))  # fixed, so that panels line up
        axes.set_prop_cycle(color=COLOURS)
        dots = {"marker": "o" if len(epochs) <= 30 else None, "ms": 4, "clip_on": False}
        for key, values in lines.items():
            name = METRIC.sub("", key) if re.fullmatch(PANELS.get(title, ""), key) else key
            label = _drawable(f"{name} {short(values[np.isfinite(values)][-1])}")
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
    # Without the prolog, whose DTD is a web address, and the names of groups, alike in all panels.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg ") :])
    return svg.replace("<svg ", f'<svg role="img" aria-label="{heading}" ', 1)


# ------------------------------------------------------------------------------ confusion matrix

SHADES = ("#f4f7fc", "#c3d9f7", "#7fb0f2", "#3b82f6", "#1c4fb4", "#122f73")  # none to all of a row
DPI = 130  # pixels an inch


def confusion_figure(
    matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str
) -> np.ndarray:
    """(K, K) counts, rows: truth, columns: prediction -> (h, w, 3) uint8.

    Each cell says, and is coloured by, its share of the true class in %, its count below. A class
    without images has an empty row.
    """
    from matplotlib import figure, rc_context

    counts = np.asarray(matrix, np.int64)
    k = len(counts)
    cell = min(0.85, max(0.43, 8.5 / k))  # inches a side
    size = min(13, 19 * cell)  # points
    label = max(8, 0.85 * size)
    ink, grey = (tuple(np.array(colour) / 255) for colour in (INK, GREY))
    names = [_drawable(name if len(name) <= 20 else name[:19] + "…") for name in classes]
    tilted = max(map(len, names)) * 0.6 * label > 72 * cell
    tilt = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if tilted else {}
    middles = np.arange(k) + 0.5
    width = round(max(cell * k, 4.3) * DPI)
    heading = "\n".join(_wrap(_drawable(title), _font(round(label * DPI / 60)), width))
    buffer = io.BytesIO()
    with rc_context(PLAIN):
        picture = figure.Figure(figsize=(cell * k, cell * k), dpi=DPI)
        axes = picture.add_axes((0, 0, 1, 1), frame_on=False)  # labels stand outside of it
        _draw_cells(axes, counts, size, ink, grey)
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
        picture.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.2)
    return np.array(Image.open(buffer).convert("RGB"))


def _draw_cells(axes: "Axes", counts: np.ndarray, size: float, ink: tuple, grey: tuple) -> None:
    """The coloured squares of `confusion_figure` and what is written in them."""
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


def short(value: float, digits: int = 4) -> str:
    """A number for the eye: 1,234 · 0.4121 · 1.5e-4."""
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
