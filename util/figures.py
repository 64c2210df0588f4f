"""Pictures of a run: reconstructions as one labelled grid, learning curves as SVG.

Everything returns a value (an array, a text) and leaves no plotting state behind, so that it can
be called from any thread of a training process.
"""

import html
import io
import math
import textwrap
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from util.files import write_file

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

COLUMNS = ("original", "masked", "reconstructed", "pasted")
GAP, MARGIN = 4, 16  # pixels
INK, GREY = (24, 26, 30), (98, 104, 112)


def save_png(image: np.ndarray, path: str | Path) -> None:
    """Write (h, w, 3) or (h, w) uint8 as PNG, whole or not at all; makes missing folders.

    Raises OSError as the disk does.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue())


# ------------------------------------------------------------------------------ reconstructions


def reconstruction_grid(
    original: np.ndarray,
    masked: np.ndarray,
    reconstructed: np.ndarray,
    pasted: np.ndarray,
    title: str,
    note: str = "",
) -> np.ndarray:
    """Four times (K, H, W, 3) uint8 -> (h, w, 3) uint8: a row an image, a column a stage.

    Images under 128 px are enlarged by a whole factor with nearest neighbours, so that a patch
    keeps its sharp edge. `note` stands small under the title; both are wrapped to the width.
    Raises ValueError when the four differ in shape or are no uint8 images.
    """
    panels = [np.asarray(a) for a in (original, masked, reconstructed, pasted)]
    shape = panels[0].shape
    if any(a.shape != shape or a.dtype != np.uint8 for a in panels):
        raise ValueError(
            f"expected four equal uint8 arrays, got {[(a.shape, a.dtype) for a in panels]}"
        )
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"expected (K, H, W, 3) with K, H, W > 0, got {shape}")
    factor = -(-128 // max(shape[1:3])) if max(shape[1:3]) < 128 else 1
    panels = [a.repeat(factor, axis=1).repeat(factor, axis=2) for a in panels]
    rows, height, width = panels[0].shape[:3]

    total_width = 2 * MARGIN + len(panels) * width + (len(panels) - 1) * GAP
    big, small, label = (max(low, width // part) for low, part in ((17, 11), (13, 16), (13, 14)))
    text = [(line, big, INK) for line in _wrap(title, _font(big), total_width - 2 * MARGIN)]
    text += [(line, small, GREY) for line in _wrap(note, _font(small), total_width - 2 * MARGIN)]
    text_height = sum(size * 7 // 5 for _, size, _ in text) + (label // 2 if text else 0)
    top = MARGIN + text_height + label * 8 // 5
    total_height = top + rows * height + (rows - 1) * GAP + MARGIN

    canvas = np.full((total_height, total_width, 3), 255, np.uint8)
    lefts = [MARGIN + column * (width + GAP) for column in range(len(panels))]
    for left, panel in zip(lefts, panels, strict=True):
        for row in range(rows):
            y = top + row * (height + GAP)
            canvas[y : y + height, left : left + width] = panel[row]

    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    y = MARGIN
    for line, size, colour in text:
        draw.text((MARGIN, y), line, colour, _font(size))
        y += size * 7 // 5
    fitting = label  # narrow images: the longest label decides
    while fitting > 8 and max(_font(fitting).getlength(name) for name in COLUMNS) > width:
        fitting -= 1
    for left, name in zip(lefts, COLUMNS, strict=True):
        draw.text((left, top - label // 2), name, INK, _font(fitting), anchor="ls")
    return np.array(image)


@cache
def _font(size: int) -> "FreeTypeFont":
    """DejaVu Sans in pixels: matplotlib ships it, while Pillow's own font lacks – and ×."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def _wrap(text: str, font: "FreeTypeFont", width: int) -> list[str]:
    """The lines of `text`, each at most `width` pixels; words longer than a line are broken."""
    for columns in range(min(len(text), 400), 0, -1):
        lines = textwrap.wrap(text, columns)
        if columns == 1 or all(font.getlength(line) <= width for line in lines):
            return lines
    return []


