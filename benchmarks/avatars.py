"""Synthetic faces from avatar packages: a labelled data set and unlabelled images.

    pip install python-avatars resvg-py
    python benchmarks/avatars.py --kind avataaars --output FACES

    npm install @dicebear/core @dicebear/toon-head      # and node, and resvg-py
    python benchmarks/avatars.py --kind toon-head --output FACES

Writes PNG files to FACES/train/CLASS, FACES/test/CLASS and FACES/unlabelled. An expression is a
combination of brows, eyes and mouth; most brows, eyes and mouths occur in several expressions.
Hair, skin, glasses, beard, clothes, position, size, tilt, light, blur and noise do not depend on
the expression. Training classes are imbalanced like RAF-DB's, test classes are balanced. The same
options and package versions produce the same files. The artwork has licences of its own.
"""

import argparse
import io
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

# Proportions of the training classes: RAF-DB's, with more of the rarest.
CLASSES = {
    "Surprise": 0.105,
    "Fear": 0.05,
    "Disgust": 0.06,
    "Happiness": 0.33,
    "Sadness": 0.16,
    "Anger": 0.075,
    "Neutral": 0.22,
}

MODULES = {"resvg_py": "resvg-py", "python_avatars": "python-avatars"}

# The brows, eyes and mouths of each expression, by the names that the packages give them. A name
# that is listed twice is chosen twice as often.
AVATAAARS = {
    "Surprise": (
        "RAISED_EXCITED RAISED_EXCITED_NATURAL UP_DOWN",
        "SURPRISED SURPRISED DEFAULT",
        "DISBELIEF SCREAM_OPEN",
    ),
    "Fear": (
        "SAD_CONCERNED SAD_CONCERNED_NATURAL",
        "SURPRISED SURPRISED SIDE",
        "SCREAM_OPEN GRIMACE DISBELIEF",
    ),
    "Disgust": (
        "FROWN_NATURAL ANGRY_NATURAL FLAT_NATURAL",
        "SQUINT EYE_ROLL CLOSED",
        "VOMIT GRIMACE CONCERNED TONGUE",
    ),
    "Happiness": (
        "DEFAULT DEFAULT_NATURAL RAISED_EXCITED UP_DOWN_NATURAL",
        "HAPPY DEFAULT SQUINT WINK",
        "SMILE BIG_SMILE TWINKLE TONGUE",
    ),
    "Sadness": (
        "SAD_CONCERNED SAD_CONCERNED_NATURAL DEFAULT_NATURAL",
        "DEFAULT CLOSED SIDE CRY",
        "SAD CONCERNED",
    ),
    "Anger": (
        "ANGRY ANGRY_NATURAL FROWN_NATURAL",
        "DEFAULT SQUINT SIDE",
        "SERIOUS SAD GRIMACE CONCERNED",
    ),
    "Neutral": (
        "DEFAULT DEFAULT_NATURAL FLAT_NATURAL UNIBROW_NATURAL",
        "DEFAULT SIDE CLOSED EYE_ROLL",
        "DEFAULT SERIOUS TWINKLE",
    ),
}
TOON_HEAD = {
    "Surprise": ("raised raised neutral", "wide", "agape"),
    "Fear": ("sad", "wide humble", "agape angry"),
    "Disgust": ("angry neutral", "humble bow wink", "angry sad"),
    "Happiness": ("happy neutral raised", "happy bow humble", "laugh smile"),
    "Sadness": ("sad", "humble bow happy", "sad"),
    "Anger": ("angry", "happy wide humble", "sad agape angry"),
    "Neutral": ("neutral happy", "wide happy", "smile sad"),
}
TOON_PROGRAM = """
import {createInterface} from 'node:readline';
import {createAvatar} from '@dicebear/core';
import * as style from '@dicebear/toon-head';
for await (const line of createInterface({input: process.stdin}))
  console.log(JSON.stringify(createAvatar(style, JSON.parse(line)).toString()));
"""


