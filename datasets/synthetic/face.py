"""Draws one face, from an identity and the activations of facial action units.

The features are painted back to front, without light. `relief` gives the height map of the face
that `scene.light_up` needs, so that skin, hair and features share one shading.

Action units (AU) follow FACS (Ekman & Friesen 1978): `actions[au]` is (2,), for the image's left
and right side, from 0 (at rest) to about 1 (full).
"""

import numpy as np
from PIL import Image

from datasets.synthetic.identity import (
    Actions,
    Identity,
    Tones,
    draw_back_hair,
    draw_front_hair,
    draw_glasses,
)
from datasets.synthetic.mouth import Mouth, draw_beard, draw_mouth
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
)


def draw_face(canvas: Canvas, who: Identity, actions: Actions, gaze: np.ndarray) -> None:
    """Paint head, hair and features onto the canvas, without light."""
    tones = Tones.of(who)
    mouth = Mouth(who, actions)
    draw_back_hair(canvas, who)
    _neck(canvas, who, tones)
    head = _head(canvas, who, tones, actions)
    _folds(canvas, who, tones, actions, mouth, head)
    _nose(canvas, who, tones, actions)
    for i, side in enumerate(SIDES):
        _eye(canvas, who, tones, {au: float(a[i]) for au, a in actions.items()}, side, gaze)
        _brow(canvas, who, {au: float(a[i]) for au, a in actions.items()}, side)
    draw_beard(canvas, who, mouth, head)
    draw_mouth(canvas, tones, mouth)
    draw_front_hair(canvas, who, head)
    draw_glasses(canvas, who)


def _outline(who: Identity, drop: float) -> np.ndarray:
    """(56, 2): the head's outline; opening the jaw lengthens it by `drop`."""
    w, j, c = who.width, who.jaw, who.chin
    right = [
        (0.42, -1.12),
        (0.74 * w, -0.78),
        (0.84 * w, -0.3),
        (0.83 * w, 0.12),
        (0.75 * w * j, 0.55 + 0.4 * drop),
        (0.53 * j, 0.89 + 0.8 * drop),
        (0.25 * j, 1.11 * c + drop),
    ]
    left = [(-x, y) for x, y in reversed(right)]
    return curve([(0, -1.2), *right, (0, 1.15 * c + drop), *left], 56, closed=True)


def _head(canvas: Canvas, who: Identity, tones: Tones, actions: Actions) -> Image.Image:
    """Ears and skin; returns the mask of the head."""
    for x, inner in ((0.86, False), (0.88, True)):
        ears = mirrored(ellipse(x * who.width, 0.06, *((0.06, 0.13) if inner else (0.12, 0.21))))
        tone = tones.shade if inner else mix(tones.base, tones.blush, 0.5)
        canvas.paint(
            ears,
            tone,
            solid=True,
            depth=-0.05,
            blur=0.02 if inner else 0.0,
            opacity=1 - 0.4 * inner,
        )
    outline = _outline(who, 0.15 * actions[26].mean())
    depth = 0.35 * outline[:, 1].clip(0) ** 1.5  # the chin lies further forward than the ears
    head = canvas.whole_mask([outline], depth=depth)
    canvas.image.paste(tuple(int(c) for c in tones.base), (0, 0), head)
    canvas.figure.paste(255, (0, 0), head)
    smile = float((actions[6] + actions[12]).mean()) / 2
    cheeks = mirrored(ellipse(0.48, 0.30 - 0.06 * smile, 0.24, 0.17))
    canvas.paint(cheeks, tones.blush, blur=0.10, opacity=0.40 + 0.25 * smile, clip=head)
    canvas.paint([ellipse(0, 0.24, 0.15, 0.12)], tones.blush, blur=0.06, opacity=0.35, clip=head)
    canvas.paint([ellipse(0, -0.6, 0.42, 0.16)], tones.light, blur=0.15, opacity=0.35, clip=head)
    sockets = mirrored(ellipse(0.36 * who.eye_gap, -0.12, 0.22, 0.12))
    canvas.paint(sockets, tones.shade, blur=0.07, opacity=0.34, clip=head)
    if who.grain[0, 3] < 0.15:
        spots = (who.grain[:60, :2] - (0.5, 0.35)) * (1.2, 0.6)
        dots = [ellipse(x, y + 0.15, 0.012, 0.012, 6) for x, y in spots]
        canvas.paint(dots, tones.shade, opacity=0.35, blur=0.004, clip=head)
    return head


