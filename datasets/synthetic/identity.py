"""The identity of a face, and the drawing of its hair and glasses."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from datasets.synthetic.paint import (
    DARK,
    SIDES,
    WHITE,
    Canvas,
    curve,
    ellipse,
    mirrored,
    mix,
    ribbon,
    surface,
)

Actions = dict[int, np.ndarray]


@dataclass(frozen=True)
class Identity:
    """What makes up a person. Colours are RGB (3,) in 0..255; sizes are factors around 1."""

    skin: np.ndarray
    hair_colour: np.ndarray
    eye_colour: np.ndarray
    cloth: np.ndarray
    width: float
    jaw: float
    chin: float
    eye_size: float
    eye_gap: float
    eye_tilt: float
    brow_thick: float
    brow_height: float
    nose_width: float
    nose_length: float
    lip_full: float
    lip_red: float
    mouth_width: float
    rest_corner: float  # how far the corners of the mouth droop at rest, head units
    hair: str
    part: float  # where the hair parts, −0.5..0.5
    beard: str
    glasses: str
    age: float  # 0..1: folds and wrinkles
    grain: np.ndarray  # (160, 4) in [0, 1): strands, freckles


@dataclass(frozen=True)
class Tones:
    """The skin's colours, RGB (3,)."""

    base: np.ndarray
    shade: np.ndarray  # folds and cast shadows
    deep: np.ndarray  # creases, nostrils
    light: np.ndarray  # where light glances
    blush: np.ndarray
    lip: np.ndarray

    @classmethod
    def of(cls, who: Identity) -> "Tones":
        """The tones of an identity's skin; its shadows are warmer than the skin itself."""
        skin = who.skin
        red = np.array([190.0, 62.0, 66.0]) * (0.35 + 0.65 * skin.mean() / 200)
        return cls(
            base=skin,
            shade=skin * (0.70, 0.58, 0.55),
            deep=skin * (0.36, 0.25, 0.24),
            light=mix(skin, WHITE, 0.35),
            blush=mix(skin, red, 0.45),
            lip=mix(skin * (0.86, 0.68, 0.68), red, who.lip_red),
        )


VOLUME = {
    "buzz": 0.0,
    "side": 0.10,
    "fringe": 0.10,
    "long": 0.10,
    "bob": 0.12,
    "curly": 0.30,
    "tied": 0.05,
}
STYLES = ("bald", *VOLUME)


def _cap(who: Identity) -> tuple[np.ndarray, np.ndarray]:
    """(40, 2) the hair's upper outline and (40, 2) the hairline, both from left to right."""
    v, w = VOLUME[who.hair], who.width
    right = [
        (0.44 + v / 2, -1.13 - v),
        (0.76 * w + v / 2, -0.82 - v / 2),
        (0.89 * w + v / 2, -0.40),
        (0.83 * w, -0.02),
    ]
    outer = curve([(-x, y) for x, y in right[::-1]] + [(0.0, -1.23 - v), *right], 40)
    p = who.part
    line = {
        "side": [(p - 0.05, -0.86), (p + 0.12, -0.88), (0.58, -0.60)],
        "fringe": [(-0.42, -0.54), (p * 0.5, -0.62), (0.42, -0.54)],
        "bob": [(-0.44, -0.50), (0.05, -0.52), (0.44, -0.48)],
        "long": [(-0.45, -0.62), (p * 0.6, -0.90), (0.45, -0.62)],
    }.get(who.hair, [(-0.42, -0.78), (0.0, -0.84), (0.42, -0.78)])
    left, right = [(-0.82 * w, -0.02), (-0.74 * w, -0.38)], [(0.74 * w, -0.38), (0.82 * w, -0.02)]
    if who.hair == "side":
        left.append((-0.58, -0.68))
    line = curve([*left, *line, *right], 40)
    if who.hair in ("side", "fringe", "bob", "long"):  # uneven tips; smooth at the temples
        line[6:34, 1] += 0.07 * (who.grain[6:34, 3] - 0.6)
    return outer, line


