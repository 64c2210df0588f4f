"""The canonical names of expressions, and how the owners of data sets spell and number them.

A data set keeps its owner's class order, so that heads trained elsewhere fit. The classes of two
data sets are matched by name, expressions by their canonical names.
"""

import difflib
import re
from collections.abc import Sequence

from util.errors import BadInput

EXPRESSIONS = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt")

# The classes in each owner's order.
ORDERS = {
    "affectnet": EXPRESSIONS,
    "rafdb": ("Surprise", "Fear", "Disgust", "Happy", "Sad", "Anger", "Neutral"),
    "ferplus": ("Neutral", "Happy", "Surprise", "Sad", "Anger", "Disgust", "Fear", "Contempt"),
    "fer2013": ("Anger", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral"),
}

_SPELLINGS = {
    "Neutral": ("neutral", "neutrality", "ne", "neu"),
    "Happy": ("happy", "happiness", "joy", "ha", "hap"),
    "Sad": ("sad", "sadness", "sa"),
    "Surprise": ("surprise", "surprised", "su", "sur"),
    "Fear": ("fear", "fearful", "afraid", "fe", "fea"),
    "Disgust": ("disgust", "disgusted", "di", "dis"),
    "Anger": ("anger", "angry", "an", "ang"),
    "Contempt": ("contempt", "contemptuous", "co", "con"),
}
_BY_SPELLING = {word: name for name, words in _SPELLINGS.items() for word in words}


def expression(word: str) -> str | None:
    """The canonical name of an expression in any known spelling; None for other words."""
    return _BY_SPELLING.get(word.strip().lower())


def canonical(names: Sequence[str]) -> list[str]:
    """The names, with canonical names for expressions; unchanged if two would become the same."""
    known = [expression(name) or name for name in names]
    return known if len(set(known)) == len(set(names)) else list(names)


def shared_classes(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the classes that both have, in the order of `ours`: (in ours, in theirs).

    Classes are matched by name; all spellings of an expression match.
    """
    own, other = canonical(ours), canonical(theirs)
    shared = [(k, other.index(name)) for k, name in enumerate(own) if name in other]
    return [k for k, _ in shared], [k for _, k in shared]


def near_expression(word: str) -> str | None:
    """The expression that a misspelt word comes closest to; None if it is close to none."""
    near = difflib.get_close_matches(word.strip().lower(), _BY_SPELLING, n=1, cutoff=0.75)
    return _BY_SPELLING[near[0]] if near and len(word) > 3 else None


_FIRST = re.compile(r"\s*([01])\s*:\s*")


def parse_order(text: str) -> tuple[str, ...]:
    """Parse `--label_order`: an owner's name (`affectnet`), or class names in the order of ids.

    Names are separated by commas; expressions are returned under their canonical names. `0:` or
    `1:` in front is the first id, see `first_id`. Raises BadInput for a repeated or a single name.
    """
    order = _FIRST.sub("", text, count=1).strip()
    if order.lower() in ORDERS:
        return ORDERS[order.lower()]
    words = [word.strip() for word in order.split(",") if word.strip()]
    names = tuple(expression(word) or word for word in words)
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadInput(
            f"--label_order {text}: give {', '.join(ORDERS)}, or distinct class names, separated "
            "by commas, in the order of their ids"
        )
    return names


def first_id(text: str) -> int | None:
    """The id of the first class in `--label_order`, such as 1 in `1:rafdb`; None if not given."""
    said = _FIRST.match(text)
    return int(said[1]) if said else None


def resolved_order(text: str, first: int | None = None) -> str:
    """The canonical form of a `--label_order`, with the `first` id if there is one."""
    names = parse_order(text)
    order = next((owner for owner, known in ORDERS.items() if known == names), ",".join(names))
    return order if first is None else f"{first}:{order}"
