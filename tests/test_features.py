"""util.report.features: the map is reproducible, keeps neighbours, and is coloured by class."""

import warnings

import numpy as np
import pytest

from util.report.drawing import PALETTE
from util.report.features import feature_figure, project


def clusters(n=60, dims=80, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    return rng.normal(size=(n, dims)) + 8 * rng.normal(size=(3, dims))[labels], labels


def test_a_map_depends_on_its_seed_only_and_keeps_neighbours():
    x, labels = clusters()
    points = project(x, seed=1)
    assert (points.shape, points.dtype) == ((60, 2), np.float32)
    assert points.tobytes() == project(x, seed=1).tobytes()
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(60)
    assert (labels[distances.argmin(axis=1)] == labels).all()


@pytest.mark.parametrize(("n", "dims"), [(5, 3), (7, 192), (60, 2)])
def test_few_images_or_features_have_a_map_too(n, dims):
    x = np.random.default_rng(0).normal(size=(n, dims))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(project(x)).all()


def test_identical_images_lie_on_one_point():
    assert not project(np.ones((9, 4))).any()
    with pytest.raises(ValueError, match="at least 5"):
        project(np.ones((4, 4)))


def test_every_class_is_drawn_where_its_points_are():
    points = np.repeat([[0, 0], [10, 0], [0, 10]], 4, axis=0) + 0.01 * np.arange(12)[:, None]
    labels = np.repeat([0, 1, 9], 4)  # the last has the colour of class 1, but another shape
    image = feature_figure(points, labels, ["_a", "$b$"] + [f"{k}\ud800" for k in range(9)], "t")
    side = image.shape[1]  # the axes are square
    middles = {}
    for k, part in ((0, image[: side - 20]), (1, image[: side - 20])):
        colour = [int(PALETTE[k][i : i + 2], 16) for i in (1, 3, 5)]
        ys, xs = np.nonzero(np.abs(part.astype(int) - colour).max(axis=2) < 60)
        middles[k] = ys, xs
    assert middles[0][0].mean() > 0.8 * side  # at the bottom left
    assert middles[0][1].mean() < 0.2 * side
    ys, xs = middles[1]
    right, up = (xs > 0.8 * side), (xs < 0.2 * side)
    assert (right | up).all()
    assert ys[right].mean() > 0.8 * side
    assert ys[up].mean() < 0.2 * side
