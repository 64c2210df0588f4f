"""Does another order of classes fit a confusion matrix far better? Then the names are wrong.

A foreign checkpoint or a re-packed data set may number its classes in another order. The model
recognises as much as ever, but under other names, and its accuracy falls, often to chance. An order
is a list: for each true class, the output that really is that class.
"""

import math
import shlex
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.01  # of error: that a cycle fits better by luck, over all cycles of its length
RECALL = 0.4  # of the moved classes' images right under the new order
CHANCE = 3  # times as many as if the outputs did not depend on the class
ODDS = 2.0  # standard errors by which the odds exceed even ones
FOLLOWS = 0.2  # the level for further cycles, once one has shown that the order is foreign


class Scores(NamedTuple):
    """In %, as `util.metrics` defines them."""

    accuracy: float
    uar: float


class Wording(NamedTuple):
    """Two ways to put an order right: rename the model's outputs, or the data's labels."""

    classes: str | None  # the option `--classes=A,B,…`; None where names do not fit in one
    shows: dict[str, str]  # for each class of the data, as it is named now: what its images show


def better_order(matrix: Sequence[Sequence[int]]) -> list[int] | None:
    """(K, K) counts, rows truth, columns predictions -> the order that fits far better, or None.

    Count all outputs of the model, with empty rows for classes that the data lacks: an output that
    is left out may be the one that a class of the data belongs to.

    A right order must not be doubted, however weak the model. So the best order is split into its
    cycles, the smallest sets of classes that swap their outputs among themselves, and one of them
    must be certain (`_Cycle.is_certain`). The names are then known to be foreign: every other cycle
    is taken over if it is merely likely, otherwise its classes keep their outputs.

    Simulated with 7 and 8 classes: no alarm for 130,000 right orders at 40–95 % accuracy, 4 for
    160,000 models that guess or use one to three outputs. Alarms do occur, in 1 of 70, where a
    model (mostly below 60 %) calls two classes each other more often than themselves.
    At 60 % accuracy and 300 images, classes of one size and errors spread evenly, exactly the right
    order comes out of every shuffle and swap; with errors between similar expressions, of 99.9 % of
    the shuffles and 96 % of the swaps. With RAF-DB's class sizes, where 7 of 300 images show Fear,
    these are 99.8 and 88 %, and 89 and 70 %: a swap of rare classes may stay unnoticed, and in a
    shuffle some of them may be misplaced.
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
    """(K, K) counts -> (K,) the order under which most images are right; of equal ones, the one
    that moves the fewest classes."""
    from scipy.optimize import linear_sum_assignment  # takes long, and nothing waits for it

    stay = np.eye(len(counts)) / (len(counts) + 1)  # less than one image in all
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
    """Classes that swap their outputs among themselves, and what speaks for it."""

    classes: list[int]
    images: int  # of these classes
    right: int  # of them, under the new order
    chance: float  # the same, if the outputs did not depend on the class
    speaking: int  # classes that speak for it
    z: float  # log odds for the new order, in standard errors
    log_p: float  # that luck alone makes so many right, compared with the present order
    log_rivals: float  # number of cycles of this length, of which this is the best

    def is_certain(self) -> bool:
        """Each condition answers one way in which a model of the right order looks disordered.

        - By luck: McNemar's exact test on images, with Bonferroni's factor for all such cycles.
        - By two weak classes that it calls each other: `RECALL`.
        - By an output that it gives to nearly all images. Were that Fear's in RAF-DB's test set,
          calling it Happy would be right 1,185 times instead of 74: `CHANCE`.
        - By an output that it never gives, which any class may take at no loss: one large class
          must not decide alone. Most classes get the new output at least half as often as their
          own, and the odds, a product over the classes, are above even. In these a liking for some
          outputs cancels, since each is lost by one class and gained by another.
        """
        return (
            self.log_p + self.log_rivals <= math.log(LEVEL)
            and self.right >= RECALL * self.images
            and self.right >= CHANCE * self.chance
            and 2 * self.speaking > len(self.classes)
            and self.z >= ODDS
        )


def _cycle(counts: np.ndarray, classes: list[int], outputs: np.ndarray) -> _Cycle:
    """(K, K) counts, L classes and their (L,) new outputs."""
    from scipy.stats import binom

    size, own, new = counts.sum(axis=1)[classes], *counts[classes, [classes, outputs]]
    # How often the new output is given to other classes' images – as if to one more than there
    # are, since without any it may be given to all.
    given = (counts.sum(axis=0)[outputs] - new + 1) / (counts.sum() - size + 1)
    odds = np.log((new + 0.5) / (own + 0.5)).sum()  # with Haldane's and Anscombe's ½
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
    """(K, K) counts -> accuracy and UAR if the classes had this order; None: the present one."""
    counts = np.asarray(matrix, np.int64)
    right = counts[np.arange(len(counts)), np.arange(len(counts)) if order is None else order]
    size = counts.sum(axis=1)
    recall = right[size > 0] / size[size > 0]
    return Scores(100 * float(right.sum() / size.sum()), 100 * float(recall.mean()))


def placed_by_elimination(matrix: Sequence[Sequence[int]], order: Sequence[int]) -> list[int]:
    """Classes that an order moves to an output none of their images got: what the others left.

    One alone is as sure as the others; two or more may stand in each other's place.
    """
    return [t for t, k in enumerate(order) if k != t and not matrix[t][k]]


def word_order(
    classes: Sequence[str], order: Sequence[int], common: Sequence[int] | None = None
) -> Wording:
    """The names of all the model's outputs, and an order of the `common` ones -> how to say it.

    `common`: the places in `classes` that the order numbers; None: all. Others keep their names.
    """
    common = range(len(classes)) if common is None else common
    renamed, shows = list(classes), {}
    for t, k in zip(common, (common[k] for k in order), strict=True):
        renamed[k], shows[classes[t]] = classes[t], classes[k]
    return Wording(option_text("--classes", renamed), shows)


def option_text(option: str, names: Sequence[str], first: int | None = None) -> str | None:
    """`--option=A,B,…` for a shell, None where a name would be read as something else.

    That is one with a comma, blanks around it, or what a terminal obeys or cannot show. After an
    equals sign the first name may begin like an option or a file of options. `first` is a number
    to put before them, `--option=1:A,B,…`.
    """
    if any("," in name or not name or name != name.strip() for name in names):
        return None
    text = ",".join(names) if first is None else f"{first}:{','.join(names)}"
    return f"{option}={shlex.quote(text)}" if text.isprintable() else None
