"""The mouth, which shows most of an expression, and the beard that moves with it."""

import numpy as np
from PIL import Image

from datasets.synthetic.identity import Actions, Identity, Tones
from datasets.synthetic.paint import DARK, SIDES, WHITE, Canvas, curve, ellipse, mix, ribbon


class Mouth:
    """The mouth's curves, each (25, 2), from the image's left corner to its right."""

    def __init__(self, who: Identity, actions: Actions):
        a = {au: float(v.mean()) for au, v in actions.items()}
        t = np.linspace(-1, 1, 25)
        blend = 0.5 + 0.5 * t  # left side's activation → right side's
        side = {au: v[0] + (v[1] - v[0]) * blend for au, v in actions.items()}
        wide = 0.10 * side[12] + 0.10 * side[20] - 0.05 * side[23] + 0.02 * side[14]
        wide = wide - 0.08 * side[26] - 0.03 * side[17]
        x = t * (0.275 * who.mouth_width + wide)
        # the corners move independently; the blend keeps the lips between them smooth
        corner = -0.155 * side[12] + 0.13 * side[15] + 0.03 * side[20] - 0.03 * side[14]
        corner = corner + who.rest_corner
        self.gap = 0.075 * a[25] + 0.34 * a[26] + 0.02 * a[16]
        y = 0.66 - 0.01 * a[12] - 0.05 * a[17] - 0.03 * a[9] + 0.02 * a[26]
        y = (
            y
            + corner * np.abs(t) ** 1.7
            + 0.010 * np.cos(3 * np.pi * t) * (1 - min(1.0, self.gap / 0.05))
        )
        arch = np.sqrt(np.maximum(0, 1 - t**2))
        flat = np.maximum(0, 1 - t**4)
        round_ = min(1.0, 1.6 * a[26] + 0.3)
        shape = round_ * arch + (1 - round_) * flat
        raise_ = side[10] * 0.045
        top = y - shape * ((0.2 + 0.15 * round_) * self.gap + raise_ * (0.5 + 0.5 * flat))
        bottom = y + arch ** (0.6 + 0.4 * round_) * (
            0.75 * self.gap + 0.05 * a[16] * (a[25] > 0.25) - 0.02 * a[17]
        )
        bottom = np.maximum(bottom, top)
        thin = (1 - 0.62 * a[23]) * (1 - 0.2 * a[12]) * (1 - 0.15 * a[26])
        bow = (
            1 + 0.16 * np.exp(-(((np.abs(t) - 0.25) / 0.16) ** 2)) - 0.2 * np.exp(-((t / 0.1) ** 2))
        )
        upper = (
            0.075 * who.lip_full * thin * (1 - 0.1 * a[10]) * (1 - np.abs(t) ** 1.8) ** 0.9 * bow
        )
        lower = 0.105 * who.lip_full * thin * (1 + 0.25 * a[17] + 0.1 * a[16])
        lower = lower * (1 - t**2) ** 0.8
        around = 1.03 + 0.16 * a[26]  # lips go round the corners of an open jaw
        self.seam = np.stack([x, y], 1)
        self.top, self.bottom = np.stack([x, top], 1), np.stack([x, bottom], 1)
        self.above = np.stack([x * around, top - upper], 1)
        self.below = np.stack([x * around, bottom + lower], 1)
        self.bared = min(1.0, a[25]) * max(a[16], a[20])
        self.tuck = actions[14] + 0.5 * actions[12] + 0.4 * actions[15] + 0.2 * actions[20]
        self.open = self.gap + 0.045 * a[10] > 0.03

    def corner(self, i: int) -> np.ndarray:
        """(2,): the corner of side `i` (0: the image's left)."""
        return self.seam[-i]


def draw_mouth(canvas: Canvas, tones: Tones, m: Mouth) -> None:
    """Lips and, if they are open, teeth and tongue."""
    low = m.below[12, 1]
    canvas.paint([ellipse(0, low + 0.055, 0.17, 0.035)], tones.shade, blur=0.03, opacity=0.6)
    upper = [np.concatenate([m.above, m.bottom[::-1]])]
    lower = [np.concatenate([m.top, m.below[::-1]])]
    canvas.paint(lower, tones.lip, blur=0.007)
    canvas.paint(upper, tones.lip * (0.84, 0.78, 0.78), blur=0.007)
    lips = canvas.whole_mask(lower)
    shine = m.bottom * (0.5, 0.45) + m.below * (0, 0.55)
    canvas.paint(
        [ribbon(shine, 0.035)], mix(tones.lip, WHITE, 0.5), blur=0.014, opacity=0.6, clip=lips
    )
    canvas.paint([ribbon(m.below, 0.05)], tones.lip * 0.7, blur=0.02, opacity=0.4, clip=lips)
    if m.open:
        _inside(canvas, tones, m)
    canvas.paint([ribbon(m.top, 0.022, (0.7, 0.7))], tones.deep, blur=0.006, opacity=0.85)
    for i, side in enumerate(SIDES):
        x, y = m.corner(i)
        spot = ellipse(x + side * 0.015, y, 0.022, 0.028, 10)
        canvas.paint([spot], tones.deep, blur=0.014, opacity=0.35 + 0.5 * float(m.tuck[i]))


