"""Draws boxes and labels on pictures, or over them, and names the resulting files."""

import os
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from datasets.transforms import Box
from util.report.drawing import clipped, font

LONG_SIDE = 2048  # pixels, the limit for annotated pictures: enough for viewing
LONGEST_LABEL, LONGEST_NAME = 40, 80  # characters
INK, PAPER = (255, 255, 255), (20, 120, 60)


def annotated(image: np.ndarray, boxes: Sequence[Box], labels: Sequence[str]) -> Image.Image:
    """(H, W, 3) uint8 -> the picture, at most LONG_SIDE large, with a label and frame per box."""
    height, width = image.shape[:2]
    scale = min(1, LONG_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    stroke = max(2, max(size) // 300)
    letters = font(max(12, max(size) // 60))
    for (left, top, w, h), label in zip(boxes, labels, strict=True):
        x0, y0, x1, y1 = (round(v * scale) for v in (left, top, left + w, top + h))
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=PAPER, width=stroke)
        text = clipped(label, LONGEST_LABEL)
        *_, wide, high = draw.textbbox((0, 0), text, letters)
        # The label is above the box, or inside it at the picture's upper edge; at the right edge it
        # is shifted to the left.
        y = y0 - high - stroke if y0 >= high + stroke else y0
        x = max(0, min(x0, size[0] - wide - 2 * stroke))
        draw.rectangle((x, y, x + wide + 2 * stroke, y + high + stroke), fill=PAPER)
        draw.text((x + stroke, y), text, INK, letters)
    return picture


def svg_boxes(image: np.ndarray, boxes: Sequence[Box]) -> str:
    """Frames to lay over a picture (H, W, 3), as SVG; from two on, they are numbered."""
    height, width = image.shape[:2]
    size = max(height, width) / 20  # of the numbers: readable when the picture is small
    colour, shapes = f"rgb{PAPER}", []
    for number, (left, top, w, h) in enumerate(boxes, 1):
        shapes.append(
            f'<rect x="{left}" y="{top}" width="{w}" height="{h}" fill="none" stroke="{colour}" '
            'stroke-width="3" vector-effect="non-scaling-stroke"/>'
        )
        if len(boxes) > 1:
            x, y = left + size / 2, top + size * 0.8
            shapes.append(
                f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="{colour}"/>'
                f'<text x="{x}" y="{y}" font-size="{0.8 * size}" text-anchor="middle" '
                f'fill="rgb{INK}">{number}</text>'
            )
    what = "1 face" if len(boxes) == 1 else f"{len(boxes)} faces"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{what}">'
        f"{''.join(shapes)}</svg>"
    )


def file_name(path: str, number: int, count: int) -> str:
    """A safe file name, unique among `count` pictures because it starts with `number`."""
    stem = os.path.splitext(os.path.basename(path))[0]
    plain, digits = re.sub(r"[^\w-]", "_", stem)[:LONGEST_NAME], len(str(max(0, count - 1)))
    return f"{number:0{digits}}_{plain}.jpg"
