"""Synthetic faces: functions of their position, balanced, neither trivial nor impossible."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datasets.labels import EXPRESSIONS
from datasets.registry import open_labelled
from datasets.synthetic import __main__ as program
from datasets.synthetic.generator import (
    SyntheticFaces,
    draw,
    parse_synthetic,
    sample_actions,
    sample_condition,
    sample_identity,
)
from finetuned import RAF_NAMES
from runs import run_here
from util.errors import BAD_INPUT
from util.seeding import FACE, generator

ROOT = Path(__file__).resolve().parent.parent


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


def portrait(number, label, size=96):
    """A face with any expression, otherwise the same: unoccluded, frontal, without noise."""
    condition = replace(
        sample_condition(generator(FACE, 5, 0, number)),
        **{"occlusion": "none", "noise": 0.0, "blur": 0.0, "yaw": 0.0, "pitch": 0.0, "roll": 0.0},
        shift=np.zeros(2),
        scale=0.36,
    )
    who = replace(sample_identity(5, number), beard="none", glasses="none")
    actions = sample_actions(generator(FACE, 5, 9, number), label)
    image = draw(who, condition, actions, size, generator(FACE, 5, 8, number))
    return image.astype(np.float32)


def test_an_image_is_a_function_of_seed_split_and_index():
    a, b = SyntheticFaces(20, 48, seed=3), SyntheticFaces(20, 48, seed=3)
    backwards = {i: digest(b.image(i)) for i in reversed(range(10))}
    assert [digest(a.image(i)) for i in range(10)] == [backwards[i] for i in range(10)]
    assert len(set(backwards.values())) == 10


def test_another_process_makes_the_same_images():
    code = (
        "import hashlib; from datasets.synthetic.generator import SyntheticFaces as F;"
        "f = F(9, 64, 7, 'test');"
        "print(hashlib.sha256(b''.join(f.image(i).tobytes() for i in range(6))).hexdigest())"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    faces = SyntheticFaces(9, 64, 7, "test")
    here = hashlib.sha256(b"".join(faces.image(i).tobytes() for i in range(6))).hexdigest()
    assert ran.stdout.decode().strip() == here


def test_images_labels_and_names_do_not_depend_on_the_count():
    few, many = SyntheticFaces(11, 32), SyntheticFaces(5_000_000, 32)
    for i in range(11):
        assert few.label(i) == many.label(i)
        assert few.identity(i) == many.identity(i)
        assert few.name(i) == many.name(i)
    np.testing.assert_array_equal(few.image(10), many.image(10))
    assert few.digest != many.digest


def test_seed_and_split_change_the_image():
    base = SyntheticFaces(8, 32).image(0)
    for other in (SyntheticFaces(8, 32, seed=1), SyntheticFaces(8, 32, split="test")):
        assert np.abs(base.astype(int) - other.image(0)).mean() > 5


def test_train_and_test_share_no_identity():
    pools = [
        {faces.identity(i) for i in range(3000)}
        for faces in (SyntheticFaces(3000), SyntheticFaces(3000, split="test"))
    ]
    assert not pools[0] & pools[1]
    assert all(len(pool) > 1500 for pool in pools)


def test_every_eight_images_hold_every_class_once():
    faces = SyntheticFaces(800)
    labels = np.array([faces.label(i) for i in range(800)]).reshape(-1, 8)
    np.testing.assert_array_equal(np.sort(labels, 1), np.tile(np.arange(8), (100, 1)))
    assert len({tuple(row) for row in labels}) > 90, "the order of classes must vary"


def test_the_label_changes_only_facial_actions():
    """Condition and identity are sampled without it, noise after equally many random numbers."""
    states = []
    for label in range(8):
        rng = generator(FACE, 0, 0, 42)
        sample_actions(rng, label)
        states.append(rng.random())
    assert len(set(states)) == 1


@pytest.mark.parametrize("label", range(1, 8))
def test_the_expression_changes_the_face_but_not_its_surroundings(label):
    changed = np.mean(
        [np.abs(portrait(n, label) - portrait(n, 0)).mean(-1) for n in range(4)], axis=0
    )
    border = np.concatenate([changed[:, :5].ravel(), changed[:, -5:].ravel()])
    assert border.max() == 0
    eyes_and_mouth = max(changed[30:50, 30:66].mean(), changed[58:86, 34:62].mean())
    assert eyes_and_mouth > 3 * changed[:18].mean() + 1


def test_a_face_is_the_same_at_every_size():
    small = SyntheticFaces(30, 64).image(4).astype(np.float32)
    large = SyntheticFaces(30, 512).image(4).astype(np.float32)
    large = large.reshape(64, 8, 64, 8, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.97
    other = SyntheticFaces(30, 64).image(5).astype(np.float32)
    assert np.corrcoef(other.ravel(), large.ravel())[0, 1] < 0.9


@pytest.mark.parametrize("size", [16, 17, 33, 96, 1024])
def test_shape_and_range(size):
    image = SyntheticFaces(10, size).image(3)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert 30 < image.mean() < 220
    assert image.std() > 15


def features(faces, count):
    """Grey images (count, 1024) with zero mean and unit deviation, and a constant; labels."""
    x = np.stack([faces.image(i).mean(-1).ravel() for i in range(count)])
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    y = np.array([faces.label(i) for i in range(count)])
    return np.c_[x, np.full(count, 10.0)], y


@pytest.fixture(scope="module")
def drawn():
    """Features and labels of 500 training and 200 test images, in the wild and in the lab."""
    counts = {"train": 500, "test": 200}
    return {
        lab: [features(SyntheticFaces(n, 32, split=s, lab=lab), n) for s, n in counts.items()]
        for lab in (False, True)
    }


def linear_accuracy(train, test):
    """Accuracy of ridge regression."""
    (x, y), (x_test, y_test) = train, test
    dual = np.linalg.solve(x @ x.T + 300 * np.eye(len(x)), np.eye(8)[y])
    return ((x_test @ (x.T @ dual)).argmax(1) == y_test).mean()


def expression_share(x, y):
    """Share of the pixels' variance between expressions, minus the share expected by chance."""
    x = x - x.mean(0)
    between = sum((y == k).sum() * (x[y == k].mean(0) ** 2).sum() for k in range(8))
    return between / (x**2).sum() - 7 / (len(x) - 1)


