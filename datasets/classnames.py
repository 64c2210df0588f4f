"""Which class a name stands for: folders' names, or the labels in a list.

Names decide. Numbers are never guessed at: re-packs of one data set number its expressions in
different orders.
"""

import os
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from datasets.decode import printable
from datasets.labels import EXPRESSIONS, ORDERS, expression, near_expression, parse_order
from util.errors import BadInput

FIRST_ID = {"rafdb": 1}  # the other owners number from 0


class Named(NamedTuple):
    """What names mean."""

    classes: tuple[str, ...]  # in their order
    called: dict[str, str]  # the class of each name
    notes: list[str]  # what to say of it
    label_order: str | None  # as in `--label_order`, if one decided


def name_classes(
    where: str,
    names: Sequence[str],
    label_order: str | None = None,
    usual: str | None = None,
    what: str = "class folder",
) -> Named:
    """The classes that names stand for; `where` they were found and `what` has them, for messages.

    Expressions get their canonical names and order if all names are some (`7_contempt` is
    Contempt); else the names stay and stand in byte order. `label_order` overrules the order,
    and is needed where all names are numbers, unless there is a `usual` one. Raises BadInput.
    """
    if all(name.isascii() and name.isdigit() for name in names):
        label_order = label_order or _fitting(where, names, usual, what)
        order, called = _by_number(where, names, label_order, what)
        told = ", ".join(f"{printable(n)} {called[n]}" for n in sorted(names, key=int))
        notes = [f"{what}s are numbered by --label_order {label_order}: {told}"]
    elif label_order:
        order, called = _by_order(where, names, label_order, what)
        notes = []
    else:
        order, called, notes = _by_word(names, what)
    found = tuple(name for name in order if name in called.values())
    if len(found) < 2:
        raise BadInput(f"{where}: only one class, {few(names)}; a classifier needs two at least")
    return Named(found, called, notes, label_order)


def few(names: Collection[str], n: int = 12) -> str:
    """Names by commas, the first n of them."""
    names = [printable(name) for name in names]
    return ", ".join(names[:n]) + (", …" if len(names) > n else "")


def _name_part(name: str) -> str:
    """`contempt` of `7_contempt` or `7-contempt`."""
    return re.sub(r"^\d+[_-](?=.)", "", name)


def _by_word(names: Sequence[str], what: str) -> tuple[Sequence[str], dict[str, str], list[str]]:
    """The order, the class of each name, and what to say, where only the names tell."""
    words = {name: expression(_name_part(name)) for name in names}
    if all(words.values()):
        return EXPRESSIONS, words, []
    called, notes = {name: name for name in names}, []
    if others := [name for name, word in words.items() if not word and any(words.values())]:
        near = {name: near_expression(_name_part(name)) for name in others}
        shown = [printable(n) + f" (did you mean {near[n]}?)" * bool(near[n]) for n in others[:12]]
        verb = "is not a known expression" if len(others) == 1 else "are not known expressions"
        notes = [f"{', '.join(shown)} {verb}, so all {what}s keep their own names"]
    return sorted(names, key=os.fsencode), called, notes


def _by_number(
    where: str, names: Sequence[str], label_order: str | None, what: str
) -> tuple[Sequence[str], dict[str, str]]:
    """The order and the class of each name, where all are numbers."""
    ids = sorted({int(name) for name in names})
    if label_order is None:
        raise BadInput(
            f"{where}: the {what}s are numbers ({few(map(str, ids))}), which may mean "
            "anything: give --label_order, the names by commas in the order of the numbers, or "
            f"an owner's order ({', '.join(ORDERS)})"
        )
    order, owner = parse_order(label_order), label_order.strip().lower()
    first = ids[0] if len(ids) == len(order) else FIRST_ID.get(owner, 0)
    expected = range(first, first + len(order))
    complete = len(ids) == len(order) or owner in ORDERS
    if first > 1 or not complete or not set(ids) <= set(expected):
        raise BadInput(
            f"{where}: --label_order {label_order} names {len(order)} classes, but the {what}s "
            f"are {few(map(str, ids))}; name them all, numbers from 0 or 1 on"
        )
    return order, {name: order[int(name) - first] for name in names}


def _fitting(where: str, names: Sequence[str], usual: str | None, what: str) -> str | None:
    """The usual order if it is one of as many classes as there are numbers, else None."""
    try:
        _by_number(where, names, usual, what)
    except BadInput:
        return None
    return usual


def _by_order(
    where: str, names: Sequence[str], label_order: str, what: str
) -> tuple[Sequence[str], dict[str, str]]:
    """The order and the class of each name, where the user gave the classes."""
    order, called = parse_order(label_order), {}
    for name in names:
        word = _name_part(name)
        called[name] = next((n for n in (expression(word), word, name) if n in order), "")
        if not called[name]:
            found = f"{where}/{printable(name)}" if what == "class folder" else printable(name)
            raise BadInput(f"{found}: a {what} that --label_order {label_order} lacks")
    lacking = [name for name in order if name not in called.values()]
    if lacking and label_order.strip().lower() not in ORDERS:  # an owner's may name one more
        raise BadInput(
            f"{where}: --label_order {label_order}, but no {what} {few(lacking)}; "
            f"there are {few(names)}"
        )
    return order, called