# --------------------------------------------------------------------------------------- curves

# Mid tones: at least 3:1 against white and against near-black.
COLOURS = ("#3b82f6", "#d9730d", "#2a9d63", "#9b6cf3", "#d6498f")
WIDTH, HEIGHT = 440, 230  # of a panel, in its own units
LEFT, RIGHT, TOP, BOTTOM = 58, 424, 46, 200  # the plotted area
POINTS = 1000  # a line: more than a screen shows


def learning_curves(epochs: list[dict]) -> str:
    """One SVG document of every curve the log holds, panels below each other; "" without any.

    `epochs` are the objects of log.txt. Transparent, in mid tones that read on light and dark.
    """
    panels = curve_panels(epochs)
    if not panels:
        return ""
    placed = "".join(
        panel.replace("<svg ", f'<svg y="{i * HEIGHT}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {len(panels) * HEIGHT}" '
        f'style="color:#7a828c">{placed}</svg>'
    )


def curve_panels(epochs: list[dict]) -> list[str]:
    """The same as separate SVG elements, in `currentColor`, for a page that arranges them."""
    # Thinned from the end, so that the newest epoch is always there.
    epochs = epochs[:: -max(1, -(-len(epochs) // POINTS))][::-1]
    xs = [number(entry.get("epoch")) for entry in epochs]
    xs = [float(i) if x is None else x for i, x in enumerate(xs)]
    panels = []
    for title, names, log in _groups(epochs):
        lines = {name: [number(entry.get(name)) for entry in epochs] for name in names}
        # A value that is there but no number (NaN, infinity) is marked, not passed over.
        lost = [
            x
            for x, entry in zip(xs, epochs, strict=True)
            if any(name in entry and number(entry[name]) is None for name in names)
        ]
        panels.append(_panel(title, xs, lines, lost, log))
    return panels


def number(value: object) -> float | None:
    """`value` as a float when it is a finite number of a size one can plot, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 else None  # NaN compares false, too


def short(value: float, digits: int = 4) -> str:
    """A number for the eye: 1,234 · 0.4121 · 1.5e-4."""
    if value == 0:
        return "0"
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 1e3:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _groups(epochs: list[dict]) -> list[tuple[str, list[str], bool]]:
    """(title, keys, whether a logarithmic axis may help) of every panel there is data for."""
    largest: dict[str, float] = {}
    for entry in epochs:
        for key, value in entry.items():
            if (value := number(value)) is not None:
                largest[key] = max(abs(value), largest.get(key, 0.0))
    metrics = [key for key in largest if key.startswith("test_") and key != "test_loss"]
    groups = [
        ("Loss", ["train_loss", "test_loss"], True),
        ("Test, 0–100", [key for key in metrics if 1 < largest[key] <= 100], False),
        ("Test, 0–1", [key for key in metrics if largest[key] <= 1], False),
        ("Test", [key for key in metrics if largest[key] > 100], False),
        ("Learning rate", ["train_lr"], False),
        ("Images a second", ["images_per_s"], False),
        ("Gradient norm", ["train_grad_norm"], True),
    ]
    size = len(COLOURS)
    return [
        (title, present[i : i + size], log)
        for title, keys, log in groups
        if (present := [key for key in keys if key in largest])
        for i in range(0, len(present), size)
    ]


def _panel(
    title: str, xs: list[float], lines: dict[str, list[float | None]], lost: list[float], log: bool
) -> str:
    """One set of axes with a line a key; crosses at the foot where a value was not finite."""
    values = [y for ys in lines.values() for y in ys if y is not None]
    log = log and min(values) > 0 and max(values) > 4 * min(values)
    scale = math.log10 if log else float
    x_low, x_high = _range(min(xs), max(xs))
    y_low, y_high = _range(scale(min(values)), scale(max(values)))

    def at_x(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - x_low) / (x_high - x_low)

    def at_y(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (scale(y) - y_low) / (y_high - y_low)

    x_ticks = [x for x in _ticks(x_low, x_high) if x == round(x) and min(xs) <= x <= max(xs)]
    y_ticks = _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high)
    body = [_axes([(at_x(x), short(x)) for x in x_ticks], [(at_y(y), short(y)) for y in y_ticks])]
    legend = []
    for colour, (name, ys) in zip(COLOURS, lines.items(), strict=False):
        points = [None if y is None else (at_x(x), at_y(y)) for x, y in zip(xs, ys, strict=True)]
        body.append(_line(points, colour))
        last = short(next(y for y in reversed(ys) if y is not None))
        name = name.removesuffix("_loss") if title == "Loss" else name.removeprefix("test_")
        shown = f"{html.escape(name)} " if len(lines) > 1 else ""
        legend.append(f'<tspan dx="10" fill="{colour}">{shown}{last}</tspan>')
    for x in lost:
        cross = f"M{at_x(x) - 3:.1f} {BOTTOM - 7}l6 6m-6 0l6 -6"
        body.append(f'<path d="{cross}" stroke="#e5484d" stroke-width="1.6"/>')
    heading = html.escape(title) + (", log scale" if log else "")
    # Many metrics get a line of their own, in smaller print.
    x, y, anchor, size = (RIGHT, 20, "end", 13) if len(lines) < 3 else (0, 37, "start", 11)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{heading}" '
        'fill="none" font-family="system-ui, sans-serif" font-size="13">'
        f'<text x="8" y="20" font-weight="600" fill="currentColor">{heading}</text>'
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" font-weight="600">'
        f"{''.join(legend)}</text>{''.join(body)}</svg>"
    )


def _axes(x_ticks: list[tuple[float, str]], y_ticks: list[tuple[float, str]]) -> str:
    """Hairlines and labels from (position, label)."""
    grid = "".join(f"M{LEFT} {y:.1f}H{RIGHT}" for y, _ in y_ticks)
    text = [
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        for y, label in y_ticks
    ]
    text += [
        f'<text x="{x:.1f}" y="{BOTTOM + 19}" text-anchor="middle">{label}</text>'
        for x, label in x_ticks
    ]
    return (
        f'<path d="{grid}" stroke="currentColor" stroke-opacity=".2"/>'
        f'<g fill="currentColor" fill-opacity=".8" font-size="11.5">{"".join(text)}</g>'
    )


def _line(points: list[tuple[float, float] | None], colour: str) -> str:
    """A line, interrupted where a point is None; dots as well while there are few of them."""
    path, pen_down = [], False
    for point in points:
        if point:
            path.append(f"{'L' if pen_down else 'M'}{point[0]:.1f} {point[1]:.1f}")
        pen_down = point is not None
    drawn = (
        f'<path d="{"".join(path)}" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>'
    )
    if len(points) <= 30:
        dots = (f'<circle cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="2.6"/>' for p in points if p)
        drawn += f'<g fill="{colour}">{"".join(dots)}</g>'
    return drawn


def _range(low: float, high: float) -> tuple[float, float]:
    """(low, high) a little apart even when the values are all equal."""
    if high - low > max(1e-9 * abs(low), 1e-9 * abs(high), 1e-30):
        return low, high
    half = 0.1 * abs(low) if abs(low) > 1e-30 else 1.0
    return low - half, high + half


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / 2))
    counts = {m * power: math.floor((high - low) / (m * power)) for m in (1, 2, 5, 10)}
    step = next(s for s, n in counts.items() if n <= 6)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers with their decimal logarithm in [low, high]: the sparsest set of over two."""
    stride = max(1, int(high - low) // 6)
    powers = range(math.floor(low), math.ceil(high) + 1, stride)
    ticks: list[float] = []
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [m * 10.0**e for e in powers for m in mantissas]
        ticks = [t for t in ticks if low <= math.log10(t) <= high]
        if len(ticks) >= 3:
            break
    return ticks
