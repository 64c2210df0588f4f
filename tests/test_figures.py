"""util.figures: grids of reconstructions, learning curves and confusion matrices."""

import warnings
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from util.figures import (
    COLUMNS,
    DPI,
    GAP,
    MARGIN,
    confusion_figure,
    learning_curves,
    overlay,
    reconstruction_grid,
    save_png,
)


def images(k=2, size=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (k, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("k", "size", "factor"), [(1, 224, 1), (3, 128, 1), (2, 32, 4), (1, 100, 2)]
)
def test_grid_shows_every_pixel_of_every_stage(k, size, factor):
    stages = [images(k, size, seed) for seed in range(4)]
    grid = reconstruction_grid(*stages, title="a title", note="a note")
    side = size * factor
    assert grid.dtype == np.uint8
    assert grid.shape[1:] == (4 * side + 3 * GAP + 2 * MARGIN, 3)
    top = grid.shape[0] - MARGIN - k * side - (k - 1) * GAP
    for column, stage in enumerate(stages):
        for row in range(k):
            y, x = top + row * (side + GAP), MARGIN + column * (side + GAP)
            cell = grid[y : y + side : factor, x : x + side : factor]
            np.testing.assert_array_equal(cell, stage[row])
            # A label stands above each column and reaches into no other.
        strip = grid[top - 16 : top, x : x + side]
        assert (strip < 128).any(), COLUMNS[column]
        assert (grid[top - 16 : top, x + side : x + side + GAP] == 255).all()


@pytest.mark.parametrize(("k", "rows"), [(5, 5), (6, 3), (7, 4), (8, 4)])
def test_many_images_stand_in_two_blocks(k, rows):
    stages = [images(k, 128, seed) for seed in range(4)]
    grid = reconstruction_grid(*stages, title="a title")
    blocks = 2 if rows < k else 1
    block = 4 * 128 + 3 * GAP + MARGIN
    assert grid.shape[1] == MARGIN + blocks * block
    top = grid.shape[0] - MARGIN - rows * 128 - (rows - 1) * GAP
    for column, stage in enumerate(stages):
        for i in range(k):
            y, x = top + i % rows * (128 + GAP), MARGIN + i // rows * block + column * (128 + GAP)
            np.testing.assert_array_equal(grid[y : y + 128, x : x + 128], stage[i])
            assert (grid[top - 16 : top, x : x + 128] < 128).any()  # a label over both blocks
    if blocks * rows > k:
        assert (grid[-MARGIN - 128 :, MARGIN + block :] == 255).all()


def test_grid_wraps_long_titles_inside_the_picture():
    stages = [images(1, 128)] * 4
    plain = reconstruction_grid(*stages, title="t")
    long = reconstruction_grid(*stages, title="word " * 60, note="x" * 300)
    assert long.shape[0] > plain.shape[0]
    assert (long[:, -MARGIN:] == 255).all()
    assert reconstruction_grid(*stages, title="").shape[0] < plain.shape[0]


def test_grid_refuses_what_it_cannot_show():
    good = images()
    for wrong in (good[:1], good.astype(np.float32), good[..., 0]):
        with pytest.raises(ValueError, match="uint8"):
            reconstruction_grid(good, good, good, wrong, title="")
    with pytest.raises(ValueError, match="four"):
        reconstruction_grid(good, good, title="")
    with pytest.raises(ValueError, match="K, H, W"):
        reconstruction_grid(*[good[:0]] * 4, title="")


def test_saving_replaces_whole_files_only(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_png(images()[0], path)
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        save_png(np.zeros((2, 2, 7), np.complex64), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "losses",
    [[1.0], [0.0, 0.0], [2.0] * 5, [1e-29, 1e29], [-1.0, 1.0], [5e-324, 0.0], [1.0, 1.0 + 1e-15]],
)
def test_curves_of_awkward_values_are_drawn_inside_the_panel(losses):
    (svg,) = learning_curves([{"epoch": e, "train_loss": y} for e, y in enumerate(losses)])
    root = ET.fromstring(svg)
    width, height = map(float, root.get("viewBox").split()[2:])
    dots = [e for e in root.iter() if e.tag.endswith("use")]
    assert len(dots) == len(losses) + 1  # the legend's
    assert all(0 <= float(e.get("x")) <= width and 0 <= float(e.get("y")) <= height for e in dots)
    numbers = [float(e.get(k)) for e in root.iter() if e.tag.endswith("text") for k in "xy"]
    assert all(0 <= number <= width for number in numbers)


def test_loss_is_logarithmic_only_where_it_spans_a_decade():
    def heading(*losses):
        (svg,) = learning_curves([{"epoch": e, "train_loss": y} for e, y in enumerate(losses)])
        return ET.fromstring(svg).get("aria-label")

    assert heading(1.0, 0.1) == heading(1e6, 1e-6) == "Loss, log scale"
    assert heading(1.0, 0.2) == heading(1.0, 0.0) == heading(1.0, -0.1) == "Loss"


def test_epochs_are_whole_and_names_are_shown_as_they_stand():
    log = [{"epoch": e, "test__a": 0.5, "test_$x^2$\ud800\0": 0.25} for e in range(3)]
    (svg,) = learning_curves(log)
    text = [e.text for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]
    assert text[:3] == ["0", "1", "2"]
    assert {"test__a 0.5", "test_$x^2$?? 0.25"} <= set(text)


def test_curves_of_nothing_are_empty_and_of_thousands_short():
    assert learning_curves([]) == []
    assert learning_curves([{"epoch": 0, "note": "x", "flag": True}]) == []
    log = [
        {"epoch": e, "train_loss": 1 / (1 + e), "train_lr": 1e-4 * e, "images_per_s": 400.0}
        | {"test_acc1": 50.0, "test_top2": 60.0, "test_x": 0.3}
        for e in range(20_000)
    ]
    panels = learning_curves(log)
    assert sum(map(len, panels)) < 200_000
    titles = {ET.fromstring(svg).get("aria-label") for svg in panels}
    assert titles >= {"Accuracy, %", "Test, 0–100", "Test, 0–1", "Images a second"}


def test_metrics_have_panels_of_their_own_and_keep_their_colours():
    keys = ["train_loss", "test_loss", "test_acc1", "test_uar", "test_f1", "test_acc1_ema"]
    keys += ["test_uar_ema", "val_acc1", "val_uar", "probe_knn_acc1", "probe_linear_acc1"]
    keys += ["probe_knn_uar", "probe_linear_uar"]
    log = [{"epoch": e, **dict.fromkeys(keys, 20.0 + e)} for e in range(3)]
    panels, blue = {}, []
    for svg in learning_curves(log):
        root = ET.fromstring(svg)
        text = [e.text for e in root.iter() if e.tag.endswith("text")]
        panels[root.get("aria-label")] = [t.split(" ")[0] for t in text if t.endswith(" 22")]
        if any("stroke: #3b82f6" in e.get("style", "") for e in root.iter()):
            blue.append(root.get("aria-label"))
    assert blue == ["Loss", "Accuracy on frozen features, %", "UAR on frozen features, %"]
    assert panels == {
        "Loss": ["train", "test"],
        "Accuracy, %": ["test", "test_ema", "val"],
        "Mean class accuracy (UAR), %": ["test", "test_ema", "val"],
        "Macro-F1, %": ["test"],
        "Accuracy on frozen features, %": ["probe_knn", "probe_linear"],
        "UAR on frozen features, %": ["probe_knn", "probe_linear"],
    }


def test_no_panel_holds_more_lines_than_there_are_colours():
    log = [{"epoch": e, **{f"test_{c}": 0.5 for c in "abcdefghi"}} for e in range(3)]
    panels = [ET.fromstring(svg) for svg in learning_curves(log)]
    assert [p.get("aria-label") for p in panels] == ["Test, 0–1", "Test, 0–1 (2)", "Test, 0–1 (3)"]
    labels = [e.text for p in panels for e in p.iter() if e.tag.endswith("text")]
    assert {f"test_{c} 0.5" for c in "abcdefghi"} <= set(labels)


@pytest.mark.parametrize("k", [2, 7])
def test_confusion_figure_has_truth_downwards_and_predictions_rightwards(k):
    def middle(row, column):
        """Where the one cell that holds all images is: the only one in the darkest shade."""
        counts = np.zeros((k, k), int)
        counts[row, column] = 5
        image = confusion_figure(counts, [f"class {i}" for i in range(k)], "a title")
        assert (image.dtype, image.shape[2]) == (np.uint8, 3)
        ys, xs = np.nonzero((image == (0x12, 0x2F, 0x73)).all(axis=2))
        assert np.ptp(ys) == pytest.approx(np.ptp(xs), abs=2)
        return np.array([np.ptp(ys) / 2 + ys.min(), np.ptp(xs) / 2 + xs.min()])

    first, last, side = middle(0, 0), k - 1, 0.85 * DPI
    np.testing.assert_allclose(middle(last, 0) - first, (last * side, 0), atol=2)
    np.testing.assert_allclose(middle(0, last) - first, (0, last * side), atol=2)


def test_confusion_figure_of_many_classes_stays_on_a_screen():
    counts = np.random.default_rng(0).integers(0, 2000, (20, 20))
    height, width, _ = confusion_figure(counts, [f"class {i}" for i in range(20)], "t").shape
    assert max(height, width) < 1500


def test_confusion_figure_shows_awkward_names_and_empty_classes():
    names = ["$x^2$", "\udce9\0漢", "a class name that does not come to an end at all"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = confusion_figure([[0, 0, 0], [0, 9, 0], [1, 10**6, 0]], names, "word " * 60)
    assert image.shape[1] < 1000
    assert (image[:, -5:] == 255).all()  # nothing is cut off
    assert (image[:, :5] == 255).all()


def test_an_overlay_is_hot_where_the_heat_is_and_shows_the_picture_through():
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
