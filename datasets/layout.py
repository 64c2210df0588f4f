"""What the file of a labelled data set declares: how it is recognised, and how it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from datasets.labelled import LabelledSet


class Asked(NamedTuple):
    """Options for reading a data set; None if neither given nor known from a model's training."""

    nb_classes: int | None = None
    label_rule: str | None = None
    label_order: str | None = None  # as given
    usual_order: str | None = None  # used without one, if it fits
    face_margin: float | None = None


def nothing_missing(root: Path) -> str:
    """For layouts of which no part is recognised alone."""
    return ""


class Layout(NamedTuple):
    """A data set in the layouts that its owners ship, or a kind of data set (class folders)."""

    title: str  # "RAF-DB"
    shape: str  # what it looks like, for messages: "EmoLabel/ and Image/aligned/"
    recognise: Callable[[Path], list[str]]  # descriptions of what fits in a folder; often none
    read: Callable[[Path, Asked], LabelledSet]  # raises BadInput
    # What is missing from a folder that is only a part of it, else ""; may raise BadInput itself.
    missing: Callable[[Path], str] = nothing_missing
    setting: str = ""  # the option that determines what is read: label_rule, face_margin, …
    default: object = None  # of that option
    # The set with fewer classes, for one whose classes can be chosen by --nb_classes.
    with_classes: Callable[[LabelledSet, int], LabelledSet] | None = None
