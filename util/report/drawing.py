"""What figures share: font, colours, formatting of text and numbers, conversion to arrays.

matplotlib is imported where it is used, so that programs that draw nothing do not wait for it.
"""

import io
import textwrap
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GREY = (24, 26, 30), (98, 104, 112)
DARK = "#181a1e"  # INK for matplotlib
# Distinguishable with any colour vision (Okabe & Ito 2008); the lightest is darkened for white.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#1b1d21", "#b8a800")
DPI = 130  # pixels per inch
PLAIN = {  # for all matplotlib figures
    "axes.titleweight": "bold",
    "font.sans-serif": "DejaVu Sans",
    "text.parse_math": False,  # a $ in a name is a $
}
CHART = {  # for those on white
    **PLAIN,
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), "#62686f"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("xtick.bottom", "ytick.left", "legend.frameon"), False),
    "axes.edgecolor": "#b9bdc3",
    "axes.titlecolor": DARK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e3e4e6",
    "font.size": 9.5,
}


def pixels(picture: "Figure") -> np.ndarray:
    """A finished matplotlib figure, with what lies outside its axes -> (h, w, 3) uint8."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.2)
    return np.array(Image.open(buffer).convert("RGB"))


def _font_file() -> str:
    """DejaVu Sans, which matplotlib ships and uses; Pillow's own font has no – and ×."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font at a size in pixels."""
    return ImageFont.truetype(_font_file(), size)


@cache
def _glyphs() -> frozenset[int]:
    """The code points in the font."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_file()).get_charmap())


def drawable(text: str) -> str:
    """`text` with a question mark for what the font does not have; names may be anything."""
    return "".join(c if c.isprintable() and ord(c) in _glyphs() else "?" for c in text)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The lines of `text`, each at most `width` pixels; words longer than a line are broken."""
    for columns in range(min(len(text), 400), 0, -1):
        lines = textwrap.wrap(text, columns)
        if columns == 1 or all(font.getlength(line) <= width for line in lines):
            return lines
    return []


def short(value: float, digits: int = 4) -> str:
    """A number to read: 1,234 · 0.4121 · 1.5e-4."""
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def clipped(name: str, most: int = 20) -> str:
    """A drawable name, shortened to `most` characters."""
    return drawable(name if len(name) <= most else name[: most - 1] + "…")