def _neck(canvas: Canvas, who: Identity, tones: Tones) -> None:
    """Neck with the chin's shadow, and clothes."""
    half = 0.57 * who.jaw
    neck = curve([(-half, 0.5), (-half, 1.25), (-0.9, 1.6), (0.9, 1.6), (half, 1.25), (half, 0.5)])
    canvas.paint([neck], mix(tones.base, tones.shade, 0.35), solid=True, depth=-0.1)
    canvas.paint([ellipse(0.0, 1.08, 0.5, 0.24)], tones.deep, blur=0.1, opacity=0.55, depth=-0.1)
    right = [(0.62, 1.36), (1.7, 1.62), (2.2, 2.2)]
    shoulders = curve([(-x, y) for x, y in right[::-1]] + [(0.0, 1.58), *right])
    for lift, tone in ((0.0, who.cloth * 0.7), (0.05, who.cloth)):
        lifted = shoulders + np.array([0, lift])
        canvas.paint([lifted], tone, solid=True, depth=-0.1, blur=0.012)


def _folds(
    canvas: Canvas,
    who: Identity,
    tones: Tones,
    actions: Actions,
    mouth: Mouth,
    head: Image.Image,
) -> None:
    """The folds and wrinkles that muscle movements and age leave in the skin."""
    for i, side in enumerate(SIDES):
        a = {au: float(v[i]) for au, v in actions.items()}
        corner = mouth.corner(i)
        wing = (side * 0.17 * who.nose_width, 0.27 - 0.05 * a[9])
        bend = (side * (0.24 + 0.10 * a[12]) + 0.3 * corner[0], 0.46 - 0.06 * a[9])
        end = (corner[0] * 1.12 + side * 0.07, corner[1] + 0.04 - 0.06 * a[12])
        fold = ribbon(curve([wing, bend, end], 12), 0.055)
        pull = 0.55 * a[12] + 0.5 * a[10] + 0.55 * a[9] + 0.3 * a[14] + 0.15 * a[20]
        canvas.paint(
            [fold], tones.shade, blur=0.022, opacity=0.10 + 0.4 * who.age + pull, clip=head
        )
        x = side * 0.36 * who.eye_gap
        bag = curve([(x - 0.17, 0.04), (x, 0.105 - 0.02 * a[6]), (x + 0.17, 0.04)], 12)
        deep = 0.12 + 0.35 * who.age + 0.45 * a[6] + 0.2 * a[7] + 0.3 * a[9]
        canvas.paint([ribbon(bag, 0.035)], tones.shade, blur=0.014, opacity=deep, clip=head)
        rays = [
            ribbon(curve([(x + side * 0.22, -0.05 + d / 3), (x + side * 0.33, d)], 5), 0.018)
            for d in (-0.13, -0.03, 0.06)
        ]
        deep = 0.7 * a[6] * (0.4 + who.age) + 0.35 * who.age
        canvas.paint(rays, tones.shade, blur=0.007, opacity=deep, clip=head)
        frown = curve([(side * 0.07, -0.22), (side * 0.055, -0.36), (side * 0.075, -0.46)], 8)
        deep = 0.95 * max(0.0, a[4] - 0.12) + 0.2 * who.age
        canvas.paint([ribbon(frown, 0.035)], tones.shade, blur=0.01, opacity=deep, clip=head)
    raised = float((actions[1] + actions[2]).mean()) / 2
    middle = float((actions[1] - actions[2]).clip(0).mean())
    lines = []
    for k, y in enumerate((-0.60, -0.70, -0.80)):
        half = (0.42 - 0.05 * k) * (1 - 0.5 * middle)
        rise = 0.04 + 0.05 * middle
        lines.append(ribbon(curve([(-half, y + rise), (0, y), (half, y + rise)], 12), 0.03))
    deep = 0.75 * max(raised, 0.8 * middle) * (0.35 + who.age) + 0.25 * who.age
    canvas.paint(lines, tones.shade, blur=0.012, opacity=deep, clip=head)
    nose = float(actions[9].mean())
    lines = [
        ribbon(curve([(-0.09, y - 0.03), (0, y), (0.09, y - 0.03)], 8), 0.028)
        for y in (-0.17, -0.1, -0.03)
    ]
    canvas.paint(lines, tones.shade, blur=0.008, opacity=0.8 * nose, clip=head)
    chin = float(actions[17].mean())
    canvas.paint(
        [ellipse(0, 0.98, 0.13, 0.05)], tones.shade, blur=0.03, opacity=0.6 * chin, clip=head
    )


