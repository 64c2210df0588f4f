"""What the checkpoint of a classifier says about its own training."""

import pytest

from datasets.labels import EXPRESSIONS
from models_saved import Preprocessing, SavedClassifier
from training.recorded import chance_warning, described, recorded_accuracy

BEST = {"best": 61.75, "best_epoch": 3, "epoch": 3}


def saved(checkpoint, classes=EXPRESSIONS):
    return SavedClassifier("resnet18", None, classes, Preprocessing(48), checkpoint)


def test_the_accuracy_is_the_one_of_the_epoch_that_was_saved():
    assert recorded_accuracy(saved(BEST)) == (61.75, "test")
    assert recorded_accuracy(saved({**BEST, "args": {"select": "val"}})) == (61.75, "val")
    assert recorded_accuracy(saved({**BEST, "epoch": 4})) is None


@pytest.mark.parametrize(
    "wrong",
    [{"best": x} for x in ("?", -1.0, 101.0, True)]
    + [{"best_epoch": "3"}, {"best_epoch": -1, "epoch": -1}],
)
def test_an_invalid_record_is_none(wrong):
    assert recorded_accuracy(saved({**BEST, **wrong})) is None
    assert recorded_accuracy(saved({})) is None


def test_the_description_has_what_is_recorded():
    assert described(saved({})) == "resnet18, 48 px, 8 classes"
    told = described(saved({**BEST, "trained_on": "RAF-DB basic"}))
    assert told == "resnet18, 48 px, 8 classes, trained on RAF-DB basic, test accuracy 61.75 %"


@pytest.mark.parametrize(
    ("best", "classes", "warned"),
    [(12.5, 8, True), (21.0, 8, True), (21.5, 8, False), (54.9, 2, True), (55.1, 2, False)],
)
def test_an_accuracy_near_chance_is_warned_about(best, classes, warned):
    line = chance_warning(saved({**BEST, "best": best}, EXPRESSIONS[:classes]))
    assert bool(line) == warned
    guess = {8: "12.5 %", 2: "50 %"}[classes]
    assert line in ("", f"warning: hardly more accurate than guessing, which is right in {guess}")


def test_an_unknown_accuracy_is_not_warned_about():
    assert chance_warning(saved({})) == ""
