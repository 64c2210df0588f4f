"""Figures made of images: reconstructions, and what a model looks at.

All functions return arrays and leave no plotting state behind.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from util.files import write_file
from util.report.drawing import GREY, INK, clipped, drawable, font, wrap

COLUMNS = ("original", "masked", "reconstructed")
GAP, MARGIN = 4, 16  # pixels; the margin is also between two blocks
SIDE = 112  # least side length of an image where many are shown; less than twice this
WRONG = (184, 66, 0)  # of wrong predictions, which a cross marks as well


def save_png(image: np.ndarray, path: str | Path) -> None:
    """Write (h, w, 3) or (h, w) uint8 as PNG, completely or not at all; creates missing folders.

    Raises OSError if the disk fails.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue())


def reconstruction_grid(*stages: np.ndarray, title: str, note: str = "") -> np.ndarray:
    """COLUMNS as (K, H, W, 3) uint8 each -> (h, w, 3) uint8: a row per image, a column per stage.

    From six images on, the second half is placed right of the first. Images under 128 px are
    enlarged by a whole factor with nearest neighbours, so that patches keep sharp edges. `note` is
    set small under the title; both are wrapped to the width. Raises ValueError unless the stages
    are three arrays of uint8 images of equal shape.
    """
    _check(stages, len(COLUMNS))
    blocks = 2 if len(stages[0]) >= 6 else 1  # so that the picture is no taller than a screen
    return _grid(
        COLUMNS, [_enlarged(stage) for stage in stages], title=title, note=note, blocks=blocks
    )


def ratio_grid(
    original: np.ndarray,
    by_ratio: Sequence[tuple[float, np.ndarray, np.ndarray]],
    title: str,
    note: str = "",
) -> np.ndarray:
    """Images, masked at several ratios, and what a model makes of them.

    All (K, H, W, 3) uint8 -> (h, w, 3) uint8: a row per image, two columns per ratio. Raises
    ValueError as `reconstruction_grid` does.
    """
    names, stages = ["original"], [original]
    for ratio, masked, filled in by_ratio:
        names += [f"{100 * ratio:.3g} % masked", "filled in"]
        stages += [masked, filled]
    _check(stages, len(stages))
    return _grid(names, [_shrunk(_enlarged(stage)) for stage in stages], title, note)


class Verdict(NamedTuple):
    """A model's prediction for an image."""

    true: str
    predicted: str
    probability: float  # of that, 0–1


