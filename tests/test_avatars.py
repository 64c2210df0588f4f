"""benchmarks/avatars.py, as far as it works without the packages that make the faces."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import avatars


def rng():
    return np.random.default_rng(0)


def test_training_classes_are_imbalanced_and_test_classes_balanced():
    train, test = (avatars.labels_of(1000, even, rng()) for even in (False, True))
    assert len(train) == len(test) == 1000
    assert {train.count(name) / 1000 for name in avatars.CLASSES} == set(avatars.CLASSES.values())
    assert all(142 <= test.count(name) <= 148 for name in avatars.CLASSES)
    assert train != sorted(train)


def test_every_expression_has_combinations_that_no_other_has():
    for table in (avatars.AVATAAARS, avatars.TOON_HEAD):
        assert table.keys() == avatars.CLASSES.keys()
        faces = {
            name: {(b, e, m) for b in brows.split() for e in eyes.split() for m in mouths.split()}
            for name, (brows, eyes, mouths) in table.items()
        }
        for name, combinations in faces.items():
            others = set().union(*(faces[other] for other in faces if other != name))
            assert combinations - others, name


@pytest.mark.parametrize("seed", range(5))
def test_a_face_stays_near_the_middle(seed):
    face = Image.new("RGB", (200, 200), (0, 0, 0))
    face.paste((255, 255, 255), (110, 70, 130, 90))  # its centre at (120, 80)
    moved = avatars.move(face, np.array([120, 80]), 96, (0, 0, 0), np.random.default_rng(seed))
    weight = np.asarray(moved, float)[..., 0]
    assert weight.shape == (96, 96)
    for axis in (0, 1):
        place = (weight.sum(1 - axis) * np.arange(96)).sum() / weight.sum()
        assert abs(place - 47.5) < 0.06 * 96 / 0.85 + 1


def test_light_and_noise_leave_the_image_recognisable():
    x = np.tile(np.linspace(0.1, 0.9, 96, dtype=np.float32)[:, None, None], (1, 96, 3))
    y = avatars.light(x, rng())
    assert y.shape == (96, 96, 3)
    assert y.dtype == np.uint8
    assert np.corrcoef(x.ravel(), y.ravel())[0, 1] > 0.9
    assert np.std(y[48, :, 0].astype(float)) > 1


def test_missing_packages_and_an_existing_output_are_reported_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(avatars, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        avatars.main(["--output", str(tmp_path / "faces")])
    assert stopped.value.code == 2
    assert "pip install resvg-py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        avatars.main(["--output", str(tmp_path)])
    assert "already exists" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
