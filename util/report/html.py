"""Any value as safe HTML, and the elements that parts of a report share."""

import html
import json
from collections.abc import Iterable, Sequence

CLIP = 4000  # characters per text


def escaped(value: object) -> str:
    """Any value as text that is safe in HTML, in elements and attributes."""
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return html.escape(words if len(words) <= CLIP else words[:CLIP] + " …")


def section(heading: str, body: str, kind: str = "") -> str:
    """`body` under its heading; "" if it is empty."""
    return f'<section><h2>{heading}</h2><div class="{kind}">{body}</div></section>' * bool(body)


def numbers(items: Iterable[tuple[str, str]]) -> str:
    """(label, value) pairs, HTML already, as large figures over their labels; "" without any."""
    rows = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in items)
    return f'<dl class="numbers">{rows}</dl>' if rows else ""


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of figures whose first column names the row; cells are HTML already."""
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f'<div class="scroll"><table class="grid"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(content: str, name: str = "", width: int = 0) -> str:
    """A picture, HTML already, that a click or the space bar enlarges and reduces again.

    `name`: for screen readers; `width`: in pixels, if that of the picture is known.
    """
    style = f' style="--w:{width}px"' if width else ""
    action = f"Enlarge {name}".strip()
    return (
        f'<label class="zoom"{style}><input type="checkbox" aria-label="{action}">'
        f"<span>{content}</span></label>"
    )
