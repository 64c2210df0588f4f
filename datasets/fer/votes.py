"""Labels from ten people's votes: the five rules in use for FERPlus.

Votes are counts for its eight emotions, for unknown and for NF (not a face). `majority` and `votes`
do what the owners' training tool does in its modes majority and crossentropy. Ties go to the first
class in the owners' order, except with `unique`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# What a rule makes of votes (n, 10) int64: class indices (n,), whether there is a label (n,) bool,
# targets (n, 8) or None
Labels = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _argmax(votes: np.ndarray) -> Labels:
    return votes[:, :8].argmax(1), votes[:, :8].any(1), None


def _argmax10(votes: np.ndarray) -> Labels:
    winner = votes.argmax(1)
    return winner, votes.any(1) & (winner < 8), None


def _unique(votes: np.ndarray) -> Labels:
    winner, _, _ = _argmax10(votes)
    alone = (votes == votes.max(1, keepdims=True)).sum(1) == 1
    return winner, alone & (winner < 8), None


def _majority(votes: np.ndarray) -> Labels:
    votes = _without_single(votes)
    winner = votes.argmax(1)
    return winner, (2 * votes.max(1) > votes.sum(1)) & (winner < 8), None


def _distribution(votes: np.ndarray) -> Labels:
    """Take emotions in the order of their votes, tied ones together, until they have three quarters
    of the votes, there are three of them, or unknown or NF comes next or ties with the next ones.
    Images with more than three emotions, or with no more than half of the votes, have no label.
    """
    votes = _without_single(votes)
    total, left, going = votes.sum(1), votes.copy(), np.ones(len(votes), bool)
    taken = np.zeros_like(votes[:, :8])
    for _ in range(3):
        going &= (4 * taken.sum(1) < 3 * total) & ((taken > 0).sum(1) < 3)
        level = (left == left.max(1, keepdims=True)) & going[:, None]
        taken += np.where(level, votes, 0)[:, :8]
        left[level] = 0
        going &= ~level[:, 8:].any(1)
    sums = taken.sum(1)
    kept = (2 * sums > total) & ((taken > 0).sum(1) <= 3)
    return taken.argmax(1), kept, taken / np.maximum(sums, 1)[:, None]


def _without_single(votes: np.ndarray) -> np.ndarray:
    """Ignore single votes: one out of ten is taken for a mistake."""
    return np.where(votes > 1, votes, 0)


class Rule(NamedTuple):
    words: str  # recorded with results; summaries compare only results with equal words
    label: Callable[[np.ndarray], Labels]
    # Labelled images in train, val, test: by fer2013new.csv, and by the folders' label.csv files,
    # which differ from it in 1,602 rows and name each image once.
    of_csv: tuple[int, int, int]
    of_folders: tuple[int, int, int]


RULES = {
    "argmax": Rule(
        "argmax of the 8 emotions' votes",
        _argmax,
        (28_559, 3_579, 3_573),
        (28_556, 3_579, 3_573),
    ),
    "argmax10": Rule(
        "argmax of all 10 votes, unknown and NF left out",
        _argmax10,
        (28_389, 3_553, 3_546),
        (28_385, 3_555, 3_545),
    ),
    "unique": Rule(
        "argmax of all 10 votes where one alone has the most, unknown and NF left out",
        _unique,
        (26_940, 3_396, 3_376),
        (26_940, 3_396, 3_371),
    ),
    "majority": Rule(
        "more than half of the votes without single ones",
        _majority,
        (25_060, 3_199, 3_153),
        (25_045, 3_191, 3_137),
    ),
    "votes": Rule(
        "distribution of the votes as soft target, the owners' crossentropy mode",
        _distribution,
        (27_956, 3_505, 3_505),
        (27_947, 3_508, 3_507),
    ),
}
DEFAULT_RULE = "argmax"
