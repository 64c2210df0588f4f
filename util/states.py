"""States of weights, which are dicts of names to tensors, and renaming them by tables."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
Renames = list[tuple[str, str]]  # patterns and what replaces them
# Our name and another library's. {} is a number; what ends in a dot is the start of names.
Pairs = list[tuple[str, str]]


def root(name: str) -> str:
    """The first component of a dotted name."""
    return name.partition(".")[0]


def count(state: State, prefix: str) -> int:
    """How many numbers follow `prefix.` in the names."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state)
    return len({match[1] for match in numbers if match})


def renamed(state: State, renames: Renames) -> State:
    """Every name after all replacements, in their order.

    Unchanged where two names would become one: which of the tensors is meant, nobody can tell.
    """
    result = {}
    for name, value in state.items():
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        result[name] = value
    return result if len(result) == len(state) else state


def to_theirs(pairs: Pairs) -> Renames:
    """From our names to the other library's."""
    return [_rename(ours, theirs) for ours, theirs in pairs]


def to_ours(pairs: Pairs) -> Renames:
    """From the other library's names to ours."""
    return [_rename(theirs, ours) for ours, theirs in pairs]


def _rename(old: str, new: str) -> tuple[str, str]:
    pattern = r"(\d+)".join(map(re.escape, old.split("{}")))
    return f"^{pattern}{'' if old.endswith('.') else '$'}", new.format(r"\1", r"\2")
