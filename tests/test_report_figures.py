"""util.report.figure_section: figures in order, with captions, within the size limit."""

import re

import numpy as np
import pytest

from util.report.figure_section import CAPTIONS, WIDE, figures_section
from util.report.figures import save_png

HOSTILE = "<b onload=x>&"


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate([*CAPTIONS, "my-own", HOSTILE]):
        save_png(noise(40, i), tmp_path / f"{name}.png")
    return tmp_path


def captions(html):
    return re.findall(r"<figcaption>(.*?)</figcaption>", html)


def test_figures_are_in_reading_order_with_captions(folder):
    first, html = figures_section(folder, 10**7)
    expected = [f"<strong>{title}.</strong> {text}" for title, text in CAPTIONS.values()]
    assert captions(first) == expected[:1]
    assert captions(html) == [*expected[1:], "&lt;b onload=x&gt;&amp;", "my-own"]
    assert html.count('<figure class="wide">') == len(WIDE)
    assert "<b onload" not in html


def test_every_figure_can_be_enlarged_to_at_least_its_own_size(folder):
    html = "".join(figures_section(folder, 10**7))
    zooms = re.findall(
        r'<label class="zoom" style="--w:40px"><input type="checkbox" aria-label="Enlarge [^"]+">'
        r'<span><img src="data:image/png;base64,[^"]+" alt="[^"]+" width="40" height="40"></span>'
        "</label>",
        html,
    )
    assert len(zooms) == html.count("<img") == len(CAPTIONS) + 2


def test_known_figures_are_included_before_others(folder):
    size = (folder / "classes.png").stat().st_size
    save_png(noise(400), folder / "attention.png")
    html = "".join(figures_section(folder, 2 * 4 * size))
    shown = captions(html)
    known = ("predictions", "confusion_matrix", "classes", "reliability")
    assert [caption.split(".")[0] for caption in shown[:4]] == [
        f"<strong>{CAPTIONS[name][0]}" for name in known
    ]
    assert CAPTIONS["attention"][0] not in html
    assert f"{len(CAPTIONS) + 2 - len(shown)} of {len(CAPTIONS) + 2} files in figures/" in html
