"""Which class a name stands for: the name of a class folder, or a label in a list.

Names decide. The meaning of numbers is never guessed, because repackaged data sets number their
expressions in different orders.
"""

import os
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from datasets.labels import (
    EXPRESSIONS,
    ORDERS,
    expression,
    first_id,
    near_expression,
    parse_order,
    resolved_order,
)
from util.errors import BadInput
from util.wording import printable

_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?", re.ASCII)


class Named(NamedTuple):
    """The classes that names stand for."""

    classes: tuple[str, ...]  # in the order of the labels
    called: dict[str, str]  # the class of each name
    notes: list[str]
    label_order: str | None  # as in `--label_order`, with the first id; None if none was used


def name_classes(
    where: str,
    names: Sequence[str],
    label_order: str | None = None,
    usual: str | None = None,
    what: str = "class folder",
) -> Named:
    """Find the classes that names stand for. Messages say `where` they are and on `what`.

    If all names are expressions (`7_contempt` is Contempt), they get their canonical names and
    order; otherwise they stay as they are, in byte order. `label_order` overrides the order. It is
    required if all names are numbers, unless there is a `usual` one. Raises BadInput.
    """
    if all(map(_whole, names)):
        order, called, label_order = _by_number(
            where, names, label_order=label_order, usual=usual, what=what
        )
        told = ", ".join(f"{printable(n)} {called[n]}" for n in sorted(names, key=int))
        lacking = few([name for name in order if name not in called.values()])
        notes = [
            f"{what}s are numbered as in --label_order {label_order}: {told}"
            + f"; none stands for {lacking}" * bool(lacking)
        ]
    elif label_order:
        order, called = _by_order(where, names, label_order, what)
        label_order, notes = resolved_order(label_order), []
    else:
        order, called, notes = _by_word(where, names, what)
    found = tuple(name for name in order if name in called.values())
    if len(found) < 2:
        raise BadInput(f"{where}: only one class, {few(names)}; a classifier needs at least two")
    return Named(found, called, notes, label_order)


def few(names: Collection[str], n: int = 12) -> str:
    """The first n names, separated by commas."""
    names = [printable(name) for name in names]
    return ", ".join(names[:n]) + (", …" if len(names) > n else "")


def _name_part(name: str) -> str:
    """`contempt` of `7_contempt` or `7-contempt`."""
    return re.sub(r"^\d+[_-](?=.)", "", name)


def _by_word(
    where: str, names: Sequence[str], what: str
) -> tuple[Sequence[str], dict[str, str], list[str]]:
    """Class order, class of each name, and notes, if only the names decide."""
    words = {name: expression(_name_part(name)) for name in names}
    if numbers := [name for name in names if _NUMBER.fullmatch(name)]:
        others = [name for name in names if not _whole(name)]
        raise BadInput(
            f"{where}: some {what}s are numbers ({few(numbers)}), but not all are whole numbers "
            f"from 0 on ({few(others)}); use numbers for all of them, or names"
        )
    if all(words.values()):
        return EXPRESSIONS, words, []
    called, notes = {name: name for name in names}, []
    if others := [name for name, word in words.items() if not word and any(words.values())]:
        near = {name: near_expression(_name_part(name)) for name in others}
        shown = [printable(n) + f" (did you mean {near[n]}?)" * bool(near[n]) for n in others[:12]]
        verb = "is not a known expression" if len(others) == 1 else "are not known expressions"
        notes = [f"{', '.join(shown)} {verb}, so all {what}s keep their own names"]
    return sorted(names, key=os.fsencode), called, notes


def _whole(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _by_number(
    where: str, names: Sequence[str], label_order: str | None, usual: str | None, what: str
) -> tuple[Sequence[str], dict[str, str], str]:
    """Class order, class of each name, and `--label_order` with its first id, if names are numbers.

    Which ids occur must not decide what they mean: if only 1 to 6 of seven classes occur, either
    the first or the last class may be missing.
    """
    ids = sorted({int(name) for name in names})
    shown = few(map(str, ids))
    text = label_order or usual
    starts = _starts(ids, text) if text else []
    if not (label_order or starts):
        known = f", and {usual}, as in training, does not fit" if usual else ""
        raise BadInput(
            f"{where}: the {what}s are numbers ({shown}), which may mean anything{known}: give "
            "--label_order with the names in the order of the numbers, separated by commas, or "
            f"with an owner's order ({', '.join(ORDERS)})"
        )
    order = parse_order(text)
    if not starts:
        raise BadInput(
            f"{where}: --label_order {text} names {len(order)} classes, but the {what}s are "
            f"{shown}; name all classes, numbered from 0 or 1 on"
        )
    if len(starts) > 1:
        both = " or ".join(resolved_order(text, first) for first in starts)
        raise BadInput(
            f"{where}: the {what}s {shown} may count from 0 or from 1: give --label_order {both}"
        )
    called = {name: order[int(name) - starts[0]] for name in names}
    return order, called, resolved_order(text, starts[0])


def _starts(ids: Sequence[int], label_order: str) -> list[int]:
    """Which of the ids 0 and 1 the first class of an order can have, so that all `ids` fit."""
    said, count = first_id(label_order), len(parse_order(label_order))
    starts = (0, 1) if said is None else (said,)
    return [first for first in starts if first <= ids[0] and ids[-1] < first + count]


def _by_order(
    where: str, names: Sequence[str], label_order: str, what: str
) -> tuple[Sequence[str], dict[str, str]]:
    """Class order and class of each name, if the user gave the classes."""
    order, called = parse_order(label_order), {}
    for name in names:
        word = _name_part(name)
        called[name] = next((n for n in (expression(word), word, name) if n in order), "")
        if not called[name]:
            found = printable(name)
            raise BadInput(f"{where}: {what} {found} is not in --label_order {label_order}")
    lacking = [name for name in order if name not in called.values()]
    if lacking and label_order.strip().lower() not in ORDERS:  # an owner's order may have more
        raise BadInput(
            f"{where}: --label_order {label_order}, but there is no {what} {few(lacking)}, only "
            f"{few(names)}"
        )
    return order, called
