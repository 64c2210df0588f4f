"""What a classifier's checkpoint says about its own training: data set and accuracy."""

from typing import NamedTuple

from models_saved import SavedClassifier
from util.safe_json import number, part
from util.wording import printable

# A share of the way from guessing to perfect; whoever is not further is hardly better than chance.
NEAR_CHANCE = 0.1


class Accuracy(NamedTuple):
    """The accuracy of a checkpoint's weights, as its training measured it."""

    percent: float
    split: str  # test or val: the one that chose the epoch


def recorded_accuracy(saved: SavedClassifier) -> Accuracy | None:
    """The accuracy of these weights; None if the checkpoint does not say."""
    checkpoint = saved.checkpoint
    best, epoch = number(checkpoint.get("best")), checkpoint.get("best_epoch")
    # `best` is the accuracy of these weights only if they are from the best epoch.
    if type(epoch) is not int or not 0 <= epoch == checkpoint.get("epoch"):
        return None
    if best is None or not 0 <= best <= 100:
        return None
    return Accuracy(best, "val" if part(checkpoint, "args").get("select") == "val" else "test")


def described(saved: SavedClassifier) -> str:
    """Name, input size, number of classes, and what the checkpoint says of its training."""
    told = f"{saved.name}, {saved.preprocessing.input_size} px, {len(saved.classes)} classes"
    if isinstance(data := saved.checkpoint.get("trained_on"), str):
        told += f", trained on {printable(data)}"
    if accuracy := recorded_accuracy(saved):
        told += f", {accuracy.split} accuracy {accuracy.percent:.2f} %"
    return told


def chance_warning(saved: SavedClassifier) -> str:
    """A warning if the recorded accuracy is close to guessing among the classes; else ""."""
    accuracy, chance = recorded_accuracy(saved), 100 / len(saved.classes)
    if accuracy is None or accuracy.percent >= chance + NEAR_CHANCE * (100 - chance):
        return ""
    return f"warning: hardly more accurate than guessing, which is right in {chance:.3g} %"
