"""What surrounds a face in a picture: background, light, objects in front of it, the camera."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from datasets.synthetic.paint import WHITE, Canvas, curve, ellipse, mix, ribbon

GRID = 64  # side length of the shading in cells: few are enough, because it is smooth
BACKGROUNDS = ("gradient", "shapes", "texture")
OCCLUSIONS = ("none", "hand", "mask", "bar", "strand", "sunglasses")


@dataclass(frozen=True)
class Condition:
    """How the picture was taken, independent of identity and expression."""

    yaw: float
    pitch: float
    roll: float
    scale: float  # of a head unit, as a share of the image's side length
    shift: np.ndarray  # (2,) share of the image's side length
    gaze: np.ndarray  # (2,) head units
    light: np.ndarray  # (3,) unit vector towards the light
    contrast: float
    brightness: float
    warmth: float
    blur: float  # share of the image's side length
    noise: float  # standard deviation, grey levels
    background: str
    colours: np.ndarray  # (3, 3) RGB of the background
    occlusion: str
    grain: np.ndarray  # (16, 4) in [0, 1): varies the shapes of background and occlusion


def background(condition: Condition, size: int) -> Image.Image:
    """A smooth picture behind the head; RGB (size, size)."""
    a, b, c = condition.colours
    y, x = np.mgrid[0:32, 0:32] / 31.0
    g = condition.grain
    t = (x - 0.5) * (2 * g[0, 0] - 1) + (y - 0.5) * (2 * g[0, 1] - 1) + 0.5
    image = a + (b - a) * t[..., None].clip(0, 1)
    if condition.background == "shapes":
        for u, v, r, k in g[1:9]:
            blob = 1 / (1 + np.exp(60 * ((x - u) ** 2 + (y - v) ** 2 - (0.04 + 0.2 * r) ** 2)))
            image = image + (mix(c, b, k) - image) * blob[..., None] * 0.8
    elif condition.background == "texture":
        wave = sum(
            np.sin(2 * np.pi * ((1 + 7 * u) * x + (1 + 7 * v) * y + r)) for u, v, r, _ in g[1:5]
        )
        image = image + (c - image) * (0.4 + 0.07 * wave[..., None]).clip(0, 1)
    image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def occlude(canvas: Canvas, condition: Condition, skin: np.ndarray, hair: np.ndarray) -> None:
    """Put a hand, a surgical mask, a bar or a strand of hair in front of the face."""
    g = condition.grain[9:]
    side = 1 if g[0, 0] < 0.5 else -1
    if condition.occlusion == "hand":
        _hand(canvas, skin, side, g)
    elif condition.occlusion == "mask":
        cloth = mix(np.array([120.0, 175.0, 200.0]), WHITE, g[0, 1])
        right = [(0.40, 0.18), (0.72, 0.30), (0.64, 0.85), (0.30, 1.18)]
        shape = curve([(-x, y) for x, y in right[::-1]] + [(0.0, 0.12), *right], 40)
        canvas.paint([shape], cloth)
        for y in (0.42, 0.58, 0.74):
            pleat = curve([(-0.6, y), (0.0, y + 0.06), (0.6, y)], 14)
            canvas.paint([ribbon(pleat, 0.03)], cloth * 0.6, blur=0.015, opacity=0.5)
    elif condition.occlusion == "bar":
        x, y, lean = 2.0 * g[0, 1] - 1.0, 1.6 * g[0, 2] - 0.5, g[0, 3] - 0.5
        along = np.array([np.cos(lean * 5), np.sin(lean * 5)])
        ends = np.array([x, y]) + np.outer((-2.0, 0.0, 2.0), along)
        canvas.paint(
            [ribbon(ends, 0.16 + 0.16 * g[1, 0], (1, 1))],
            condition.colours[2],
            depth=0.3,
            blur=0.025,
        )
    elif condition.occlusion == "strand":
        for k in range(3):
            x = side * (0.3 + 0.25 * g[1, 0] + 0.06 * k)
            line = curve(
                [
                    (0.2 * side, -1.1),
                    (x, -0.5),
                    (x + 0.1 * side, 0.1),
                    (x - 0.05 * side, 0.5 + 0.3 * g[k, 1]),
                ],
                16,
            )
            canvas.paint(
                [ribbon(line, 0.075, (0.6, 0.0))], hair * (0.6 + 0.2 * k), blur=0.008, opacity=0.9
            )


def _hand(canvas: Canvas, skin: np.ndarray, side: int, g: np.ndarray) -> None:
    """Fingers that come from below and cover one cheek or the mouth."""
    reach, x0 = 0.75 - 0.6 * g[0, 1], side * (0.15 + 0.45 * g[0, 2])
    shade, light = skin * (0.62, 0.5, 0.48), mix(skin, WHITE, 0.2)
    palm = curve(
        [(x0 - 0.35, 2.2), (x0 - 0.36, 1.3), (x0, 1.05), (x0 + 0.36, 1.3), (x0 + 0.35, 2.2)]
    )
    canvas.paint([palm], skin * 0.95, depth=0.35)
    for k in (3, 0, 2, 1):
        foot = (x0 + 0.19 * (k - 1.5), 1.35)
        tip = (x0 + 0.21 * (k - 1.5) - side * 0.12, reach + 0.09 * abs(k - 1.4))
        line = curve([foot, (np.array(foot) + tip) / 2 + (0.02, 0), tip], 12)
        tube = ribbon(line, 0.19, (1.0, 0.45))
        finger = [tube, ellipse(tip[0], tip[1] + 0.02, 0.075, 0.08)]
        canvas.paint(
            [part + 0.03 for part in finger],
            shade * 0.6,
            depth=0.35,
            blur=0.03,
            opacity=0.6,
        )
        canvas.paint(finger, shade, depth=0.35)
        canvas.paint([ribbon(line - (0.01, 0), 0.14, (1.0, 0.6))], skin, depth=0.35, blur=0.025)
        canvas.paint(
            [ellipse(tip[0], tip[1] + 0.02, 0.045, 0.055)],
            light,
            depth=0.35,
            blur=0.01,
            opacity=0.7,
        )


def light_up(canvas: Canvas, condition: Condition, relief: np.ndarray) -> np.ndarray:
    """Light the painted image by the condition: float32 (size, size, 3), in grey levels.

    `relief` (B, 5) has the bumps of the face: x, y, two widths and height, in head units.
    """
    size, unit = canvas.size, canvas.unit
    cell = size / GRID
    at = (np.arange(GRID) + 0.5) * cell
    u, v = np.meshgrid((at - canvas.centre[0]) / unit, (at - canvas.centre[1]) / unit)
    u, v = u * canvas.tilt[0] + v * canvas.tilt[1], v * canvas.tilt[0] - u * canvas.tilt[1]
    r = (u / 1.02) ** 2 + ((v + 0.03) / 1.38) ** 2
    height = 0.85 * np.sqrt(np.maximum(0.0, 1.10 - r))
    centres = canvas.place(relief[:, :2]) / cell - 0.5
    widths = relief[:, 2:4] * unit / cell
    cells = np.arange(GRID)
    bumps = [
        np.exp(-(((cells - centres[:, k : k + 1]) / widths[:, k : k + 1]) ** 2)) for k in (0, 1)
    ]
    height = height + (bumps[1] * relief[:, 4:]).T @ bumps[0]
    dy, dx = np.gradient(height, cell / unit)
    up = 1 / np.sqrt(dx**2 + dy**2 + 1)
    lx, ly, lz = condition.light
    facing = np.maximum(0.0, (lz - lx * dx - ly * dy) * up)
    on_head = ((1.25 - r) / 0.4).clip(0, 1)
    shade = 1 + on_head * condition.contrast * (facing / lz - 1)
    across = (u * lx + v * ly) * 0.10 * condition.contrast
    shade = ((shade + across) * condition.brightness).clip(0.25, 1.6)
    half = np.array([lx, ly, lz + 1]) / np.sqrt(2 + 2 * lz)
    glance = np.maximum(0.0, (half[2] - half[0] * dx - half[1] * dy) * up) ** 40 * on_head
    pixels = np.asarray(canvas.image, dtype=np.float32)
    # Light that passes through skin comes out red, so blue darkens most in shadows.
    power, warm = (0.88, 1.0, 1.08), (1 + condition.warmth, 1.0, 1 - condition.warmth)
    planes = [_upscale(shade**p * w, size) for p, w in zip(power, warm, strict=True)]
    shine = _upscale(glance * 22 * condition.contrast * condition.brightness, size)
    lit = pixels * np.stack(planes, -1) + shine[..., None]
    figure = np.asarray(canvas.figure, dtype=np.float32)[..., None] / 255
    lit = pixels + (lit - pixels) * figure
    over = np.maximum(lit - 175, 0)  # compresses highlights as film does: bright skin keeps detail
    return lit - over * over / (over + 150)


def _upscale(plane: np.ndarray, size: int) -> np.ndarray:
    """(GRID, GRID) → float32 (size, size)."""
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def photograph(lit: np.ndarray, condition: Condition, rng: np.random.Generator) -> np.ndarray:
    """Apply blur and sensor noise: float32 (size, size, 3) → uint8."""
    size = lit.shape[0]
    image = Image.fromarray(lit.clip(0, 255).astype(np.uint8))
    if condition.blur * size > 0.3:
        image = image.filter(ImageFilter.GaussianBlur(condition.blur * size))
    grain = rng.standard_normal((size, size, 1), dtype=np.float32) * condition.noise
    tint = rng.standard_normal((size // 2, size // 2, 3), dtype=np.float32) * condition.noise
    tint = np.repeat(np.repeat(tint, 2, 0), 2, 1)
    noisy = np.asarray(image, dtype=np.float32) + grain
    noisy[: len(tint), : len(tint)] += 0.3 * tint
    return np.clip(noisy + 0.5, 0, 255).astype(np.uint8)
