"""Generates synthetic faces: data to pre-train and fine-tune on without any download.

An image is a function of (seed, split, index). Its identity comes from its split's pool, its
expression from balanced labels, and its condition – pose, light, background, occlusion, camera –
from the position alone, so that the condition does not reveal the label. An expression is a set of
facial action units after EMFACS (Friesen & Ekman 1983), with varying intensity and slight
asymmetry; each unit is jittered independently, and none is quite at rest.

    python -m datasets.synthetic --output docs/synthetic_faces.png
"""

import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.labels import EXPRESSIONS
from datasets.synthetic.face import Actions, draw_face, relief
from datasets.synthetic.identity import STYLES, Identity, draw_glasses
from datasets.synthetic.paint import Canvas, mix
from datasets.synthetic.scene import (
    BACKGROUNDS,
    OCCLUSIONS,
    Condition,
    background,
    light_up,
    occlude,
    photograph,
)
from util.errors import BadInput
from util.seeding import FACE, IDENTITY, generator

VERSION = 2  # of the drawing code: increase it whenever the image at any position changes
KEPT_BYTES = 128 * 2**20  # of cached faces, per process
SPLITS = ("train", "test")
POOL = 5_000  # identities per split
LABELS = 2  # in the FACE stream, major positions below this are for images, the others for labels
CLASSES = len(EXPRESSIONS)

UNITS = (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 16, 17, 20, 23, 25, 26, 43)
# For each expression, action unit → intensity; in about half of the images, when the lips part, the
# second set is added.
RECIPES: tuple[tuple[dict[int, float], dict[int, float]], ...] = (
    ({}, {}),
    ({6: 0.8, 12: 1.0}, {25: 0.9, 26: 0.12}),
    ({1: 1.0, 4: 0.45, 15: 1.0, 17: 0.5, 43: 0.3}, {25: 0.25, 17: -0.3}),
    ({1: 0.9, 2: 0.9, 5: 0.8, 25: 0.4, 26: 0.7}, {26: 0.3}),
    ({1: 0.9, 2: 0.4, 4: 0.6, 5: 0.9, 20: 0.9, 25: 0.5}, {26: 0.25, 16: 0.6}),
    ({4: 0.4, 7: 0.4, 9: 1.0, 10: 0.9, 15: 0.3, 17: 0.3}, {16: 0.7, 25: 0.6, 17: -0.3}),
    ({4: 1.0, 5: 0.4, 7: 0.6, 17: 0.3, 23: 0.9}, {10: 0.5, 16: 0.9, 20: 0.3, 23: -0.6, 25: 0.9}),
    ({43: 0.15}, {}),
)
ONE_SIDED = {12: 0.65, 14: 1.0, 2: 0.25}  # contempt: one corner tightens, and rises a little

SKINS = np.array(
    [
        (238, 197, 168), (234, 189, 156), (228, 182, 146), (214, 166, 128), (190, 138, 100),
        (158, 108, 74), (124, 82, 56), (92, 60, 42), (66, 44, 34),
    ],
    dtype=float,
)  # fmt: skip
HAIRS = np.array(
    [(30, 24, 24), (52, 36, 28), (88, 58, 38), (130, 88, 52), (196, 152, 92), (150, 70, 36),
     (150, 146, 142), (214, 210, 204)], dtype=float)  # fmt: skip
IRISES = np.array(
    [(72, 44, 26), (104, 68, 36), (126, 104, 52), (88, 118, 82), (96, 128, 156), (120, 130, 138)],
    dtype=float)  # fmt: skip


def _pick(rng: np.random.Generator, odds: dict[str, float]) -> str:
    """A random one of the names, by their odds."""
    weight = np.cumsum(list(odds.values()))
    return list(odds)[int(np.searchsorted(weight, rng.random() * weight[-1], side="right"))]


