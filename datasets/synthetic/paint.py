"""Painting in head units: smooth curves, and a canvas that poses, masks and blurs shapes.

*Head units*: the origin is between eyes and nose, x points to the image's right, y down; half a
face is about 0.85 wide, and the chin is at y = 1.15. A shape is an (n, 2) array of points. `Canvas`
rotates shapes by the pose (yaw, pitch, roll), places them on the image and paints them, so that a
face is the same at every image size.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDES = (-1, 1)
DARK = np.array([26.0, 17.0, 16.0])
WHITE = np.array([255.0, 252.0, 246.0])


def mix(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """The colour `t` of the way from `a` to `b`."""
    return a + (b - a) * t


@lru_cache(maxsize=64)
def _spline(m: int, n: int, closed: bool) -> np.ndarray:
    """(n, m): the matrix that samples the Catmull-Rom curve through m points at n positions."""
    u = np.linspace(0, m if closed else m - 1, n, endpoint=not closed)
    i = np.minimum(u.astype(int), m - 1 if closed else m - 2)
    f = u - i
    weights = (
        -f / 2 + f**2 - f**3 / 2,
        1 - 2.5 * f**2 + 1.5 * f**3,
        f / 2 + 2 * f**2 - 1.5 * f**3,
        -(f**2) / 2 + f**3 / 2,
    )
    basis = np.zeros((n, m))
    for k, weight in enumerate(weights):
        j = i - 1 + k
        np.add.at(basis, (np.arange(n), j % m if closed else j.clip(0, m - 1)), weight)
    return basis


def curve(points: Sequence | np.ndarray, n: int = 24, closed: bool = False) -> np.ndarray:
    """(…, n, 2): a smooth curve through the points (…, m, 2)."""
    points = np.asarray(points, dtype=float)
    return _spline(points.shape[-2], n, closed) @ points


@lru_cache(maxsize=16)
def _circle(n: int) -> np.ndarray:
    angle = np.linspace(0, 2 * math.pi, n, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def ellipse(x: float, y: float, rx: float, ry: float, n: int = 22) -> np.ndarray:
    """(n, 2): the outline of an ellipse."""
    return _circle(n) * (rx, ry) + (x, y)


@lru_cache(maxsize=64)
def _profile(n: int, begin: float, end: float) -> np.ndarray:
    """(n,): half the width along a stroke of width 1."""
    t = np.linspace(0, 1, n)
    ends = begin + (end - begin) * t
    return (ends + (1 - ends) * np.sin(math.pi * t).clip(0) ** 0.6) / 2


def ribbon(line: np.ndarray, width: float, taper: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """(2n, 2): a stroke along a line (n, 2); at its ends it has the share `taper` of `width`."""
    along = np.empty_like(line)
    along[1:-1] = line[2:] - line[:-2]
    along[0], along[-1] = line[1] - line[0], line[-1] - line[-2]
    half = width * _profile(len(line), *taper) / (np.hypot(along[:, 0], along[:, 1]) + 1e-9)
    side = along[:, ::-1] * (-1.0, 1.0) * half[:, None]
    return np.concatenate([line + side, (line - side)[::-1]])


def mirrored(points: Sequence | np.ndarray) -> list[np.ndarray]:
    """The shape on the image's left and right; `points` are those of the right one."""
    points = np.asarray(points, dtype=float)
    return [points * (side, 1) for side in SIDES]