def draw_back_hair(canvas: Canvas, who: Identity) -> None:
    """The hair behind head and shoulders."""
    dark = who.hair_colour * 0.55
    if who.hair in ("long", "bob"):
        end = 1.75 if who.hair == "long" else 0.85
        right = [(0.5, -1.2), (0.98, -0.7), (1.06, 0.1), (1.04, end - 0.35), (0.85, end)]
        back = curve([(-x, y) for x, y in right[::-1]] + right, 40)
        canvas.paint([back], dark, solid=True, depth=-0.3, blur=0.02)
    elif who.hair == "tied":
        canvas.paint(
            [ellipse(0.25 * np.sign(who.part), -1.36, 0.30, 0.24)],
            dark * 1.3,
            solid=True,
            depth=-0.2,
            blur=0.012,
        )
    elif who.hair == "curly":
        angle = np.linspace(-0.2, np.pi + 0.2, 20)
        g = who.grain
        puffs = [
            ellipse(1.02 * np.cos(t), -0.30 - 1.02 * np.sin(t), r, r, 14)
            for t, r in zip(angle, 0.2 + 0.08 * g[:20, 0], strict=True)
        ]
        canvas.paint(puffs, dark, solid=True, depth=-0.2, blur=0.02)


def _strands(who: Identity, outer: np.ndarray, line: np.ndarray) -> list[np.ndarray]:
    """Strands combed from the outline to the hairline, (7, 2) each."""
    g = who.grain[:120]
    at = (g[:, 0] * 39).astype(int)
    to = np.clip(at + np.round(6 * (g[:, 1] - 0.5)), 0, 39).astype(int)
    crown = np.array([who.part * 0.7, -1.2 - VOLUME[who.hair]])
    comb = 0.35 if who.hair in ("side", "long") else 0.15
    begin = outer[at] * (1 - comb) + crown * comb
    begin = begin + (line[to] - begin) * (0.05 + 0.4 * g[:, 2:3])
    end = line[to] + (0, 0.03) * (g[:, 3:] - 0.3)
    bend = (begin + end) / 2 + (begin + end) * (0.05, 0.0)
    return list(curve(np.stack([begin, bend, end], 1), 7))


def draw_front_hair(canvas: Canvas, who: Identity, head: Image.Image) -> None:
    """Hair over the forehead and temples, with its shadow on the skin and its shine."""
    if who.hair == "bald":
        return
    outer, line = _cap(who)
    shape = np.concatenate([outer, line[::-1]])
    depth = np.concatenate([np.full(40, -0.02), surface(line[:, 0], line[:, 1])[::-1]])
    colour = who.hair_colour
    short = who.hair == "buzz"
    canvas.paint(
        [shape + np.array([0, 0.05])], DARK, depth=depth, blur=0.04, opacity=0.35, clip=head
    )
    canvas.paint(
        [shape],
        colour * 0.72,
        solid=True,
        depth=depth,
        blur=0.03 if short else 0.012,
        opacity=0.82 if short else 1.0,
    )
    if who.hair == "curly":
        _curls(canvas, who, outer, line)
        return
    middle = outer * 0.55 + line * 0.45
    shine = [ribbon(middle[6:34], 0.22)]
    canvas.paint(
        shine, mix(colour, WHITE, 0.22), blur=0.07, opacity=0.12 if short else 0.55, depth=0.2
    )
    if short:
        return
    strands = _strands(who, outer, line)
    cap = canvas.whole_mask([shape], depth=depth, blur=0.01)
    how = {"blur": 0.006, "clip": cap}
    canvas.paint(strands[:60], colour * 0.45, line=0.014, opacity=0.38, **how)
    canvas.paint(strands[60:], mix(colour * 1.15, WHITE, 0.08), line=0.012, opacity=0.38, **how)
    if who.hair in ("long", "bob"):
        _locks(canvas, who)