def _between(palette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random colour (3,), interpolated along a palette (n, 3)."""
    place = rng.random() * (len(palette) - 1)
    low = min(int(place), len(palette) - 2)
    return mix(palette[low], palette[low + 1], place - low)


def sample_identity(seed: int, number: int) -> Identity:
    """The identity with a number; its attributes are sampled from the IDENTITY stream alone."""
    rng = generator(IDENTITY, seed, 0, number)

    def around(spread: float) -> float:
        return float(np.clip(rng.normal(1, spread), 1 - 2.2 * spread, 1 + 2.2 * spread))

    skin = _between(SKINS, rng) * (1 + rng.normal(0, 0.02, 3))
    pale = float(skin.mean()) / 220
    masculine, age = rng.random(), rng.random() ** 1.6
    # Light hair and eyes are rarer on dark skin; grey hair comes with age.
    shades = HAIRS[: 6 if pale > 0.7 else 3]
    hair = shades[rng.integers(len(shades))] * (1 + rng.normal(0, 0.05, 3))
    grey = max(0.0, age - 0.55) * 2 * rng.random()
    irises = IRISES[: 6 if pale > 0.75 else 3]
    styles = dict(zip(STYLES, (0.4, 0.7, 1.2, 0.5, 0.2, 0.1, 0.8, 0.3), strict=True))
    if masculine < 0.5:
        styles = dict(zip(STYLES, (0.03, 0.12, 0.4, 0.4, 1.6, 0.8, 0.8, 1.0), strict=True))
    beards = {"none": 1.0, "stubble": 0.5, "moustache": 0.25, "goatee": 0.25, "full": 0.5}
    beard = _pick(rng, beards)
    return Identity(
        skin=skin.clip(0, 255),
        hair_colour=mix(hair, HAIRS[6], grey),
        eye_colour=irises[rng.integers(len(irises))] * (1 + rng.normal(0, 0.08, 3)),
        cloth=rng.uniform(30, 220, 3),
        width=around(0.05),
        jaw=around(0.05) * (0.96 + 0.1 * masculine),
        chin=around(0.02),
        eye_size=around(0.06) * (1.06 - 0.1 * masculine),
        eye_gap=around(0.03),
        eye_tilt=float(rng.normal(0.012, 0.015)),
        brow_thick=around(0.18) * (0.75 + 0.5 * masculine),
        brow_height=around(0.08),
        nose_width=around(0.11),
        nose_length=around(0.06),
        lip_full=around(0.18),
        lip_red=float(rng.uniform(0.1, 0.45) + (masculine < 0.5) * rng.uniform(0, 0.4)),
        mouth_width=around(0.07),
        rest_corner=float(rng.normal(0.008, 0.018)),
        hair=_pick(rng, styles),
        part=float(rng.uniform(-0.35, 0.35)),
        beard=beard if masculine > 0.5 else "none",
        glasses=_pick(rng, {"none": 0.8, "round": 0.1, "square": 0.1}),
        age=float(age),
        grain=rng.random((160, 4)),
    )


def sample_condition(rng: np.random.Generator) -> Condition:
    """Sample how a picture is taken, independently of identity and label."""
    light = np.array([rng.normal(0, 0.55), rng.normal(-0.45, 0.3), 1.0])
    blurred, noisy = rng.random(2)
    odds = dict(zip(OCCLUSIONS, (0.83, 0.05, 0.02, 0.03, 0.05, 0.02), strict=True))
    return Condition(
        yaw=float(np.clip(rng.normal(0, 0.16), -0.42, 0.42)),
        pitch=float(np.clip(rng.normal(0, 0.09), -0.22, 0.22)),
        roll=float(np.clip(rng.normal(0, 0.09), -0.3, 0.3)),
        scale=float(rng.uniform(0.33, 0.40)),
        shift=rng.normal(0, 0.02, 2) + np.array([0, 0.035]),
        gaze=rng.normal(0, 1, 2) * (0.022, 0.008),
        light=light / np.linalg.norm(light),
        contrast=float(rng.uniform(0.3, 0.75)),
        brightness=float(rng.uniform(0.86, 1.15)),
        warmth=float(rng.normal(0, 0.05)),
        blur=float(0.001 + 0.010 * max(0.0, blurred - 0.6) / 0.4),
        noise=float(1.0 + 7 * noisy**3),
        background=_pick(rng, dict.fromkeys(BACKGROUNDS, 1.0)),
        colours=rng.uniform(20, 235, (3, 1)) + rng.normal(0, 28, (3, 3)),
        occlusion=_pick(rng, odds),
        grain=rng.random((16, 4)),
    )


def as_in_a_laboratory(condition: Condition) -> Condition:
    """The same condition with even light and a roughly frontal pose, cropped to the face.

    Data sets of expressions are like that. Hair and background, which make up more of a picture's
    variance than any expression, are mostly outside the crop.
    """
    c, zoom, pose, light = condition, 1.9, 0.8, 0.3
    lamp = np.array([light * c.light[0] / c.light[2], -0.45, 1.0])
    return replace(
        c,
        yaw=pose * c.yaw,
        pitch=pose * c.pitch,
        roll=pose * c.roll,
        scale=zoom * c.scale,
        shift=pose * zoom * c.shift - np.array([0, 0.15]),
        light=lamp / np.linalg.norm(lamp),
        contrast=0.3 + light * (c.contrast - 0.3),
        brightness=1 + light * (c.brightness - 1),
        warmth=light * c.warmth,
        blur=0.001,
        noise=1.0,
        background="gradient",
        occlusion="none",
    )


def sample_actions(rng: np.random.Generator, label: int) -> Actions:
    """Action unit → (2,) left and right activation; uses equally many random numbers per label."""
    strength = 0.35 + 0.75 * rng.beta(2.2, 1.4)
    jitter = rng.uniform(0.6, 1.25, len(UNITS))
    uneven = 1 + rng.normal(0, 0.08, (len(UNITS), 2))
    rest = np.abs(rng.normal(0, 0.06, len(UNITS)))
    parted, side = rng.random() < 0.5, int(rng.integers(2))
    recipe, more = RECIPES[label]
    target = np.zeros((len(UNITS), 2))
    for i, unit in enumerate(UNITS):
        target[i] = recipe.get(unit, 0.0) + parted * more.get(unit, 0.0)
        if EXPRESSIONS[label] == "Contempt":
            target[i, side] += ONE_SIDED.get(unit, 0.0)
    values = (strength * target * jitter[:, None] * uneven + rest[:, None]).clip(0, 1.15)
    return dict(zip(UNITS, values, strict=True))


def draw(
    who: Identity, condition: Condition, actions: Actions, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw the picture, uint8 (size, size, 3); `rng` gives the sensor's noise."""
    c = condition
    canvas = Canvas(background(c, size), c.yaw, c.pitch, c.roll, c.scale, c.shift)
    draw_face(canvas, who, actions, c.gaze)
    if c.occlusion == "sunglasses":
        draw_glasses(canvas, who, dark=True)
    if c.occlusion != "strand" or who.hair not in ("bald", "buzz"):
        occlude(canvas, c, who.skin, who.hair_colour)
    return photograph(light_up(canvas, c, relief(who, actions)), c, rng)


class SyntheticSpec(NamedTuple):
    """What a `--data_path` of `synthetic…` asks for."""

    lab: bool
    counts: tuple[int | None, int | None]  # train, test; None if not given


def parse_synthetic(data_path: str) -> SyntheticSpec | None:
    """Parse `synthetic` or `synthetic-lab`, with `[:TRAIN[:TEST]]`; None for any other path."""
    match = re.fullmatch(r"synthetic(-lab)?(?::(\d+))?(?::(\d+))?", data_path)
    if not match:
        return None
    train, test = (int(count) if count else None for count in match.groups()[1:])
    return SyntheticSpec(bool(match[1]), (train, test))


class SyntheticFaces:
    """`count` synthetic faces of one split, each a function of (seed, split, index) alone.

    They are pictured in the wild or, with `lab`, in a laboratory: the same people with the same
    expressions. A larger `count` only appends images; train and test share no identity; eight
    images from a multiple of eight on have every class once. `size` is the side length in pixels.
    """

    classes = EXPRESSIONS

    def __init__(
        self,
        count: int = 10_000,
        size: int = 256,
        seed: int = 0,
        split: str = "train",
        lab: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        if not 16 <= size <= 1024:
            what = "--input_size or --short_side asks for another size"
            raise BadInput(f"synthetic faces have 16 to 1024 pixels per side, not {size}; {what}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, not {seed}")
        self.count, self.size, self.seed, self.split, self.lab = count, size, seed, split, lab
        self.digest = f"synthetic-v{VERSION}-{split}-{count}x{size}px-seed{seed}{'-lab' * lab}"
        # Drawing a face takes milliseconds, so each process caches faces, up to KEPT_BYTES.
        self._drawn: dict[int, np.ndarray] = {}
        self._room = KEPT_BYTES // (3 * size * size)

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> np.ndarray:
        """Image `index`, uint8 RGB (size, size, 3), read-only."""
        if index in self._drawn:
            return self._drawn[index]
        rng, identity = self._start(index)
        condition = sample_condition(rng)
        if self.lab:
            condition = as_in_a_laboratory(condition)
        actions = sample_actions(rng, self.label(index))
        image = draw(sample_identity(self.seed, identity), condition, actions, self.size, rng)
        image.flags.writeable = False
        if len(self._drawn) < self._room:
            self._drawn[index] = image
        return image

    def label(self, index: int) -> int:
        """The expression's id, 0..7, without drawing the face."""
        self._check(index)
        block = generator(FACE, self.seed, LABELS + SPLITS.index(self.split), index // CLASSES)
        return int(block.permutation(CLASSES)[index % CLASSES])

    def name(self, index: int) -> str:
        """A name that no other image of this seed has."""
        self._check(index)
        return f"synthetic/{self.split}/{index:06d}"

    def identity(self, index: int) -> int:
        """The number of the identity: even in the train split, odd in the test split."""
        return self._start(index)[1]

    def _start(self, index: int) -> tuple[np.random.Generator, int]:
        """The random generator of an image, and the identity, which is its first draw."""
        self._check(index)
        split = SPLITS.index(self.split)
        rng = generator(FACE, self.seed, split, index)
        return rng, 2 * int(rng.integers(POOL)) + split

    def _check(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} outside 0..{self.count - 1}")


def contact_sheet(rows: int = 6, cell: int = 112, seed: int = 0) -> Image.Image:
    """One column per expression: in the upper half one person per row, in the lower half anyone."""
    faces = SyntheticFaces(10_000, cell, seed)
    header = max(20, cell // 5)
    sheet = Image.new("RGB", (CLASSES * cell, header + rows * cell), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=header * 0.62)
    for label, name in enumerate(EXPRESSIONS):
        middle = (label * cell + cell // 2, header // 2)
        pen.text(middle, name, fill=(40, 40, 40), font=font, anchor="mm")
        drawn = [i for i in range(CLASSES * rows) if faces.label(i) == label]
        for row in range(rows):
            picture = faces.image(drawn[row])
            if row < rows // 2:
                picture = _with_expression(faces, row, label)
            sheet.paste(Image.fromarray(picture), (label * cell, header + row * cell))
    return sheet


def _with_expression(faces: SyntheticFaces, index: int, label: int) -> np.ndarray:
    """The face at an index with another expression, in its own condition but sharp, unoccluded."""
    rng, identity = faces._start(index)
    condition = replace(sample_condition(rng), occlusion="none", blur=0.0, noise=0.5)
    actions = sample_actions(rng, label)
    return draw(sample_identity(faces.seed, identity), condition, actions, faces.size, rng)