def surface(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far the face protrudes at (x, y), in head units."""
    return 0.62 * np.sqrt(np.maximum(0.0, 1 - (x / 1.02) ** 2 - (y / 1.42) ** 2))


class Canvas:
    """An RGB image, and the pose that maps head units to its pixels.

    Angles are in radians; `scale` (of one head unit) and `shift` (2,) are shares of the image's
    side length.
    """

    def __init__(
        self,
        image: Image.Image,
        yaw: float,
        pitch: float,
        roll: float,
        scale: float,
        shift: np.ndarray,
    ):
        self.image = image
        self.size = image.width
        self.figure = Image.new("L", image.size)  # where head, hair and body are
        self.unit = scale * self.size  # pixels per head unit
        self.centre = (0.5 + shift) * self.size
        self.turn = math.cos(yaw), math.sin(yaw)
        self.nod = math.cos(pitch), math.sin(pitch)
        c, s = math.cos(roll) * self.unit, math.sin(roll) * self.unit
        self.tilt = math.cos(roll), math.sin(roll)
        self.roll = np.array([[c, s], [-s, c]])
        self.supersample = 3 if self.size <= 320 else 2

    def place(self, points: np.ndarray, depth: float | np.ndarray | None = None) -> np.ndarray:
        """Head units (n, 2) → pixels (n, 2); `depth` None: on the face's surface."""
        x, y = points[:, 0], points[:, 1]
        z = surface(x, y) if depth is None else depth
        turned = x * self.turn[0] + z * self.turn[1]
        z = z * self.turn[0] - x * self.turn[1] * 0.5
        nodded = y * self.nod[0] + z * self.nod[1]
        posed = np.empty((len(points), 2))
        posed[:, 0], posed[:, 1] = turned, nodded
        return posed @ self.roll + self.centre

    def mask(
        self,
        shapes: list[np.ndarray],
        blur: float = 0.0,
        opacity: float = 1.0,
        depth: float | np.ndarray | None = None,
        line: float = 0.0,
        clip: Image.Image | None = None,
    ) -> tuple[Image.Image, tuple[int, int, int, int]] | None:
        """The grey mask of the shapes and its box on the image; None if nothing would be visible.

        `blur` and `line` are in head units; `line` is a width, and makes the shapes open lines.
        """
        level = round(255 * min(opacity, 1.0))
        if level <= 0:
            return None
        pixels = self.place(np.concatenate(shapes), depth)
        radius = blur * self.unit
        margin = 2.5 * radius + line * self.unit + 2
        x0, y0 = np.maximum(np.floor(pixels.min(0) - margin), 0).astype(int).tolist()
        x1, y1 = np.minimum(np.ceil(pixels.max(0) + margin), self.size).astype(int).tolist()
        if x1 <= x0 or y1 <= y0:
            return None
        # A strongly blurred shape has no detail: it is drawn small, which makes blurring cheap.
        zoom = float(self.supersample) if radius < 1.5 else min(1.0, 2.5 / radius)
        width, height = math.ceil((x1 - x0) * zoom), math.ceil((y1 - y0) * zoom)
        layer = Image.new("L", (width, height))
        draw = ImageDraw.Draw(layer)
        pixels = (pixels - (x0, y0)) * zoom
        start = 0
        for shape in shapes:
            part = pixels[start : start + len(shape)].ravel().tolist()
            start += len(shape)
            if line:
                draw.line(part, fill=level, width=max(1, round(line * self.unit * zoom)))
            else:
                draw.polygon(part, fill=level)
        if zoom > 1:
            layer = layer.reduce(self.supersample)
        if radius > 0.3:
            layer = layer.filter(ImageFilter.GaussianBlur(radius * min(zoom, 1.0)))
        box = (x0, y0, x1, y1)
        if layer.size != (x1 - x0, y1 - y0):
            layer = layer.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        if clip is not None:
            layer = ImageChops.multiply(layer, clip.crop(box))
        return layer, box

    def paint(
        self, shapes: list[np.ndarray], colour: np.ndarray, solid: bool = False, **how: object
    ) -> None:
        """Paint a colour over the shapes (options: see `mask`); `solid` adds them to the figure."""
        made = self.mask(shapes, **how)
        if made is not None:
            ink = tuple(int(c) for c in np.clip(colour, 0, 255))
            self.image.paste(ink, made[1], made[0])
            if solid:
                self.figure.paste(255, made[1], made[0])

    def whole_mask(self, shapes: list[np.ndarray], **how: object) -> Image.Image:
        """The mask of the shapes at the size of the image, to clip other shapes with."""
        whole = Image.new("L", self.image.size)
        made = self.mask(shapes, **how)
        if made is not None:
            whole.paste(made[0], made[1])
        return whole