def _curls(canvas: Canvas, who: Identity, outer: np.ndarray, line: np.ndarray) -> None:
    """Many small round tufts, darker below and lighter above."""
    g = who.grain[:100]
    at = (g[:, 0] * 39).astype(int)
    places = outer[at] + (line[at] - outer[at]) * g[:, 1:2]
    for shift, tone in (
        (0.025, who.hair_colour * 0.45),
        (-0.015, mix(who.hair_colour, WHITE, 0.1)),
    ):
        tufts = [
            ellipse(x, y + shift, 0.03 + 0.045 * r, 0.03 + 0.04 * r, 9)
            for (x, y), r in zip(places, g[:, 2], strict=True)
        ]
        canvas.paint(tufts, tone, blur=0.014, opacity=0.45, depth=0.1)


def _locks(canvas: Canvas, who: Identity) -> None:
    """Hair that falls in front of the ears."""
    long = who.hair == "long"
    end, colour = (1.7, who.hair_colour) if long else (0.8, who.hair_colour)
    middle = [(0.66, -0.78), (0.85, -0.3), (0.90, 0.2), (0.93, 0.6 * end), (0.86, end)]
    locks = [ribbon(curve([(s * x, y) for x, y in middle], 20), 0.25, (0.5, 0.4)) for s in SIDES]
    canvas.paint(
        [lock + np.array([0, 0.03]) for lock in locks], DARK, blur=0.04, opacity=0.3, depth=0.05
    )
    canvas.paint(locks, colour * 0.75, solid=True, blur=0.012, depth=0.08)
    for tone, offset in ((colour * 0.45, 0), (mix(colour * 1.1, WHITE, 0.18), 1)):
        lines = [
            curve([(s * (x + 0.2 * (g[0] - 0.5)), y) for x, y in middle], 12)
            for s in SIDES
            for g in who.grain[20 + offset : 34 : 2]
        ]
        canvas.paint(lines, tone, line=0.014, opacity=0.5, blur=0.005, depth=0.08)


def draw_glasses(canvas: Canvas, who: Identity, dark: bool = False) -> None:
    """The identity's glasses, if any; with `dark`, sunglasses for everyone."""
    kind = "square" if dark and who.glasses == "none" else who.glasses
    if kind == "none":
        return
    x, y = 0.375 * who.eye_gap, -0.07
    if kind == "round":
        rims = mirrored(ellipse(x, y, 0.25, 0.22, 32))
    else:
        a = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        c, s = np.cos(a), np.sin(a)
        rims = mirrored(
            np.stack(
                [
                    x + 0.27 * np.sign(c) * np.abs(c) ** 0.5,
                    y + 0.19 * np.sign(s) * np.abs(s) ** 0.5,
                ],
                1,
            )
        )
    tone = DARK if dark or who.grain[1, 3] < 0.6 else mix(who.hair_colour, DARK, 0.3)
    depth = np.concatenate([surface(*(rim * (0.9, 1)).T) + 0.06 for rim in rims])
    canvas.paint(rims, DARK if dark else WHITE, opacity=0.93 if dark else 0.07, depth=depth)
    glint = mirrored(
        ribbon(np.array([(x - 0.1, y + 0.06), (x - 0.03, y - 0.03), (x + 0.04, y - 0.12)]), 0.05)
    )
    canvas.paint(glint, WHITE, blur=0.012, opacity=0.22)
    loops = [np.concatenate([rim, rim[:2]]) for rim in rims]
    bridge = curve([(-x + 0.25, y - 0.04), (0, y - 0.08), (x - 0.25, y - 0.04)], 10)
    arms = mirrored([(x + 0.24, y - 0.05), (0.70, y - 0.05), (0.86, y - 0.02)])
    lines = [*loops, bridge, *arms]
    depth = np.concatenate([surface(*(part * (0.9, 1)).T) + 0.06 for part in lines])
    canvas.paint(lines, tone, line=0.03, depth=depth, opacity=0.9, blur=0.003)