def avataaars(labels: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """Yield one SVG per label, made by python-avatars."""
    import python_avatars as pa

    random.seed(int(rng.integers(2**31)))  # the package chooses other parts with it
    enums = (pa.EyebrowType, pa.EyeType, pa.MouthType)
    for label in labels:
        parts = zip(enums, AVATAAARS[label], strict=True)
        brows, eyes, mouth = (getattr(enum, rng.choice(names.split())) for enum, names in parts)
        hat, glasses = rng.random(2) < (0.15, 0.25)
        yield pa.Avatar.random(
            style=pa.AvatarStyle.TRANSPARENT,
            top=(pa.HatType if hat else pa.HairType).pick_random(),
            accessory=pa.AccessoryType.pick_random() if glasses else pa.AccessoryType.NONE,
            eyebrows=brows,
            eyes=eyes,
            mouth=mouth,
        ).render()


def toon_head(labels: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """Yield one SVG per label, made by DiceBear, whose packages must be in ./node_modules."""
    wanted = []
    for label in labels:
        brows, eyes, mouth = ([str(rng.choice(names.split()))] for names in TOON_HEAD[label])
        options = {"seed": str(rng.integers(2**31)), "beardProbability": 25}
        wanted.append(json.dumps({**options, "eyebrows": brows, "eyes": eyes, "mouth": mouth}))
    node = subprocess.run(
        ["node", "--input-type=module", "-e", TOON_PROGRAM],
        input="\n".join(wanted),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    yield from map(json.loads, node.stdout.splitlines())


class Kind(NamedTuple):
    """A renderer, and where the face is in its SVGs, in their own units."""

    draw: Callable[[Sequence[str], np.random.Generator], Iterator[str]]
    width: int  # of the SVG
    centre: tuple[int, int]  # of the face
    side: int  # length of the square around the face


KINDS = {
    "avataaars": Kind(avataaars, 264, (132, 115), 150),
    "toon-head": Kind(toon_head, 768, (384, 430), 430),
}


def photograph(svg: str, kind: Kind, size: int, rng: np.random.Generator) -> Image.Image:
    """Render an SVG as if photographed: moved, tilted, lit, sometimes blurred a little, noisy."""
    import resvg_py

    scale = size / kind.side
    width = round(kind.width * scale)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    colour = tuple(int(value) for value in rng.integers(40, 256, 3))
    ground = Image.new("RGBA", drawing.size, (*colour, 255))
    face = Image.alpha_composite(ground, drawing).convert("RGB")
    image = move(face, np.array(kind.centre) * scale, size, colour, rng)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    return Image.fromarray(light(np.asarray(image, np.float32) / 255, rng))


def move(
    face: Image.Image,
    centre: np.ndarray,
    size: int,
    colour: tuple[int, ...],
    rng: np.random.Generator,
) -> Image.Image:
    """Cut out the square around `centre`: shifted, rotated, scaled, possibly mirrored."""
    zoom, angle = rng.uniform(0.85, 1.15), np.deg2rad(rng.uniform(-12, 12))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
    turn = turn * (rng.choice([-1, 1]), 1)
    start = centre + rng.uniform(-0.06, 0.06, 2) * size - turn @ (size / 2, size / 2)
    matrix = (*turn[0], start[0], *turn[1], start[1])
    affine, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return face.transform((size, size), affine, matrix, bicubic, fillcolor=colour)


def light(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(S, S, 3) in [0, 1] -> uint8, with a light gradient, brightness, colour cast and noise."""
    place = np.linspace(-1, 1, len(x), dtype=np.float32)
    down, right = rng.uniform(-0.25, 0.25, 2)
    x = x * (1 + down * place[:, None, None] + right * place[None, :, None])
    x = x * rng.uniform(0.6, 1.2) * rng.uniform(0.9, 1.1, 3) + rng.uniform(-0.05, 0.1)
    x = x + rng.normal(0, rng.uniform(0.01, 0.05), x.shape)
    return (x.clip(0, 1) * 255).astype(np.uint8)


def labels_of(count: int, even: bool, rng: np.random.Generator) -> list[str]:
    """`count` labels in random order; the largest class gets the remainder from rounding."""
    shares = np.array([1.0] * len(CLASSES) if even else list(CLASSES.values()))
    counts = np.floor(shares / shares.sum() * count).astype(int)
    counts[np.argmax(shares)] += count - counts.sum()
    return [str(label) for label in rng.permutation(np.repeat(list(CLASSES), counts))]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the three splits."""
    parser = argparse.ArgumentParser(
        description="Make a data set of synthetic faces from avatar packages."
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="avataaars",
        help="drawn by python-avatars (avataaars) or, with node, by DiceBear (toon-head) "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="new folder, for train/CLASS, test/CLASS and unlabelled (required)",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=96,
        help="side length of the images in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--train", type=int, default=2800, help="number of training images (default: %(default)s)"
    )
    parser.add_argument(
        "--test", type=int, default=1400, help="number of test images (default: %(default)s)"
    )
    parser.add_argument(
        "--unlabelled",
        type=int,
        default=4000,
        help="number of unlabelled images (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"--output {args.output}: already exists; remove it or choose another folder")
    for module, package in MODULES.items():
        if find_spec(module) is None and (module != "python_avatars" or args.kind == "avataaars"):
            parser.error(f"needs {package}: pip install {package}")
    if args.kind == "toon-head" and not shutil.which("node"):
        parser.error("--kind toon-head: needs node, which is not installed")
    if args.kind == "toon-head" and not Path("node_modules/@dicebear/toon-head").is_dir():
        parser.error("--kind toon-head: run npm install @dicebear/core @dicebear/toon-head here")
    kind = KINDS[args.kind]
    counts = {"train": args.train, "test": args.test, "unlabelled": args.unlabelled}
    for number, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng([args.seed, number])
        labels = labels_of(count, split == "test", rng)
        for i, (label, svg) in enumerate(zip(labels, kind.draw(labels, rng), strict=True)):
            folder = args.output / split / ("" if split == "unlabelled" else label)
            folder.mkdir(parents=True, exist_ok=True)
            photograph(svg, kind, args.size, rng).save(folder / f"{i:05}.png")
        print(f"{split}: {count} images", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