def _inside(canvas: Canvas, tones: Tones, m: Mouth) -> None:
    """The open mouth: dark, with tongue and teeth, shaded from above."""
    opening = [np.concatenate([m.top, m.bottom[::-1]])]
    clip = canvas.whole_mask(opening)
    canvas.paint(opening, np.array([62.0, 18.0, 22.0]))
    high, low = m.top[12, 1], m.bottom[12, 1]
    canvas.paint(
        [ellipse(0, low + 0.02, 0.17, 0.10)],
        np.array([176.0, 78.0, 82.0]),
        blur=0.03,
        opacity=0.8,
        clip=clip,
    )
    ivory = np.array([240.0, 232.0, 218.0])
    reach = 0.095 if low - high < 0.2 else 0.065
    teeth = m.top * (0.82, 1)
    teeth[:, 1] = np.minimum(teeth[:, 1], high + 0.04)  # a row of teeth is flatter than the lip
    canvas.paint(
        [np.concatenate([teeth - (0, 0.02), (teeth + np.array([0, reach]))[::-1]])],
        ivory,
        blur=0.006,
        clip=clip,
    )
    if m.bared > 0.2:
        teeth = m.bottom * (0.8, 1)
        canvas.paint(
            [np.concatenate([teeth + np.array([0, 0.02]), (teeth - (0, 0.05))[::-1]])],
            ivory * 0.9,
            blur=0.006,
            opacity=m.bared,
            clip=clip,
        )
    gaps = [
        np.array([(x, high - 0.05), (x, high + 0.5 * reach)]) for x in np.linspace(-0.2, 0.2, 8)
    ]
    canvas.paint(gaps, tones.deep, line=0.007, opacity=0.22, clip=clip)
    canvas.paint([ribbon(m.top, 0.06, (1, 1))], DARK, blur=0.02, opacity=0.5, clip=clip)


def draw_beard(canvas: Canvas, who: Identity, m: Mouth, head: Image.Image) -> None:
    """Stubble, moustache, goatee or a full beard, fitted to the shape of the mouth."""
    if who.beard == "none":
        return
    colour = mix(who.hair_colour * 0.85, DARK, 0.2)
    top, low = m.above[12, 1], m.below[12, 1]
    left, right = m.corner(0), m.corner(1)
    if who.beard in ("stubble", "full"):
        jaw = curve(
            [
                (-0.80, 0.2),
                (-0.66, 0.55),
                left * (1.25, 1) - (0, 0.14),
                (0, top - 0.06),
                right * (1.25, 1) - (0, 0.14),
                (0.66, 0.55),
                (0.80, 0.2),
                (0.9, 0.9),
                (0.3, 1.3),
                (-0.3, 1.3),
                (-0.9, 0.9),
            ],
            44,
            closed=True,
        )
        full = who.beard == "full"
        canvas.paint([jaw], colour, blur=0.05, opacity=0.85 if full else 0.3, clip=head)
    if who.beard in ("moustache", "goatee", "full"):
        bar = curve(
            [
                left + np.array([-0.05, 0.02]),
                (-0.17, top - 0.055),
                (0, top - 0.05),
                (0.17, top - 0.055),
                right + np.array([0.05, 0.02]),
            ],
            20,
        )
        canvas.paint([ribbon(bar, 0.10, (0.2, 0.2))], colour, blur=0.018, opacity=0.85, clip=head)
    if who.beard == "goatee":
        canvas.paint([ellipse(0, low + 0.19, 0.2, 0.17)], colour, blur=0.04, opacity=0.8, clip=head)
    if who.beard != "stubble":
        g = who.grain[:70]
        root = np.stack([(g[:, 0] - 0.5) * 1.2, low + 0.04 + g[:, 1] * 0.4], 1)
        if who.beard != "full":
            root = np.stack([(g[:, 0] - 0.5) * 0.34, top - 0.09 + 0.05 * g[:, 1]], 1)
        tip = root + np.stack([root[:, 0] * 0.1, 0.06 + 0.04 * g[:, 2]], 1)
        light = mix(colour, WHITE, 0.2)
        canvas.paint(list(np.stack([root, tip], 1)), light, line=0.01, opacity=0.4, clip=head)
