"""util.report.curves: the curves of one run and of several runs."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from util.report.curves import compared_curves, learning_curves
from util.report.drawing import PALETTE


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


def test_epochs_are_whole_numbers_and_names_are_shown_unchanged():
    log = [{"epoch": e, "test__a": 0.5, "test_$x^2$\ud800\0": 0.25} for e in range(3)]
    (svg,) = learning_curves(log)
    text = [e.text for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]
    assert text[:3] == ["0", "1", "2"]
    assert {"test__a 0.5", "test_$x^2$?? 0.25"} <= set(text)


def test_an_empty_log_has_no_curves_and_a_long_one_small_curves():
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
    assert titles >= {"Accuracy, %", "Test, 0–100", "Test, 0–1", "Images per second"}


def test_every_metric_has_its_panel_and_colours_stay_the_same():
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


def test_no_panel_has_more_lines_than_there_are_colours():
    log = [{"epoch": e, **{f"test_{c}": 0.5 for c in "abcdefghi"}} for e in range(3)]
    panels = [ET.fromstring(svg) for svg in learning_curves(log)]
    assert [p.get("aria-label") for p in panels] == ["Test, 0–1", "Test, 0–1 (2)", "Test, 0–1 (3)"]
    labels = [e.text for p in panels for e in p.iter() if e.tag.endswith("text")]
    assert {f"test_{c} 0.5" for c in "abcdefghi"} <= set(labels)


def log(*values, key="train_loss"):
    return [{"epoch": e, key: value} for e, value in enumerate(values)]


def drawn(image, k):
    """Where a picture has the colour of run k, below the legend."""
    colour = [int(PALETTE[k][i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(image.astype(int) - colour).max(axis=2) < 60)[60:]


def test_runs_are_compared_in_the_same_panel():
    image = compared_curves({"first": log(4, 3, 2), "second": log(2, 1.5, 1)})
    assert (image.dtype, image.shape[2]) == (np.uint8, 3)
    # The first is above the second everywhere.
    tops = [np.nonzero(drawn(image, k))[0] for k in (0, 1)]
    assert tops[0].mean() < tops[1].mean()
    assert not drawn(image, 2).any()


def test_every_metric_that_a_run_has_gets_a_panel():
    one = compared_curves({"a": log(1, 2)})
    three = [{"epoch": 0, "train_loss": 1.0, "test_acc1": 50.0, "test_uar": 40.0}]
    many = compared_curves({"a": log(1, 2), "b": three})
    assert many.shape[0] > 1.5 * one.shape[0]
    assert many.shape[1] > 1.5 * one.shape[1]


def test_comparing_accepts_any_name_and_leaves_out_values_that_are_not_numbers():
    odd = {"_a": log(float("nan"), None, 3.0, 1e300, True), "$x^2$\ud800": log("4"), "c": []}
    assert compared_curves(odd) is not None
    assert compared_curves({"a": log("1"), "b": []}) is None
    assert compared_curves({"a": log(*range(5000))}).shape == compared_curves({"a": log(1)}).shape


def test_more_runs_than_colours_differ_in_their_dashes():
    image = compared_curves({f"run {k}": log(*[k] * 40) for k in range(2 * len(PALETTE))})
    shares = []
    for row in drawn(image, 0):
        columns = np.nonzero(row)[0]
        if len(columns) > 50:
            shares.append(len(columns) / (np.ptp(columns) + 1))
    assert max(shares) > 0.95  # a solid line
    assert min(shares) < 0.9  # a dashed one
