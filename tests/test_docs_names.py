"""Links, files and messages named in README.md and docs/*.md exist."""

import ast
import re
import subprocess
from fnmatch import fnmatch

import pytest
from test_structure import SOURCES

from documents import PAGES, all_code, anchors, first_cells, links
from runs import ROOT

README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page):
    for place, target in links(page):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = page if not path else (page.parent / path).resolve()
        assert linked.exists(), f"{place}: {target}"
        assert not anchor or anchor in anchors(linked), f"{place}: {target}: no such heading"


def test_pages_are_linked_from_the_front_page_and_back():
    front = {target.partition("#")[0] for _, target in links(README)}
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in front, f"{page.name} is not linked from README.md"
        head = page.read_text().partition("\n## ")[0]
        assert "](../README.md)" in head, f"{page.name} does not link back in its first lines"


def test_every_picture_is_shown_on_a_page():
    shown = {(page.parent / target).resolve() for page in PAGES for _, target in links(page)}
    assert [p.name for p in (ROOT / "docs").glob("*.png") if p.resolve() not in shown] == []


def test_files_named_in_the_text_exist():
    names = re.compile(r"((?:util|datasets|recipes|benchmarks|tests|docs)/[\w/.]+\w|\w+\.py)")
    there = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    there |= {"main_rafdb.py", "main_ferplus.py", "main_affectnet7.py"}  # the original MAE-SFER's
    wrong = [
        f"{piece.place}: {piece.text}"
        for piece in all_code("inline")
        if names.fullmatch(piece.text) and not ((ROOT / piece.text).exists() or piece.text in there)
    ]
    assert wrong == []


def test_the_map_names_every_file_and_folder_and_no_other():
    (block,) = [code for code in all_code("text") if code.text.startswith("main_pretrain.py ")]
    first = [line[:25].strip() for line in block.text.splitlines()]  # the column of names
    named = [name.rstrip("/") for names in first for name in names.split(", ")]
    assert [name for name in named if not list(ROOT.glob(name))] == []
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    there = {path.partition("/")[0] for path in tracked.stdout.splitlines()}
    there |= {path.name for path in ROOT.glob("*.py")}  # also where there is no git
    there -= {"README.md", ".gitignore"}
    assert [name for name in there if not any(fnmatch(name, known) for known in named)] == []


def strings_of(path):
    """Every string in a module, with … in place of inserted values."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_explained_messages_are_printed_by_the_programs():
    said = [text for path in SOURCES for text in strings_of(path)]
    unknown = []
    for message in first_cells(ROOT / "docs" / "troubleshooting.md"):
        parts = [p.strip(" :,;") for p in re.split(r"…|\([^)]*\)|\d+", message)]
        unknown += [p for p in parts if " " in p and not any(p in text for text in said)]
    assert unknown == []