def _nose(canvas: Canvas, who: Identity, tones: Tones, actions: Actions) -> None:
    """Bridge, tip, wings and nostrils; AU 9 lifts and widens the wings."""
    lift = 0.06 * float(actions[9].mean()) + 0.02 * float(actions[10].mean())
    w = who.nose_width * (1 + 1.2 * lift)
    y = 0.30 * who.nose_length
    sides = mirrored(
        ribbon(curve([(0.11, -0.22), (0.065 * w, 0.0), (0.11 * w, y - 0.08)], 12), 0.07)
    )
    canvas.paint(sides, tones.shade, blur=0.035, opacity=0.30)
    under = curve([(-0.16 * w, y + 0.05), (0, y + 0.1), (0.16 * w, y + 0.05)], 12)
    canvas.paint([ribbon(under, 0.10)], tones.shade, blur=0.025, opacity=0.5)
    wings = mirrored(
        ribbon(
            curve(
                [
                    (0.115 * w, y - 0.09 - lift),
                    (0.165 * w, y - 0.02 - lift),
                    (0.15 * w, y + 0.05 - lift),
                    (0.10 * w, y + 0.055 - lift / 2),
                ],
                14,
            ),
            0.026,
        )
    )
    canvas.paint(wings, tones.deep, blur=0.010, opacity=0.55)
    canvas.paint([ellipse(0, y - 0.02, 0.09 * w, 0.075)], tones.light, blur=0.04, opacity=0.35)
    holes = mirrored(ellipse(0.075 * w, y + 0.055 - 0.6 * lift, 0.040 * w, 0.020 + 0.1 * lift))
    canvas.paint(holes, tones.deep * 0.7, blur=0.008, opacity=0.85)
    canvas.paint(
        [ribbon(np.array([(0, -0.25), (0, 0.0), (0, y - 0.05)]), 0.04)],
        tones.light,
        blur=0.02,
        opacity=0.35,
    )
    canvas.paint(
        [ribbon(np.array([(0, y + 0.1), (0, y + 0.16), (0, y + 0.22)]), 0.05)],
        tones.shade,
        blur=0.015,
        opacity=0.35,
    )


def _eye(
    canvas: Canvas, who: Identity, tones: Tones, a: dict[int, float], side: int, gaze: np.ndarray
) -> None:
    """One eye: ball, iris, lids, lashes. AU 5 widens, 7 and 6 narrow from below, 43 droops."""
    s = who.eye_size
    x, y = side * 0.36 * who.eye_gap, -0.09
    upper = 0.105 * s * (1 + 0.62 * a[5] - 0.28 * a[7] - 0.22 * a[6] - 0.3 * a[9] - 0.62 * a[43])
    lower = 0.062 * s * (1 + 0.25 * a[5] - 0.65 * a[7] - 0.95 * a[6] - 0.4 * a[9])
    upper = max(upper, 0.012 - lower)
    tilt = who.eye_tilt
    inner, outer = (x - side * 0.185 * s, y + 0.02), (x + side * 0.19 * s, y - 0.01 - tilt)
    lid = curve(
        [
            inner,
            (x - side * 0.09 * s, y - 0.82 * upper),
            (x + side * 0.01, y - upper),
            (x + side * 0.11 * s, y - 0.78 * upper - tilt / 2),
            outer,
        ],
        18,
    )
    rim = curve(
        [
            outer,
            (x + side * 0.10 * s, y + 0.8 * lower - tilt / 2),
            (x, y + lower),
            (x - side * 0.10 * s, y + 0.75 * lower),
            inner,
        ],
        18,
    )
    opening = [np.concatenate([lid, rim])]
    white = mix(WHITE, tones.base, 0.16)
    clip = canvas.whole_mask(opening)
    canvas.paint(opening, white)
    gx, gy = x + gaze[0], y - 0.022 + gaze[1] + 0.02 * a[43]
    r = 0.092
    canvas.paint([ellipse(gx, gy, r, r)], who.eye_colour * 0.45, clip=clip)
    canvas.paint([ellipse(gx, gy, r * 0.84, r * 0.84)], who.eye_colour, blur=0.008, clip=clip)
    canvas.paint(
        [ellipse(gx, gy + 0.035, r * 0.6, r * 0.35)],
        mix(who.eye_colour, WHITE, 0.4),
        blur=0.016,
        opacity=0.6,
        clip=clip,
    )
    canvas.paint([ellipse(gx, gy, 0.042, 0.042)], DARK * 0.5, clip=clip)
    canvas.paint([ellipse(inner[0], inner[1], 0.03, 0.025)], tones.blush, blur=0.01, clip=clip)
    canvas.paint(
        [ribbon(lid + np.array([0, 0.012]), 0.07, (0.6, 0.6))],
        tones.deep,
        blur=0.018,
        opacity=0.55,
        clip=clip,
    )
    canvas.paint(
        [
            ellipse(gx - 0.03, gy - 0.03, 0.02, 0.02, 10),
            ellipse(gx + 0.032, gy + 0.03, 0.009, 0.009, 8),
        ],
        WHITE,
        opacity=0.92,
        clip=clip,
    )
    flick = np.concatenate([lid, [(outer[0] + side * 0.03, outer[1] - 0.015)]])
    canvas.paint(
        [ribbon(flick, 0.034, (0.1, 0.5))], mix(DARK, tones.deep, 0.2), blur=0.003, opacity=0.92
    )
    canvas.paint([ribbon(rim, 0.018, (0.5, 0.2))], tones.deep, blur=0.005, opacity=0.55)
    rise = 0.055 + 0.02 * a[1] - 0.03 * a[4] - 0.02 * a[5]
    crease = lid * (1, 1) - (0, rise)
    canvas.paint([ribbon(crease[2:], 0.03)], tones.shade, blur=0.010, opacity=0.75)


