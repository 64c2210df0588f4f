"""The Python API: `from inference import Predictor`."""

import csv
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

import main_predict
import odd_images
from datasets.decode import UnreadableImage
from finetuned import RAF_NAMES
from inference import Predictor
from inference.predict import DTYPES
from models_saved import open_classifier
from runs import ROOT, run_here
from util.errors import BadInput, Fault

FAMILIES = ("vit", "convnext", "resnet")


@pytest.fixture(scope="module")
def checkpoint(finetune):
    return finetune("vit") / "checkpoint-best.pth"


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint, "cpu")


@pytest.fixture(scope="module")
def people(photographs):
    return photographs / "people"


def assert_same_faces(ours, theirs):
    """Equal, except for the last bits of probabilities."""
    assert [face[:3] for face in ours] == [face[:3] for face in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_a_face_has_what_a_row_of_the_program_has(predictor, checkpoint, people, tmp_path):
    argv = ["--checkpoint", checkpoint, people, "--num_workers", "0", "--device", "cpu"]
    argv += ["--output", tmp_path / "rows.csv", "--features", tmp_path / "features.npz"]
    assert run_here(main_predict, list(map(str, argv))) == 0
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    paths = sorted(people.iterdir())
    faces = [face for picture in predictor(paths) for face in picture]
    assert len(faces) == len(rows) == 3
    for face, row in zip(faces, rows, strict=True):
        assert list(face.box) == [int(row[n]) for n in ("left", "top", "width", "height")]
        assert face.score == pytest.approx(float(row["score"]), abs=1e-6)
        assert face.label == row["label"]
        assert tuple(face.probabilities) == RAF_NAMES
        shares = [float(row[f"p_{name}"]) for name in RAF_NAMES]
        assert list(face.probabilities.values()) == pytest.approx(shares, abs=2e-6)
    with np.load(tmp_path / "features.npz") as held:
        ours = np.concatenate(predictor.features(paths))
        assert ours.dtype == np.float32
        assert abs(ours - held["features"]).max() < 1e-5


def test_a_picture_may_be_a_path_an_image_or_pixels(predictor, people):
    path = people / "astronaut.jpg"
    (face,) = predictor(str(path))
    pixels = np.asarray(Image.open(path))
    turned = Image.fromarray(np.rot90(pixels, -1))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90° to the left
    turned.info["exif"] = exif.tobytes()
    clear = np.dstack([pixels, np.full_like(pixels[..., 0], 255)])
    backwards = np.ascontiguousarray(pixels[:, ::-1])[:, ::-1]
    assert not pixels.flags.writeable
    kinds = [path, Image.open(path), turned, pixels, clear, backwards]
    for kind, faces in zip(kinds, predictor(iter(kinds)), strict=True):
        assert_same_faces([face], faces)
        assert_same_faces([face], predictor(kind))
    assert_same_faces([face], predictor(np.stack([pixels] * 2))[1])
    grey = np.asarray(Image.open(path).convert("L"))
    as_colours = predictor(np.repeat(grey[..., None], 3, axis=2))
    assert_same_faces(predictor(grey), as_colours)


def test_a_picture_without_a_face_has_none(predictor, photographs):
    grey = photographs / "grey.png"
    assert predictor(grey) == []
    assert predictor.features(grey).shape == (0, 192)
    assert predictor([]) == predictor.features([]) == []
    assert [len(faces) for faces in predictor([grey, astronaut(), grey])] == [0, 1, 0]


def test_pictures_that_cannot_be_read_are_named(predictor, photographs, people):
    good, bad = people / "astronaut.jpg", photographs / "page.jpg"
    with pytest.raises(UnreadableImage, match=r"page\.jpg: is a web page"):
        predictor([good, bad])
    half = Image.open(io.BytesIO(good.read_bytes()[:9000]))  # opened, but not decoded
    with pytest.raises(UnreadableImage, match=r"picture 1: cannot be decoded \(OSError\)"):
        predictor([good, half])
    with pytest.warns(Image.DecompressionBombWarning):
        bomb = Image.open(io.BytesIO(odd_images.bomb(10_000)))
    with pytest.raises(UnreadableImage, match=r"picture 0: has more than .* pixels"):
        predictor.features(bomb)
    found = [one for one, _ in predictor.stream([good, bad, photographs / "gone.jpg", good])]
    assert [len(one.faces) for one in found] == [1, 0, 0, 1]
    assert [bool(one.problem) for one in found] == [False, True, True, False]
    assert found[0].size == (512, 512)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (np.zeros((4, 4, 3)), r"shape \(4, 4, 3\) and type float64: give uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros(5, np.uint8), r"shape \(5,\)"),
        (np.zeros((1, 4, 4, 1), np.uint8), r"shape \(4, 4, 1\)"),
        (b"\xff\xd8\xff", "type bytes: give a path"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "type Tensor: give a path"),
        ([None], "type NoneType: give a path"),
    ],
)
def test_what_is_no_picture_is_bad_input(picture, said, predictor):
    with pytest.raises(BadInput, match=said):
        predictor(picture)


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_can_share_a_predictor(family, finetune, people):
    """With pictures of different sizes at the same time; each result as if alone."""
    predictor = Predictor(finetune(family) / "checkpoint-best.pth", "cpu")
    image = Image.open(people / "two.jpg")
    pictures = [image.resize((600 + 9 * k, 400 + 6 * k)) for k in range(8)]
    alone = [predictor(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(predictor, pictures * 2))
    assert sum(map(len, alone)) >= 8
    for ours, theirs in zip(together, alone * 2, strict=True):
        assert_same_faces(ours, theirs)


def test_workers_find_the_same_faces(predictor, people):
    paths = sorted(people.iterdir()) * 2
    alone = predictor(paths)  # so this process has opened a detector
    for (_, ours), theirs in zip(predictor.stream(paths, workers=2), alone, strict=True):
        shares = [list(face.probabilities.values()) for face in theirs]
        assert abs(ours.probabilities - np.array(shares)).max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_predicts_nearly_the_same(family, finetune, people):
    saved = open_classifier(finetune(family) / "checkpoint-best.pth")
    exact, path = Predictor(saved, "cpu"), people / "two.jpg"
    for dtype in ("bfloat16", torch.bfloat16):
        short = Predictor(saved, torch.device("cpu"), dtype=dtype)
        difference = short.features(path) - exact.features(path)
        assert 0 < abs(difference).max() < 0.05 * abs(exact.features(path)).max()
        for ours, theirs in zip(short(path), exact(path), strict=True):
            assert ours.box == theirs.box
            assert ours.probabilities == pytest.approx(theirs.probabilities, abs=0.02)
            assert sum(ours.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_options_are_those_of_the_program(checkpoint, people):
    path, usual = people / "two.jpg", Predictor(checkpoint, "cpu")
    (first, second) = usual(path)
    low, high = sorted((first.score, second.score))
    assert Predictor(checkpoint, "cpu", min_score=1.0)(path) == []
    some = Predictor(checkpoint, "cpu", min_score=(low + high) / 2)(path)
    assert len(some) == (1 if low < high else 2)
    wide = Predictor(checkpoint, "cpu", face_margin=1.0, batch_size=1)
    assert wide(path)[0].box == first.box
    assert abs(wide.features(path) - usual.features(path)).max() > 1e-3
    whole = Predictor(checkpoint, "cpu", detector="none", classes=list("abcdefg"))
    (face,) = whole(path)
    assert (face.box, face.score) == ((0, 0, 768, 512), 1.0)
    assert list(face.probabilities) == list("abcdefg")
    assert face.label == max(face.probabilities, key=face.probabilities.get)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float64"}, f"dtype float64: choose from {', '.join(DTYPES)}"),
        ({"dtype": torch.float16}, "dtype float16: needs a GPU"),
        ({"detector": "dlib"}, "detector dlib: no such detector; use mtcnn or none"),
        ({"face_margin": 3}, "face_margin 3: must be from 0 to 2"),
        ({"face_margin": 0.1, "detector": "none"}, "face_margin: without a detector"),
        ({"classes": ["a"]}, "has 7 classes, but --classes names 1"),
        ({"device": "tpu9"}, "--device tpu9"),
    ],
)
def test_arguments_that_cannot_work_are_bad_input(options, said, checkpoint):
    with pytest.raises(BadInput, match=said):
        Predictor(checkpoint, **{"device": "cpu", **options})


