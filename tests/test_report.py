"""util.report and util.figures: the page is one safe, self-contained file whatever a run left."""

import base64
import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util import report
from util.figures import COLUMNS, GAP, MARGIN, learning_curves, reconstruction_grid, save_png
from util.report import write_report

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "img", "br", "hr", "input", "link"}
HOSTILE = '"><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>&amp;'


class Page(HTMLParser):
    """Collects elements and text; fails on tags that are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def pictures(self):
        sources = [attrs["src"] for attrs in self.all("img")]
        return [base64.b64decode(source.split(",", 1)[1], validate=True) for source in sources]

    def check_self_contained(self):
        assert not {tag for tag, _ in self.elements} & {
            "script",
            "link",
            "iframe",
            "object",
            "base",
        }
        ids = [attrs["id"] for _, attrs in self.elements if "id" in attrs]
        for _, attrs in self.elements:
            assert not [name for name in attrs if name.startswith("on")]
            assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
            assert "href" not in attrs
            # A curve's dots refer to a shape of their own panel: to one place on this very page.
            if "xlink:href" in attrs:
                assert attrs["xlink:href"][0] == "#"
                assert ids.count(attrs["xlink:href"][1:]) == 1
        assert len(set(ids)) == len(ids)
        assert "url(" not in self.source
        assert "@import" not in self.source


def images(k=2, size=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (k, size, size, 3), dtype=np.uint8)


def entry(epoch, **more):
    values = {"train_loss": 1 / (1 + epoch), "train_lr": 1e-4 * epoch, "train_grad_norm": 0.5}
    return {"epoch": epoch, **values, "images_per_s": 400.0, "epoch_s": 75.0, **more}


def write_log(folder, entries, tail=""):
    lines = "".join(json.dumps(e) + "\n" for e in entries)
    (folder / "log.txt").write_text(lines + tail)


def write_config(folder, **more):
    config = {
        "options": {"model": "mae_vit_tiny_patch16", "epochs": 10, "betas": [0.9, 0.95]},
        "command": "python main_pretrain.py --epochs 10",
        "versions": {"torch": "2.5.1"},
        "git_commit": "0123abcd",
        "data": {"path": "faces", "count": 12271},
        "model": {"name": "mae_vit_tiny_patch16", "parameters": 111_907_840},
    }
    (folder / "config.json").write_text(json.dumps(config | more))


@pytest.fixture
def run(tmp_path):
    """A finished run of ten epochs with three figures of reconstructions."""
    write_log(tmp_path, [entry(e, data_wait=0.02, skipped_steps=e % 2) for e in range(10)])
    write_config(tmp_path)
    (tmp_path / "status.json").write_text('{"status": "done"}')
    (tmp_path / "bad_images.txt").write_text("".join(f"{i}.jpg truncated\n" for i in range(12)))
    for epoch in (0, 4, 9):
        grid = reconstruction_grid(*[images(seed=epoch)] * 4, title=f"epoch {epoch}")
        save_png(grid, tmp_path / "figures" / f"reconstruction-{epoch:04d}.png")
    return tmp_path


def test_page_is_one_self_contained_file_with_everything(run):
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    page.check_self_contained()
    # The names of XML's namespaces look like addresses and are none.
    source = re.sub(r' xmlns(:xlink)?="http://www\.w3\.org/(2000/svg|1999/xlink)"', "", page.source)
    assert not re.search("https?://|<!(?!doctype html>)|<[?]|<metadata", source)
    for text in (
        "mae_vit_tiny_patch16", "done", "1 → 0.1", "12 min 30 s", "112 M", "12,271", "2.0%",
        "python main_pretrain.py --epochs 10", "0123abcd", "Unreadable images: 12", "and 2 more",
    ):  # fmt: skip
        assert text in page.text, text
    assert "12.jpg" not in page.text
    assert len(page.all("svg")) == 4
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert sorted(p.name for p in run.iterdir() if "report" in p.name) == ["report.html"]


def test_pictures_come_back_unchanged_newest_first_then_in_order(run):
    found = Page(write_report(run)).pictures()
    names = [f"reconstruction-{epoch:04d}.png" for epoch in (9, 0, 4)]
    assert found == [(run / "figures" / name).read_bytes() for name in names]
    grid = reconstruction_grid(*[images(seed=9)] * 4, title="epoch 9")
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(found[0]))), grid)


def test_making_the_page_again_gives_the_same_bytes(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_hostile_text_is_shown_never_obeyed(tmp_path):
    folder = tmp_path / "<img src=x>&"
    folder.mkdir()
    write_log(folder, [entry(e, **{f"test_{HOSTILE}": 0.5, "test_b": 0.1}) for e in range(3)])
    write_config(
        folder,
        options={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}, "template": "$title ${x} $"},
        command=HOSTILE,
        versions={HOSTILE: HOSTILE},
        git_commit=HOSTILE,
        data={"path": HOSTILE, "count": HOSTILE},
        model={"name": HOSTILE, "parameters": HOSTILE},
    )
    (folder / "status.json").write_text(json.dumps({"status": HOSTILE, "reason": HOSTILE}))
    (folder / "bad_images.txt").write_text(HOSTILE)
    save_png(images()[0], folder / "figures" / '"><script>alert(3)<.png')
    page = Page(write_report(folder))
    page.check_self_contained()
    assert page.text.count(HOSTILE) >= 10
    assert "$title ${x} $" in page.text
    assert len(page.pictures()) == 1


def test_file_names_that_are_no_text_do_not_stop_it(run):
    path = run / "figures" / "caf\udce9.png"
    try:
        save_png(images()[0], path)
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert len(Page(write_report(run)).pictures()) == 4


@pytest.mark.parametrize("tail", ['{"epoch": 10, "train_lo', "\0\0\0", "[1]\n7\n", "[" * 100_000])
def test_torn_last_log_line_is_passed_over(run, tail):
    expected = write_report(run).read_bytes()
    write_log(run, [entry(e, data_wait=0.02, skipped_steps=e % 2) for e in range(10)], tail)
    assert write_report(run).read_bytes() == expected


def test_torn_files_are_left_out(run):
    for name in ("config.json", "status.json"):
        (run / name).write_text('{"options": {"a": ')
    whole = (run / "figures" / "reconstruction-0009.png").read_bytes()
    (run / "figures" / "reconstruction-0010.png").write_bytes(whole[: len(whole) // 2])
    (run / "figures" / "reconstruction-0011.png").write_bytes(b"")
    page = Page(write_report(run))
    assert page.pictures()[0] == whole
    assert "2 of 5 files in figures/ are not shown" in page.text
    assert "unfinished" in page.text


@pytest.mark.parametrize("config", ["[]", "null", '{"options": 3, "model": "x", "data": []}'])
def test_config_of_another_shape_is_tolerated(run, config):
    (run / "config.json").write_text(config)
    Page(write_report(run)).check_self_contained()


def test_empty_directory_gets_a_page_and_no_directory_none(tmp_path):
    page = Page(write_report(tmp_path))
    page.check_self_contained()
    assert "Nothing recorded yet." in page.text
    assert write_report(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()


def test_numbers_that_are_not_finite_leave_a_gap_and_a_mark(tmp_path):
    bad = {3: math.nan, 4: math.inf, 5: -math.inf, 6: 10**400, 7: "x", 8: None}
    write_log(
        tmp_path, [entry(e, train_loss=bad.get(e, 1.0), train_lr=math.nan) for e in range(10)]
    )
    page = Page(write_report(tmp_path))
    assert "1 → 1" in page.text
    assert not re.search(r"\b(nan|inf)\b", page.source.lower())
    assert len(re.findall("<use [^>]*stroke: #e5484d", page.source)) == len(bad)
    line = next(e["d"] for e in page.all("path") if "stroke: #3b82f6" in e.get("style", ""))
    assert line.count("M") == 2  # before the gap and behind it
    assert "Learning rate" not in page.text


def test_status_and_reason_are_named(run):
    (run / "status.json").write_text('{"status": "failed", "reason": "the loss stays non-finite"}')
    page = Page(write_report(run))
    assert "failed" in page.text
    assert "the loss stays non-finite" in page.text


def test_page_stays_small_and_says_so(run, monkeypatch):
    sizes = {p: p.stat().st_size for p in (run / "figures").iterdir()}
    data = (run / "figures" / "reconstruction-0009.png").read_bytes()
    for epoch in range(10, 30):
        (run / "figures" / f"reconstruction-{epoch:04d}.png").write_bytes(data)
    monkeypatch.setattr(report, "FIGURE_BYTES", 6 * max(sizes.values()))
    page = Page(write_report(run))
    found = page.pictures()
    assert found[0] == data
    assert 3 <= len(found) <= 6
    assert sum(map(len, found)) <= report.FIGURE_BYTES
    assert f"{23 - len(found)} of 23 files" in page.text


def test_page_is_below_ten_megabytes(tmp_path):
    write_log(tmp_path, [entry(e) for e in range(3000)])
    write_config(tmp_path, command="x" * 10**6, options={"o": "y" * 10**6})
    (tmp_path / "bad_images.txt").write_text("z" * 10**6)
    data = io.BytesIO()
    Image.fromarray(images(1, 800)[0]).save(data, "PNG", compress_level=0)
    (tmp_path / "figures").mkdir()
    for epoch in range(8):
        (tmp_path / "figures" / f"reconstruction-{epoch}.png").write_bytes(data.getvalue())
    assert write_report(tmp_path).stat().st_size < 10_000_000


# ------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("k", "size", "factor"), [(1, 224, 1), (3, 128, 1), (2, 32, 4), (1, 100, 2)]
)
def test_grid_shows_every_pixel_of_every_stage(k, size, factor):
    stages = [images(k, size, seed) for seed in range(4)]
    grid = reconstruction_grid(*stages, title="a title", note="a note")
    side = size * factor
    assert grid.dtype == np.uint8
    assert grid.shape[1:] == (4 * side + 3 * GAP + 2 * MARGIN, 3)
    top = grid.shape[0] - MARGIN - k * side - (k - 1) * GAP
    for column, stage in enumerate(stages):
        for row in range(k):
            y, x = top + row * (side + GAP), MARGIN + column * (side + GAP)
            cell = grid[y : y + side : factor, x : x + side : factor]
            np.testing.assert_array_equal(cell, stage[row])
            # A label stands above each column and reaches into no other.
        strip = grid[top - 16 : top, x : x + side]
        assert (strip < 128).any(), COLUMNS[column]
        assert (grid[top - 16 : top, x + side : x + side + GAP] == 255).all()


@pytest.mark.parametrize(("k", "rows"), [(5, 5), (6, 3), (7, 4), (8, 4)])
def test_many_images_stand_in_two_blocks(k, rows):
    stages = [images(k, 128, seed) for seed in range(4)]
    grid = reconstruction_grid(*stages, title="a title")
    blocks = 2 if rows < k else 1
    block = 4 * 128 + 3 * GAP + MARGIN
    assert grid.shape[1] == MARGIN + blocks * block
    top = grid.shape[0] - MARGIN - rows * 128 - (rows - 1) * GAP
    for column, stage in enumerate(stages):
        for i in range(k):
            y, x = top + i % rows * (128 + GAP), MARGIN + i // rows * block + column * (128 + GAP)
            np.testing.assert_array_equal(grid[y : y + 128, x : x + 128], stage[i])
            assert (grid[top - 16 : top, x : x + 128] < 128).any()  # a label over both blocks
    if blocks * rows > k:
        assert (grid[-MARGIN - 128 :, MARGIN + block :] == 255).all()


def test_grid_wraps_long_titles_inside_the_picture():
    stages = [images(1, 128)] * 4
    plain = reconstruction_grid(*stages, title="t")
    long = reconstruction_grid(*stages, title="word " * 60, note="x" * 300)
    assert long.shape[0] > plain.shape[0]
    assert (long[:, -MARGIN:] == 255).all()
    assert reconstruction_grid(*stages, title="").shape[0] < plain.shape[0]


def test_grid_refuses_what_it_cannot_show():
    good = images()
    for wrong in (good[:1], good.astype(np.float32), good[..., 0]):
        with pytest.raises(ValueError, match="uint8"):
            reconstruction_grid(good, good, good, wrong, title="")
    with pytest.raises(ValueError, match="four"):
        reconstruction_grid(good, good, title="")
    with pytest.raises(ValueError, match="K, H, W"):
        reconstruction_grid(*[good[:0]] * 4, title="")


def test_saving_replaces_whole_files_only(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_png(images()[0], path)
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        save_png(np.zeros((2, 2, 7), np.complex64), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "losses",
    [[1.0], [0.0, 0.0], [2.0] * 5, [1e-29, 1e29], [-1.0, 1.0], [5e-324, 0.0], [1.0, 1.0 + 1e-15]],
)
def test_curves_of_awkward_values_are_drawn_inside_the_panel(losses):
    (svg,) = learning_curves([{"epoch": e, "train_loss": y} for e, y in enumerate(losses)])
    root = ET.fromstring(svg)
    width, height = map(float, root.get("viewBox").split()[2:])
    dots = [e for e in root.iter() if e.tag.endswith("use")]
    assert len(dots) == len(losses) + 1  # the legend's
    assert all(0 <= float(e.get("x")) <= width and 0 <= float(e.get("y")) <= height for e in dots)
    numbers = [float(e.get(k)) for e in root.iter() if e.tag.endswith("text") for k in "xy"]
    assert all(0 <= number <= width for number in numbers)


def test_loss_is_logarithmic_only_where_it_spans_a_decade():
    def heading(*losses):
        (svg,) = learning_curves([{"epoch": e, "train_loss": y} for e, y in enumerate(losses)])
        return ET.fromstring(svg).get("aria-label")

    assert heading(1.0, 0.1) == heading(1e6, 1e-6) == "Loss, log scale"
    assert heading(1.0, 0.2) == heading(1.0, 0.0) == heading(1.0, -0.1) == "Loss"


def test_epochs_are_whole_and_names_are_shown_as_they_stand():
    log = [{"epoch": e, "test__a": 0.5, "test_$x^2$\ud800\0": 0.25} for e in range(3)]
    (svg,) = learning_curves(log)
    text = [e.text for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]
    assert text[:3] == ["0", "1", "2"]
    assert {"test__a 0.5", "test_$x^2$?? 0.25"} <= set(text)


def test_curves_of_nothing_are_empty_and_of_thousands_short():
    assert learning_curves([]) == []
    assert learning_curves([{"epoch": 0, "note": "x", "flag": True}]) == []
    log = [entry(e, test_acc1=50.0, test_uar=0.5, test_f1=0.4, test_x=0.3) for e in range(20_000)]
    panels = learning_curves(log)
    assert sum(map(len, panels)) < 200_000
    titles = {ET.fromstring(svg).get("aria-label") for svg in panels}
    assert titles >= {"Test, 0–100", "Test, 0–1", "Learning rate", "Images a second"}


def test_command_line_makes_the_page_or_says_why_not(run):
    def call(*arguments):
        command = [sys.executable, "-m", "util.report", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = call(run)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html"))
    missing = call(run / "absent")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "absent" in missing.stderr
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    unwritable = call(run)
    assert (unwritable.returncode, unwritable.stderr.count("\n")) == (1, 1)


def test_a_page_that_cannot_be_written_is_the_callers_to_decide(run):
    (run / "report.html").mkdir()
    with pytest.raises(OSError, match="report"):
        write_report(run)
    assert (run / "report.html").is_dir()


def test_several_runs_share_a_page(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.txt").write_text('{"epoch": 0, "train_loss": 0.5}\n')
    path = write_report(run, other, page=tmp_path / "both.html")
    page = Page(path)
    page.check_self_contained()
    assert path == tmp_path / "both.html"
    assert len(page.pictures()) == len(Page(write_report(run)).pictures())
    assert path.read_text().count("<h1>") == 2
    assert write_report(run, tmp_path / "absent") is None