def attention_grid(
    images: np.ndarray,
    overlays: np.ndarray | None,
    verdicts: Sequence[Verdict],
    title: str,
    note: str = "",
    across: int = 3,
) -> np.ndarray:
    """Faces beside what the model looks at, (K, H, W, 3) uint8 each -> (h, w, 3) uint8.

    Below each pair are the predicted class with its probability, and the true one; a cross marks a
    wrong prediction. Without `overlays`, faces stand alone, twice as many in a row as pairs.
    `across`: pairs in a row, if there are more than four. Raises ValueError as
    `reconstruction_grid` does.
    """
    stages = [images] if overlays is None else [images, overlays]
    _check(stages, len(stages))
    pairs = np.concatenate([_shrunk(_enlarged(stage)) for stage in stages], axis=2)
    count, height, width = pairs.shape[:3]
    across = min(count, (2 if count <= 4 else across) * (3 - len(stages)))
    rows, size, caption = -(-count // across), 14, 44
    total_width = MARGIN + across * (width + MARGIN)
    heading, top = _heading(title, note, total_width)
    top += MARGIN // 2
    total_height = top + rows * (height + caption + MARGIN)
    image, draw = _sheet(total_width, total_height, heading)
    for i, (pair, verdict) in enumerate(zip(pairs, verdicts, strict=True)):
        row, column = divmod(i, across)
        x = MARGIN + column * (width + MARGIN)
        y = top + row * (height + caption + MARGIN)
        image.paste(Image.fromarray(pair), (x, y))
        right = verdict.true == verdict.predicted
        lines = [
            (f"{'✓' if right else '✗'} ", verdict.predicted, f" {100 * verdict.probability:.0f} %"),
            ("true: ", verdict.true, ""),
        ]
        for n, (before, name, after) in enumerate(lines):
            colour = GREY if n else INK if right else WRONG
            text = _fitting(before, name, after=after, size=size, width=width)
            draw.text((x, y + height + 5 + n * 19), text, colour, font(size))
    return np.array(image)


def _fitting(before: str, name: str, after: str, size: int, width: int) -> str:
    """A line of text, with `name` shortened if it would be wider than `width`."""
    for most in range(min(len(name), 60), 0, -1):
        text = before + clipped(name, most) + after
        if font(size).getlength(text) <= width:
            return text
    return before + "…" + after


def _check(stages: Sequence[np.ndarray], count: int) -> None:
    """Raises ValueError unless these are `count` batches of uint8 images of equal shape."""
    shape = np.shape(stages[0])
    equal = all(np.shape(a) == shape and a.dtype == np.uint8 for a in stages)
    if len(stages) != count or not equal or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        got = ", ".join(f"{np.shape(a)} {a.dtype}" for a in stages)
        raise ValueError(f"expected {count} arrays of uint8, all (K, H, W, 3) and K > 0; got {got}")


def _enlarged(stage: np.ndarray) -> np.ndarray:
    """Images enlarged by a whole factor to a side length of at least 128 px."""
    factor = -(-128 // stage.shape[2])
    return stage.repeat(factor, axis=1).repeat(factor, axis=2)


def _shrunk(stage: np.ndarray) -> np.ndarray:
    """Images reduced by a whole factor, by averaging, to a side of less than 2 × SIDE px."""
    factor = max(1, stage.shape[2] // SIDE)
    return np.stack([np.asarray(Image.fromarray(picture).reduce(factor)) for picture in stage])


def _grid(
    names: Sequence[str], stages: Sequence[np.ndarray], title: str, note: str, blocks: int = 1
) -> np.ndarray:
    """Columns of (K, H, W, 3) images under their names, in `blocks` side by side."""
    count, height, width = stages[0].shape[:3]
    rows = -(-count // blocks)
    block_width = len(stages) * (width + GAP) - GAP + MARGIN
    total_width = MARGIN + blocks * block_width
    heading, top = _heading(title, note, total_width, width)
    label = max(13, width // 14)
    while label > 8 and max(font(label).getlength(name) for name in names) > width:
        label -= 1
    top += (label // 2 if heading else 0) + label * 8 // 5
    total_height = top + rows * (height + GAP) - GAP + MARGIN
    image, draw = _sheet(total_width, total_height, heading)
    for column, (name, stage) in enumerate(zip(names, stages, strict=True)):
        for i, picture in enumerate(stage):
            block, row = divmod(i, rows)
            x = MARGIN + block * block_width + column * (width + GAP)
            image.paste(Image.fromarray(picture), (x, top + row * (height + GAP)))
            if row == 0:
                draw.text((x, top - label // 2), name, INK, font(label), anchor="ls")
    return np.array(image)


def _heading(
    title: str, note: str, total_width: int, width: int = 0
) -> tuple[list[tuple[str, int, tuple]], int]:
    """Lines with size and colour, and where they end; larger text over images of more `width`."""
    big, small = (max(low, width // part) for low, part in ((17, 11), (13, 16)))
    inner = total_width - 2 * MARGIN
    lines = [(line, big, INK) for line in wrap(drawable(title), font(big), inner)]
    lines += [(line, small, GREY) for line in wrap(drawable(note), font(small), inner)]
    return lines, MARGIN + sum(size * 7 // 5 for _, size, _ in lines)


def _sheet(
    width: int, height: int, heading: list[tuple[str, int, tuple]]
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white image with a heading, and what draws on it."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    y = MARGIN
    for line, size, colour in heading:
        draw.text((MARGIN, y), line, colour, font(size))
        y += size * 7 // 5
    return image, draw


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 under a map (H, W) in 0–1 -> (H, W, 3) uint8.

    The picture turns grey and shows through. Heat rises from violet over orange to yellow, readable
    without distinguishing red from green, and covers more the hotter it is. Raises ValueError if
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