def test_a_linear_probe_is_above_chance_and_far_from_perfect(drawn):
    wild = linear_accuracy(*drawn[False])
    assert 0.19 < wild < 0.7, "chance is 0.125; 0.28 was measured"
    assert wild + 0.06 < linear_accuracy(*drawn[True]) < 0.95, "a laboratory makes it easier"


def test_expressions_explain_more_variance_in_the_lab(drawn):
    wild, lab = (expression_share(*drawn[place][0]) for place in (False, True))
    assert 0 < 2 * wild < lab, "0.005 and 0.016 were measured"


def test_lab_faces_have_the_same_identities_and_expressions():
    wild, lab = SyntheticFaces(16, 48), SyntheticFaces(16, 48, lab=True)
    for i in range(16):
        assert (wild.label(i), wild.identity(i)) == (lab.label(i), lab.identity(i))
        assert not np.array_equal(wild.image(i), lab.image(i))


def test_synthetic_paths_are_parsed():
    assert parse_synthetic("synthetic") == (False, (None, None))
    assert parse_synthetic("synthetic-lab:400:0") == (True, (400, 0))
    for other in ("synthetic-", "synthetic:", "synthetic:1:2:3", "faces", "synthetic-lab:x"):
        assert parse_synthetic(other) is None


def test_wrong_arguments_are_refused():
    for wrong in ({"split": "val"}, {"size": 8}, {"size": 2048}, {"count": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SyntheticFaces(**wrong)
    faces = SyntheticFaces(4, 32)
    for ask in (faces.image, faces.label, faces.name, faces.identity):
        for index in (-1, 4):
            with pytest.raises(IndexError):
                ask(index)


def test_different_data_sets_have_different_digests():
    assert SyntheticFaces(100).name(17) == "synthetic/train/000017"
    kinds = [{}, {"size": 64}, {"seed": 1}, {"split": "test"}, {"count": 9}, {"lab": True}]
    assert len({SyntheticFaces(**kind).digest for kind in kinds}) == len(kinds)
    assert EXPRESSIONS[0] == "Neutral"
    assert len(EXPRESSIONS) == 8


def export(capfd, *options):
    """Run the program; -> exit code, what it printed and its messages."""
    code = run_here(program, [str(option) for option in options])
    return code, *capfd.readouterr()


def test_an_exported_data_set_is_read_as_rafdb(tmp_path, capfd):
    folder = tmp_path / "faces"
    code, out, _ = export(capfd, "--export", folder, "--count", "16:9", "--seed", 3)
    assert (code, out) == (0, f"{folder}: 16 training and 9 test images as RAF-DB\n")
    data = open_labelled(str(folder))
    assert (data.name, data.classes) == ("rafdb", RAF_NAMES)
    assert data.title == "synthetic faces in RAF-DB's layout"
    assert not data.published
    for split, count in (("train", 16), ("test", 9)):
        images = data.splits[split]
        faces = SyntheticFaces(24, 100, 3, split, lab=True)
        kept = [i for i in range(24) if EXPRESSIONS[faces.label(i)] != "Contempt"][:count]
        names = [RAF_NAMES[label] for label in images.labels]
        assert names == [EXPRESSIONS[faces.label(i)] for i in kept]
        assert max(names.count(name) for name in set(names)) <= count // 7 + 1
        for k in (0, count - 1):  # up to what JPEG changes
            difference = np.abs(images.source.image(k).astype(int) - faces.image(kept[k]))
            assert difference.mean() < 5


def test_an_export_never_writes_among_other_files(tmp_path, capfd):
    (tmp_path / "mine.txt").write_text("")
    code, _, err = export(capfd, "--export", tmp_path, "--count", "1:1")
    assert code == BAD_INPUT
    assert "is not empty; name a new folder" in err
    code, _, err = export(capfd, "--export", tmp_path / "mine.txt", "--count", "1:1")
    assert code == BAD_INPUT
    assert "is a file or inside one; name another folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--count", "9:9"], "--count: needs --export"),
        (["--export", "x", "--rows", "2"], "--rows: is for a contact sheet, not for --export"),
        (["--export", "x", "--count", "9"], "two numbers from 1 to 99999, such as 2000:800"),
        (["--export", "x", "--count", "0:9"], "two numbers from 1 to 99999"),
        (["--export", "x", "--layout", "other"], "--layout"),
        (["--output", "no/such/folder/a.png", "--rows", "1", "--cell", "16"], "cannot be written"),
    ],
)
def test_wrong_options_of_the_program_give_one_error_line(
    options, told, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, _, err = export(capfd, *options)
    assert code != 0
    (line,) = err.splitlines()
    assert told in line
    assert list(tmp_path.iterdir()) == []
