"""Pictures of a run: reconstructions as one labelled grid, learning curves as SVG.

Everything returns a value (an array, texts) and leaves no plotting state behind. matplotlib is
imported where it is used: a program that draws nothing does not wait for it.
"""

import io
import re
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.files import write_file

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


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans in pixels: matplotlib ships it, while Pillow's own font lacks – and ×."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


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
POINTS = 1000  # a line: more than a screen shows
STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color"), AXES),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "xtick.bottom", "ytick.left"), False),
    "axes.titleweight": "bold",
    "font.sans-serif": "DejaVu Sans",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names come from a file; a $ in them is a $
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
    panels = {
        "Loss": ["train_loss", "test_loss"],
        "Learning rate": ["train_lr"],
        "Images a second": ["images_per_s"],
        "Gradient norm": ["train_grad_norm"],
    }
    for key in series:  # metrics that share an axis must share a scale
        if key.startswith("test_") and key != "test_loss":
            largest = np.nanmax(np.abs(series[key]))
            title = "Test, 0–1" if largest <= 1 else "Test, 0–100" if largest <= 100 else "Test"
            panels.setdefault(title, []).append(key)
    return [
        _panel(title, {key: series[key] for key in keys if key in series}, epochs, run)
        for title, keys in panels.items()
        if series.keys() & keys
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
            # The font lacks most of what is not ASCII.
            label = re.sub("[^ -~]", "?", f"{key} {short(values[np.isfinite(values)][-1])}")
            axes.plot(xs, values, label=label, **dots)
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


def number(value: object) -> float | None:
    """`value` as a float when it is a finite number of a size one can plot, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 else None  # NaN compares false, too


def short(value: float, digits: int = 4) -> str:
    """A number for the eye: 1,234 · 0.4121 · 1.5e-4."""
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
