"""Text for messages: one printable line, and suggestions of similar names."""

import difflib
from collections.abc import Iterable


def one_line(text: str) -> str:
    """Text in which line breaks and control characters are replaced by escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable(name: str) -> str:
    """A path or name as it is, or quoted and escaped if it holds odd bytes or line breaks."""
    return name if name.isprintable() else repr(name)


def without_head(source: object) -> str:
    """The message about a model that cannot classify, where a classifier is needed."""
    return (
        f"{source}: was pre-trained only and has no classifier head; fine-tune it first: "
        f"main_finetune.py --finetune {source} --data_path …"
    )


def changed_images(before: str | None, now: str) -> str:
    """How a data set has changed that had `before` (such as `90 images`; None: unknown)."""
    if before == now:
        return f"{now} as before, but with other names or labels, or in another order"
    return f"{before} before, {now} now" if before else f"{now} now"


def did_you_mean(name: str, known: Iterable[str], most: int = 3, cutoff: float = 0.5) -> str:
    """ "did you mean A or B?", with the most similar of the known names; "" if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(map(printable, near))}?" if near else ""
