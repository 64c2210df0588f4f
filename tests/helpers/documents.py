"""Parse README.md and docs/*.md: commands, Python, options, links, headings.

A code block without a language is shell commands, or Python if it begins with an import, or a list
of options if it begins with `--`. Anything else is fenced as ```text (or ```bibtex) or begins with
one of NO_CODE.
"""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

from runs import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NO_CODE = (
    *("main_pretrain.py ", "@inproceedings", "global batch ="),  # the map, citations, a formula
    *("basic/EmoLabel", "# 2017 lists", "fer2013", "DATA/"),  # files of data sets
)
LANGUAGES = {"sh": "shell", "bash": "shell", "console": "shell", "python": "python"}
# Inline code that begins like this and continues is a command.
STARTS_COMMAND = re.compile(
    r"(python3?|torchrun|srun|make|pip|tensorboard|sbatch|[\w/]+\.py) +[^\s,;:]"
)


class Code(NamedTuple):
    """A code block or a piece of inline code."""

    place: str  # page and line
    kind: str  # of blocks: shell, python, options, text; of inline code: inline
    text: str


class Command(NamedTuple):
    """One command of a shell."""

    place: str
    words: tuple[str, ...]


def tokens(page) -> Iterator[tuple[Token, int]]:
    """All tokens of a page, inline ones included, with their line numbers."""
    line = 1
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        line = token.map[0] + 1 if token.map else line
        yield token, line
        yield from ((child, line) for child in token.children or [])


def code(page) -> Iterator[Code]:
    """All code of a page, in order."""
    for token, line in tokens(page):
        place = f"{page.relative_to(ROOT)}:{line}"
        if token.type == "code_inline":
            yield Code(place, "inline", token.content)
        elif token.type in ("code_block", "fence"):
            language = token.info.strip()
            kind = LANGUAGES.get(language, "text") if language else kind_of(token.content)
            yield Code(place, kind, token.content)


def kind_of(block: str) -> str:
    """The kind of a block without a language."""
    if block.startswith(NO_CODE):
        return "text"
    if block.startswith("--"):
        return "options"
    return "python" if re.match(r"(import|from) \w", block) else "shell"


def all_code(*kinds: str) -> list[Code]:
    """The code of these kinds on all pages."""
    return [piece for page in PAGES for piece in code(page) if piece.kind in kinds]


def commands() -> list[Command]:
    """Every documented command, in blocks and inline."""
    found = []
    for piece in all_code("shell", "inline"):
        if piece.kind == "shell" or STARTS_COMMAND.match(piece.text):
            found += [Command(piece.place, words) for words in split_shell(piece.text)]
    return found


def split_shell(text: str) -> Iterator[tuple[str, ...]]:
    """The words of each command, without comments."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield tuple(words[:end])
            words = words[end + 1 :]


def links(page) -> list[tuple[str, str]]:
    """(place, target) of every link and picture."""
    found = []
    for token, line in tokens(page):
        if target := token.attrGet("href") or token.attrGet("src"):
            found.append((f"{page.relative_to(ROOT)}:{line}", target))
    return found


def anchors(page) -> set[str]:
    """The anchors that GitHub makes from the headings."""
    found: list[str] = []
    heading = False
    for token, _ in tokens(page):
        if token.type == "inline" and heading:
            text = "".join(child.content for child in token.children or [])
            found.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
        heading = token.type == "heading_open"
    return {f"{name}-{found[:i].count(name)}".removesuffix("-0") for i, name in enumerate(found)}


def first_cells(page) -> list[str]:
    """The code in the first cell of each row of a page's tables."""
    found, column = [], 0
    for token, _ in tokens(page):
        column = {"tr_open": 0, "td_close": column + 1}.get(token.type, column)
        if token.type == "code_inline" and column == 0:
            found.append(token.content)
    return found
