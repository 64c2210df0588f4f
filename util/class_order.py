"""Does another order of classes fit a confusion matrix far better? Then the names are wrong.

A checkpoint or data set from elsewhere may number its classes in another order. The model then
recognises as much as ever, but under wrong names, and its accuracy drops, often to chance. An order
is a list: for each true class, the output that really belongs to it.
"""

import math
import shlex
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.01  # probability that some cycle of the same length fits better by luck
RECALL = 0.4  # share of the moved classes' images that must be right under the new order
CHANCE = 3  # times as many must be right as if outputs did not depend on the class
ODDS = 2.0  # standard errors by which the log odds must exceed 0
FOLLOWS = 0.2  # level for further cycles, once one has shown that the names are wrong


class Scores(NamedTuple):
    """In %, as `util.metrics` defines them."""

    accuracy: float
    uar: float


class Wording(NamedTuple):
    """Two ways to correct an order: rename the model's outputs, or the data's labels."""

    classes: str | None  # the option `--classes=A,B,…`; None if it cannot hold the names
    shows: dict[str, str]  # for each class of the data, by its current name: what its images show


def better_order(matrix: Sequence[Sequence[int]]) -> list[int] | None:
    """(K, K) counts, rows truth, columns predictions -> the order that fits far better, or None.

    Count all outputs of the model, with empty rows for classes that the data does not have: an
    output left out may be the one that belongs to a class of the data.

    A right order must not be doubted, however weak the model. So the best order is split into its
    cycles, the smallest sets of classes that swap outputs among themselves, and one of them must be
    certain (`_Cycle.is_certain`). This shows that the names are wrong: every other cycle is then
    accepted if it is merely likely; otherwise its classes keep their outputs.

    Simulated with 7 and 8 classes: no false alarm for 130,000 right orders at 40–95 % accuracy, 4
    for 160,000 models that guess or use only one to three outputs. False alarms do occur, in 1 of
    70, for models (mostly below 60 %) that take two classes for each other more often than for
    themselves.

    At 60 % accuracy and 300 images, with classes of equal size and errors spread evenly, exactly
    the right order is found for every shuffle and every swap; with errors between similar
    expressions, for 99.9 % of the shuffles and 96 % of the swaps. With RAF-DB's class sizes, where
    7 of 300 images show Fear, the shares are 99.8 % of the shuffles and 88 % of the swaps with
    evenly spread errors, 89 % and 70 % with errors between similar expressions: a swap of rare
    classes may go unnoticed, and a shuffle may have some of them misplaced.
    """
    counts = np.asarray(matrix, np.int64)
    best = best_order(counts)
    cycles = [_cycle(counts, classes, best[classes]) for classes in _moved_together(best)]
    if not any(cycle.is_certain() for cycle in cycles):
        return None
    order = np.arange(len(best))
    for cycle in cycles:
        if cycle.log_p <= math.log(FOLLOWS):
            order[cycle.classes] = best[cycle.classes]
    return order.tolist()


def best_order(counts: np.ndarray) -> np.ndarray:
    """(K, K) counts -> (K,) the order that makes most images right; of several, the one that moves
    the fewest classes.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    stay = np.eye(len(counts)) / (len(counts) + 1)  # less than one image in total
    return linear_sum_assignment(counts + stay, maximize=True)[1]


def _moved_together(order: np.ndarray) -> list[list[int]]:
    """The cycles of a permutation that move something: each class takes the next one's output."""
    cycles, seen = [], set()
    for start in range(len(order)):
        cycle, k = [], start
        while k not in seen:
            seen.add(k)
            cycle.append(k)
            k = int(order[k])
        if len(cycle) > 1:
            cycles.append(cycle)
    return cycles