def test_an_open_classifier_has_its_classes_already(checkpoint):
    with pytest.raises(BadInput, match="name them in open_classifier"):
        Predictor(open_classifier(checkpoint), "cpu", classes=list("abcdefg"))


def test_how_faces_are_cropped_is_said(checkpoint):
    assert "0.15 (assumed" in Predictor(checkpoint, "cpu").cropping
    assert "used whole" in Predictor(checkpoint, "cpu", detector="none").cropping


def test_files_that_are_no_classifier_are_bad_input(pretrained, tmp_path):
    with pytest.raises(BadInput, match="has no classifier head; fine-tune it first"):
        Predictor(pretrained["vit"])
    with pytest.raises(BadInput, match=r"gone\.pth: no such file"):
        Predictor(tmp_path / "gone.pth")


def test_outputs_that_are_not_finite_are_a_fault(checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    saved["model"]["head.weight"][:] = 3e38
    torch.save(saved, tmp_path / "huge.pth")
    with pytest.raises(Fault, match=r"huge\.pth: its outputs for a picture are not finite"):
        Predictor(tmp_path / "huge.pth", "cpu", detector="none")(astronaut())


def test_importing_the_package_does_not_import_torch():
    code = "import inference, sys; assert 'torch' not in sys.modules; inference.Predictor"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(ImportError, match="Predicter"):
        exec("from inference import Predicter")


def test_a_path_may_be_any_path_like_object(predictor, people, monkeypatch):
    monkeypatch.chdir(people)
    assert_same_faces(predictor(Path("astronaut.jpg")), predictor("astronaut.jpg"))
    with pytest.raises(UnreadableImage):
        predictor("")