def _brow(canvas: Canvas, who: Identity, a: dict[int, float], side: int) -> None:
    """One brow: AU 1 lifts its inner end, 2 its outer end, 4 lowers and draws it in."""
    y = -0.335 - 0.05 * (who.brow_height - 1) * 4
    inner = 0.14 * who.eye_gap - 0.05 * a[4]
    line = curve(
        [
            (side * inner, y + 0.018 - 0.145 * a[1] + 0.125 * a[4] + 0.05 * a[9]),
            (side * (inner + 0.15), y - 0.02 - 0.075 * a[1] - 0.06 * a[2] + 0.115 * a[4]),
            (side * (inner + 0.32), y - 0.045 - 0.13 * a[2] + 0.07 * a[4] + 0.02 * a[6]),
            (side * (inner + 0.49), y + 0.045 - 0.12 * a[2] + 0.035 * a[4] + 0.03 * a[1]),
        ],
        22,
    )
    colour = mix(who.hair_colour * 0.75, DARK, 0.25)
    thick = 0.085 * who.brow_thick
    canvas.paint([ribbon(line, thick, (0.75, 0.1))], colour, blur=0.014, opacity=0.62)
    t = np.linspace(0.02, 0.9, 22)
    rows = np.minimum((t * 21).astype(int), 20)
    root = line[rows] + (0, 0.35 * thick)
    lean = side * (0.02 + 0.05 * t)
    tip = line[rows] + np.stack([lean, thick * (-0.55 + 0.7 * t)], 1)
    tip[:, 1] += 0.02 * (who.grain[:22, 2] - 0.5)
    canvas.paint(list(np.stack([root, tip], 1)), colour, line=0.013, opacity=0.6)


def relief(who: Identity, actions: Actions) -> np.ndarray:
    """(B, 5): the bumps and hollows of the face as x, y, two widths and height, in head units."""
    a = {au: float(v.mean()) for au, v in actions.items()}
    y = 0.30 * who.nose_length
    rows = [
        (0, -0.02, 0.08, 0.24, 0.10),
        (0, y - 0.03, 0.11 * who.nose_width, 0.11, 0.15),
        (0, 0.66, 0.34, 0.17, 0.06),
        (0, 0.86, 0.16, 0.05, -0.04),
        (0, 1.02 + 0.15 * a[26], 0.19, 0.12, 0.07 + 0.03 * a[17]),
    ]
    for i, side in enumerate(SIDES):
        one = {au: float(v[i]) for au, v in actions.items()}
        cheek = max(one[6], 0.7 * one[12])
        brow = -0.27 - 0.08 * one[2] + 0.06 * one[4]
        rows += [
            (side * 0.13 * who.nose_width, y, 0.06, 0.06, 0.05),
            (side * 0.34, brow, 0.22, 0.07, 0.05),
            (side * 0.36, -0.10, 0.20, 0.10, -0.07),
            (side * 0.36, -0.09, 0.12, 0.08, 0.045),
            (side * 0.48, 0.27 - 0.06 * cheek, 0.20, 0.16, 0.05 + 0.07 * cheek),
            (side * 0.40, 0.62, 0.12, 0.20, -0.03 - 0.03 * who.age),
        ]
    return np.array(rows)