class _Cycle(NamedTuple):
    """Classes that swap outputs among themselves, and the evidence for it."""

    classes: list[int]
    images: int  # number of images of these classes
    right: int  # of them, under the new order
    chance: float  # expected value of `right` if outputs did not depend on the class
    speaking: int  # classes that support it
    z: float  # log odds for the new order, in standard errors
    log_p: float  # log probability of at least as many right by luck, against the present order
    log_rivals: float  # log number of cycles of this length, of which this is the best

    def is_certain(self) -> bool:
        """Each condition excludes one way in which a model with the right order looks disordered.

        - Luck: McNemar's exact test on images, with Bonferroni's factor for all cycles of this
          length.
        - Two weak classes that the model takes for each other: `RECALL`.
        - An output that it gives to nearly all images. If that were Fear's in RAF-DB's test set,
          calling it Happy would be right 1,185 times instead of 74: `CHANCE`.
        - An output that it never gives, which any class may take without loss: one large class must
          not decide alone. Most classes must get the new output more than half as often as their
          own, and the odds, a product over the classes, must be above even. In this product a
          preference for some outputs cancels, since each is lost by one class and gained by
          another.
        """
        return (
            self.log_p + self.log_rivals <= math.log(LEVEL)
            and self.right >= RECALL * self.images
            and self.right >= CHANCE * self.chance
            and 2 * self.speaking > len(self.classes)
            and self.z >= ODDS
        )


def _cycle(counts: np.ndarray, classes: list[int], outputs: np.ndarray) -> _Cycle:
    """The evidence for a cycle: (K, K) counts, L classes and their (L,) new outputs."""
    from scipy.stats import binom

    size, own, new = counts.sum(axis=1)[classes], *counts[classes, [classes, outputs]]
    # Share of the other classes' images that get the new output, with one image added that does:
    # if there are no others, the share is 1.
    given = (counts.sum(axis=0)[outputs] - new + 1) / (counts.sum() - size + 1)
    odds = np.log((new + 0.5) / (own + 0.5)).sum()  # with the ½ of Haldane and Anscombe
    error = np.sqrt((1 / (new + 0.5) + 1 / (own + 0.5)).sum())
    k, moved = len(counts), len(classes)
    return _Cycle(
        classes,
        images=int(size.sum()),
        right=int(new.sum()),
        chance=float((size * given).sum()),
        speaking=int(np.count_nonzero(2 * new > own)),
        z=float(odds / error),
        log_p=float(binom.logsf(new.sum() - 1, new.sum() + own.sum(), 0.5)),
        log_rivals=math.lgamma(k + 1) - math.lgamma(k - moved + 1) - math.log(moved),
    )


def scores(matrix: Sequence[Sequence[int]], order: Sequence[int] | None = None) -> Scores:
    """(K, K) counts -> accuracy and UAR under another order of classes; None: the present one."""
    counts = np.asarray(matrix, np.int64)
    right = counts[np.arange(len(counts)), np.arange(len(counts)) if order is None else order]
    size = counts.sum(axis=1)
    recall = right[size > 0] / size[size > 0]
    return Scores(100 * float(right.sum() / size.sum()), 100 * float(recall.mean()))


def placed_by_elimination(matrix: Sequence[Sequence[int]], order: Sequence[int]) -> list[int]:
    """Classes that an order moves to an output that none of their images got: what was left over.

    A single one is as certain as the others; two or more may be swapped with each other.
    """
    return [t for t, k in enumerate(order) if k != t and not matrix[t][k]]


def word_order(
    classes: Sequence[str], order: Sequence[int], common: Sequence[int] | None = None
) -> Wording:
    """The names of all the model's outputs, and an order of the `common` ones -> how to correct it.

    `common`: indices into `classes` that the order permutes; None: all. Other classes keep their
    names.
    """
    common = range(len(classes)) if common is None else common
    renamed, shows = list(classes), {}
    for t, k in zip(common, (common[k] for k in order), strict=True):
        renamed[k], shows[classes[t]] = classes[t], classes[k]
    return Wording(option_text("--classes", renamed), shows)


def option_text(option: str, names: Sequence[str], first: int | None = None) -> str | None:
    """`--option=A,B,…` for a shell; None if a name would be read as something else.

    That is a name that is empty, that contains a comma or unprintable characters, or that begins or
    ends with a blank. After the equals sign, the first name may begin like an option or an options
    file. `first`: a number to put before them, `--option=1:A,B,…`.
    """
    if any("," in name or not name or name != name.strip() for name in names):
        return None
    text = ",".join(names) if first is None else f"{first}:{','.join(names)}"
    return f"{option}={shlex.quote(text)}" if text.isprintable() else None
