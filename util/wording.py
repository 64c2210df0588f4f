"""Words of messages: text as one line that a terminal can take, and the names nearest to one."""

import difflib
from collections.abc import Iterable


def one_line(text: str) -> str:
    """A text without line breaks or control characters: these are shown as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable(name: str) -> str:
    """A path or name as it is, or quoted with escapes where it holds odd bytes or line breaks."""
    return name if name.isprintable() else repr(name)


def did_you_mean(name: str, known: Iterable[str], most: int = 3, cutoff: float = 0.5) -> str:
    """ "did you mean A or B?", from the nearest of the known names; "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(map(printable, near))}?" if near else ""
