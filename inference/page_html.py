"""Pieces of HTML for the web page; all text is escaped, as it may contain file names and such."""

from collections.abc import Sequence
from urllib.parse import quote

import numpy as np

from inference.explanation import NOTES
from util.report.figures import overlay
from util.report.html import escaped


def message(text: str) -> str:
    """A line of text."""
    return f"<p>{escaped(text)}</p>"


def about(name: str, model: str, lines: Sequence[str]) -> str:
    """A checkpoint's name, its model and what else to know, a line each; warnings stand out."""
    rows = [f"<strong>{escaped(name)}</strong>", escaped(model)]
    for line in filter(None, lines):
        text = escaped(line[0].upper() + line[1:])
        rows.append(f"<strong>{text}</strong>" if line.startswith("warning:") else text)
    return f'<p class="note">{"<br>".join(rows)}</p>'


def heat_caption(method: str, label: str) -> str:
    """What an attention map is and is not, and the scale of its colours."""
    shows = NOTES[method].replace("the predicted class", f"“{label}”")
    text = (
        f"{method[0].upper()}{method[1:]}: {shows}. Colours are relative to this face's maximum, "
        "so they cannot be compared between faces or models. The map does not prove that the "
        "prediction rests on what it shows."
    )
    ramp = np.linspace(0, 1, 8)[None]
    colours = overlay(np.full((1, 8, 3), 128, np.uint8), ramp)[0]  # on medium grey
    stops = ",".join(f"rgb({r},{g},{b})" for r, g, b in colours.tolist())
    bar = f'<span style="background: linear-gradient(to right,{stops})"></span>'
    return f'<div class="scale">least{bar}most</div><p class="note">{escaped(text)}</p>'


def data_link(text: str, name: str, label: str) -> str:
    """A link to download a small text as a file, which is part of the page: nothing is stored."""
    data = quote(text.encode("utf-8", "surrogateescape"))
    return f'<a download="{name}" href="data:text/csv;charset=utf-8,{data}">{label}</a>'
