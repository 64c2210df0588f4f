"""State dicts (names to tensors), and renaming their entries by tables."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
Renames = list[tuple[str, str]]  # (pattern, replacement)
# (our name, another library's). {} stands for a number; a name that ends in a dot is a prefix.
Pairs = list[tuple[str, str]]


def root(name: str) -> str:
    """The first component of a dotted name."""
    return name.partition(".")[0]


def count(state: State, prefix: str) -> int:
    """How many different numbers follow `prefix.` in the names."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state)
    return len({match[1] for match in numbers if match})


def renamed(state: State, renames: Renames) -> State:
    """Apply all replacements to every name, in their order.

    Returns the state unchanged if two names would become one: it is unclear which tensor is meant.
    """
    result = {}
    for name, value in state.items():
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        result[name] = value
    return result if len(result) == len(state) else state


def to_theirs(pairs: Pairs) -> Renames:
    """Renames from our names to the other library's."""
    return [_rename(ours, theirs) for ours, theirs in pairs]


def to_ours(pairs: Pairs) -> Renames:
    """Renames from the other library's names to ours."""
    return [_rename(theirs, ours) for ours, theirs in pairs]


def _rename(old: str, new: str) -> tuple[str, str]:
    pattern = r"(\d+)".join(map(re.escape, old.split("{}")))
    return f"^{pattern}{'' if old.endswith('.') else '$'}", new.format(r"\1", r"\2")
