"""util.report.figures: grids of reconstructions and of attention maps."""

import numpy as np
import pytest

from util.report.figures import (
    COLUMNS,
    GAP,
    MARGIN,
    WRONG,
    Verdict,
    attention_grid,
    overlay,
    ratio_grid,
    reconstruction_grid,
    save_png,
)


def images(k=2, size=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (k, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("k", "size", "factor"), [(1, 224, 1), (3, 128, 1), (2, 32, 4), (1, 100, 2)]
)
def test_grid_shows_every_pixel_of_every_stage(k, size, factor):
    stages = [images(k, size, seed) for seed in range(len(COLUMNS))]
    grid = reconstruction_grid(*stages, title="a title", note="a note")
    side = size * factor
    assert grid.dtype == np.uint8
    assert grid.shape[1:] == (3 * side + 2 * GAP + 2 * MARGIN, 3)
    top = grid.shape[0] - MARGIN - k * side - (k - 1) * GAP
    for column, stage in enumerate(stages):
        for row in range(k):
            y, x = top + row * (side + GAP), MARGIN + column * (side + GAP)
            cell = grid[y : y + side : factor, x : x + side : factor]
            np.testing.assert_array_equal(cell, stage[row])
            # A label is above each column and does not reach into another.
        strip = grid[top - 16 : top, x : x + side]
        assert (strip < 128).any(), COLUMNS[column]
        assert (grid[top - 16 : top, x + side : x + side + GAP] == 255).all()


@pytest.mark.parametrize(("k", "rows"), [(5, 5), (6, 3), (7, 4), (8, 4)])
def test_many_images_are_arranged_in_two_blocks(k, rows):
    stages = [images(k, 128, seed) for seed in range(len(COLUMNS))]
    grid = reconstruction_grid(*stages, title="a title")
    blocks = 2 if rows < k else 1
    block = 3 * 128 + 2 * GAP + MARGIN
    assert grid.shape[1] == MARGIN + blocks * block
    top = grid.shape[0] - MARGIN - rows * 128 - (rows - 1) * GAP
    for column, stage in enumerate(stages):
        for i in range(k):
            y, x = top + i % rows * (128 + GAP), MARGIN + i // rows * block + column * (128 + GAP)
            np.testing.assert_array_equal(grid[y : y + 128, x : x + 128], stage[i])
            assert (grid[top - 16 : top, x : x + 128] < 128).any()  # both blocks have labels
    if blocks * rows > k:
        assert (grid[-MARGIN - 128 :, MARGIN + block :] == 255).all()


def test_grid_wraps_long_titles_inside_the_picture():
    stages = [images(1, 128)] * 3
    plain = reconstruction_grid(*stages, title="t")
    long = reconstruction_grid(*stages, title="word " * 60, note="x" * 300)
    assert long.shape[0] > plain.shape[0]
    assert (long[:, -MARGIN:] == 255).all()
    assert reconstruction_grid(*stages, title="").shape[0] < plain.shape[0]


def test_grid_refuses_what_it_cannot_show():
    good = images()
    for wrong in (good[:1], good.astype(np.float32), good[..., 0]):
        with pytest.raises(ValueError, match="uint8"):
            reconstruction_grid(good, good, wrong, title="")
    with pytest.raises(ValueError, match="3 arrays"):
        reconstruction_grid(good, good, title="")
    with pytest.raises(ValueError, match="K, H, W"):
        reconstruction_grid(*[good[:0]] * 3, title="")


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_png(images()[0], path)
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        save_png(np.zeros((2, 2, 7), np.complex64), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_an_overlay_is_coloured_by_the_map_and_shows_the_picture():
    image = images(1, 64)[0]
    heat = np.zeros((64, 64))
    heat[10:20, 40:50] = 1
    shown = overlay(image, heat)
    assert (shown.dtype, shown.shape) == (np.uint8, image.shape)
    red, green, blue = shown.astype(int).transpose(2, 0, 1)
    yellowness = red + green - 2 * blue
    assert yellowness[10:20, 40:50].min() > 2 * yellowness[heat == 0].max() + 100
    grey = image @ (0.299, 0.587, 0.114)
    for part in (heat == 0, heat == 1):
        assert np.corrcoef(grey[part], shown[part].sum(axis=1))[0, 1] > 0.99
    with pytest.raises(ValueError, match="map"):
        overlay(image, heat[:32])


@pytest.mark.parametrize("size", [64, 112, 224])
def test_mask_ratios_are_shown_beside_the_original(size):
    stages = [images(3, size, seed) for seed in range(5)]
    grid = ratio_grid(stages[0], [(0.5, *stages[1:3]), (0.75, *stages[3:])], "a title", "a note")
    side = {64: 128, 112: 112, 224: 112}[size]
    assert grid.shape[1] == 5 * side + 4 * GAP + 2 * MARGIN
    top = grid.shape[0] - MARGIN - 3 * side - 2 * GAP
    for column, stage in enumerate(stages):
        for row in range(3):
            y, x = top + row * (side + GAP), MARGIN + column * (side + GAP)
            cell = grid[y : y + side, x : x + side]
            if size == 224:  # each pixel is the mean of four
                means = stage[row].reshape(112, 2, 112, 2, 3).mean(axis=(1, 3))
                assert np.abs(cell - means).max() <= 0.5
            else:
                np.testing.assert_array_equal(cell[:: side // size, :: side // size], stage[row])
        assert (grid[top - 16 : top, x : x + side] < 128).any()  # its label
    with pytest.raises(ValueError, match="3 arrays"):
        ratio_grid(stages[0], [(0.5, stages[1], stages[2][:1])], "")


def test_attention_is_shown_beside_each_face_with_its_prediction():
    faces, heat = images(5, 112, 0), images(5, 112, 1)
    right = Verdict("Happy", "Happy", 0.9)
    wrong = Verdict("a very long name " * 9, "\ud800\0", 0.4)
    grid = attention_grid(faces, heat, [right] * 4 + [wrong], "a title", "a note")
    row_height = 112 + 44 + MARGIN
    assert grid.shape[1] == MARGIN + 3 * (224 + MARGIN)
    top = grid.shape[0] - 2 * row_height
    for i in range(5):
        y, x = top + i // 3 * row_height, MARGIN + i % 3 * (224 + MARGIN)
        np.testing.assert_array_equal(grid[y : y + 112, x : x + 112], faces[i])
        np.testing.assert_array_equal(grid[y : y + 112, x + 112 : x + 224], heat[i])
        caption = grid[y + 112 : y + 112 + 44, x : x + 224].astype(int)
        marked = (np.abs(caption - WRONG).max(axis=2) < 20).any()
        assert marked == (i == 4)
        assert (grid[y : y + row_height, x + 224 : x + 224 + MARGIN] == 255).all()
    assert attention_grid(faces[:1], heat[:1], [right], "").shape[1] == 2 * MARGIN + 224
