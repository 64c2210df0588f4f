"""util.report: the page is one safe, self-contained file, whatever is in a run's folder."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.report.figures import reconstruction_grid, save_png
from util.report.page import write_report

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "img", "br", "hr", "input", "link"}
HOSTILE = '"><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>&amp;'


class Page(HTMLParser):
    """Collects elements and text; fails on tags that are not properly nested."""

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
            # Dots of a curve refer to a shape of their panel, which must exist once on the page.
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
        grid = reconstruction_grid(*[images(seed=epoch)] * 3, title=f"epoch {epoch}")
        save_png(grid, tmp_path / "figures" / f"reconstruction-{epoch:04d}.png")
    return tmp_path


def test_page_is_one_self_contained_file_with_everything(run):
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    page.check_self_contained()
    # XML namespaces look like addresses but are not loaded.
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


def test_pictures_are_included_unchanged_newest_first_then_in_order(run):
    found = Page(write_report(run)).pictures()
    names = [f"reconstruction-{epoch:04d}.png" for epoch in (9, 0, 4)]
    assert found == [(run / "figures" / name).read_bytes() for name in names]
    grid = reconstruction_grid(*[images(seed=9)] * 3, title="epoch 9")
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(found[0]))), grid)


def test_writing_the_page_again_gives_the_same_bytes(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_hostile_text_is_shown_as_text(tmp_path):
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


def test_file_names_that_are_not_valid_text_are_accepted(run):
    path = run / "figures" / "caf\udce9.png"
    try:
        save_png(images()[0], path)
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert len(Page(write_report(run)).pictures()) == 4


@pytest.mark.parametrize("tail", ['{"epoch": 10, "train_lo', "\0\0\0", "[1]\n7\n", "[" * 100_000])
def test_an_incomplete_last_log_line_is_skipped(run, tail):
    expected = write_report(run).read_bytes()
    write_log(run, [entry(e, data_wait=0.02, skipped_steps=e % 2) for e in range(10)], tail)
    assert write_report(run).read_bytes() == expected


def test_incomplete_files_are_left_out(run):
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
def test_a_config_of_another_structure_is_accepted(run, config):
    (run / "config.json").write_text(config)
    Page(write_report(run)).check_self_contained()


def test_an_empty_folder_gets_a_page_and_a_missing_folder_none(tmp_path):
    page = Page(write_report(tmp_path))
    page.check_self_contained()
    assert "Nothing recorded yet." in page.text
    assert write_report(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()


def test_values_that_are_not_finite_give_a_gap_and_a_mark(tmp_path):
    bad = {3: math.nan, 4: math.inf, 5: -math.inf, 6: 10**400, 7: "x", 8: None}
    write_log(
        tmp_path, [entry(e, train_loss=bad.get(e, 1.0), train_lr=math.nan) for e in range(10)]
    )
    page = Page(write_report(tmp_path))
    assert "1 → 1" in page.text
    assert not re.search(r"\b(nan|inf)\b", page.source.lower())
    assert len(re.findall("<use [^>]*stroke: #e5484d", page.source)) == len(bad)
    line = next(e["d"] for e in page.all("path") if "stroke: #3b82f6" in e.get("style", ""))
    assert line.count("M") == 2  # before and after the gap
    assert "Learning rate" not in page.text


def test_status_and_reason_are_shown(run):
    (run / "status.json").write_text('{"status": "failed", "reason": "the loss stays non-finite"}')
    page = Page(write_report(run))
    assert "failed" in page.text
    assert "the loss stays non-finite" in page.text


def test_figures_beyond_the_size_limit_are_left_out_and_counted(run, monkeypatch):
    sizes = {p: p.stat().st_size for p in (run / "figures").iterdir()}
    data = (run / "figures" / "reconstruction-0009.png").read_bytes()
    for epoch in range(10, 30):
        (run / "figures" / f"reconstruction-{epoch:04d}.png").write_bytes(data)
    room = 6 * max(sizes.values())
    monkeypatch.setattr("util.report.page.FIGURE_BYTES", room)
    page = Page(write_report(run))
    found = page.pictures()
    assert found[0] == data
    assert 3 <= len(found) <= 6
    assert sum(map(len, found)) <= room
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


def test_the_command_line_writes_the_page_or_prints_one_error_line(run):
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


def test_a_page_that_cannot_be_written_raises_an_error(run):
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


# ------------------------------------------------------------------------------------- results


def write_result(folder, accuracy=80.0, **more):
    """Write the results of an evaluated run."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = ["Happy", "Sad", "Fear"]
    result = {
        "n": 3068, "accuracy": accuracy, "uar": accuracy - 5, "macro_f1": accuracy - 6,
        "accuracy_ci": [accuracy - 1, accuracy + 1], "uar_ci": [accuracy - 7, accuracy - 3],
        "recall": {"Happy": 91.234, "Sad": 0.0, "Fear": None},
        "precision": {"Happy": 88.5, "Sad": None, "Fear": None},
        "support": {"Happy": 1185, "Sad": 478, "Fear": 0}, "classes": classes,
        "log_loss": 0.4321, "ece": 2.34, "data": "RAF-DB basic, aligned", "rule": "argmax of votes",
        "split": "test", "epoch": 73, "selected_on": "test", "weights": "model", "flip": False,
        "unreadable": 0,
        "last": {"epoch": 99, "accuracy": accuracy - 0.5, "uar": 1.25, "macro_f1": 2.5},
    }  # fmt: skip
    (folder / "eval.json").write_text(json.dumps(result | more))
    (folder / "status.json").write_text('{"status": "done"}')
    return folder


def test_results_show_metrics_classes_and_the_chosen_and_last_epoch(run):
    write_result(run, 91.07)
    page = Page(write_report(run))
    page.check_self_contained()
    for text in (
        "91.07", "90.07–92.07", "86.07", "84.07–88.07", "85.07", "3,068", "chosen73", "last99",
        "90.57", "1.25", "Happy91.2388.501,185", "Sad0.00–478", "Fear––0", "0.432", "2.3\u00a0%",
        "RAF-DB basic, aligned, test; labels by argmax of votes",
    ):  # fmt: skip
        assert text in page.text, text


@pytest.mark.parametrize(
    ("more", "said", "unsaid"),
    [
        ({}, "flatters", "not used for that"),
        (
            {"selected_on": "val"},
            "on val; the images tested here were not used for that",
            "flatters",
        ),
        ({"selected_on": None}, "Weights of epoch 73", "chosen as"),
        ({"weights": "model_ema"}, "EMA", "mirror"),
        ({"flip": True}, "mirror image", "EMA"),
        ({"unreadable": 12}, "could not be read: 12", "EMA"),
    ],
)
def test_results_state_how_they_were_selected_and_measured(tmp_path, more, said, unsaid):
    page = Page(write_report(write_result(tmp_path / "run", **more)))
    assert said in page.text
    assert unsaid not in page.text


def test_best_accuracy_so_far_is_replaced_by_the_results(run):
    write_log(run, [entry(e, test_acc1=50.0 + e) for e in range(10)])
    assert "best test accuracy" in Page(write_report(run)).text
    write_result(run)
    assert "best test accuracy" not in Page(write_report(run)).text


def test_the_confusion_matrix_is_shown(run):
    save_png(images()[0], run / "figures" / "confusion.png")
    assert (run / "figures" / "confusion.png").read_bytes() in Page(write_report(run)).pictures()


@pytest.mark.parametrize(
    "more",
    [
        {"accuracy": math.nan},
        {"uar": "80"},
        {"macro_f1": 10**400},
        {"accuracy": True},
    ],
)
def test_results_with_invalid_metrics_are_not_shown(tmp_path, more):
    write_result(tmp_path / "run", **more)
    assert "Result" not in Page(write_report(tmp_path / "run")).text


def test_hostile_results_are_shown_as_text(tmp_path):
    hostile = dict.fromkeys(("data", "rule", "split", "selected_on", "weights", "flip"), HOSTILE)
    hostile |= {"classes": [HOSTILE, ["x"], {}], "recall": [1], "support": {HOSTILE: HOSTILE}}
    hostile |= {"epoch": 1, "last": {"accuracy": HOSTILE, "uar": 3}, "accuracy_ci": [HOSTILE, 1]}
    hostile |= {"n": math.inf, "log_loss": math.nan, "ece": [], "unreadable": HOSTILE}
    runs = [write_result(tmp_path / "<b>" / f"seed-{i}", **hostile) for i in range(2)]
    page = Page(write_report(*runs))
    page.check_self_contained()
    assert page.text.count(HOSTILE) >= 4
    assert not re.search(r"\b(nan|inf)\b", page.source.lower())


def groups_of(tmp_path, **groups):
    """Folders GROUP/seed-N with these accuracies; None: a run without results."""
    folders = []
    for name, accuracies in groups.items():
        for seed, accuracy in enumerate(accuracies):
            folder = tmp_path / name / f"seed-{seed}"
            folder.mkdir(parents=True)
            if accuracy is not None:
                write_result(folder, accuracy)
            folders.append(folder)
    return folders


def test_groups_are_compared_by_mean_deviation_and_paired_difference(tmp_path):
    folders = groups_of(tmp_path, pretrained=[80, 82, 87], scratch=[79, 83, 81])
    page = Page(write_report(*folders, page=tmp_path / "page.html"))
    page.check_self_contained()
    first, second = np.array([80, 82, 87]), np.array([79, 83, 81])
    differences = [1, -1, 6]
    for values in (first - 0.5, second - 0.5, first, second):  # of the last and the best epochs
        expected = f"{np.mean(values):.2f} ±\xa0{np.std(values, ddof=1):.2f}"
        assert expected in page.text
    assert "80.00 · 82.00 · 87.00" in page.text
    assert "79.50 · 81.50 · 86.50" in page.text
    shown = f"accuracy +{np.mean(differences):.2f}\xa0±\xa0{np.std(differences, ddof=1):.2f} points"
    assert f"pretrained minus scratch, seed by seed: {shown} (higher in 2 of 3 seeds)" in page.text


def test_negative_and_zero_differences_are_shown(tmp_path):
    folders = groups_of(tmp_path, a=[70, 75], b=[80, 75])
    text = Page(write_report(*folders)).text
    assert "accuracy −5.00\xa0±\xa07.07 points (higher in 0 of 2 seeds, equal in 1)" in text


@pytest.mark.parametrize("change", [{"n": 100}, {"rule": "majority"}, {"data": "AffectNet"}])
def test_results_of_different_tests_are_not_subtracted(tmp_path, change):
    folders = groups_of(tmp_path, a=[70, 75], b=[80, 75])
    assert "minus" in Page(write_report(*folders)).text
    write_result(folders[-1], **change)
    assert "minus" not in Page(write_report(*folders)).text


def test_groups_of_different_seeds_are_not_subtracted(tmp_path):
    text = Page(write_report(*groups_of(tmp_path, a=[70, 75], b=[80, None, 75]))).text
    assert "72.50 ±\xa03.54" in text
    assert "77.50 ±\xa03.54" in text
    assert "seeds 0, 2" in text
    assert "minus" not in text


def test_the_comparison_comes_first_then_a_run_of_each_group_then_runs_without_results(
    tmp_path, run
):
    folders = [run, *groups_of(tmp_path, a=[70, 71, 72], b=[80, None, 82])]
    headings = re.findall(r"<h1>(.*?)</h1>", Page(write_report(*folders)).source)
    # b's second run has no results for the comparison, so that it is shown on its own.
    assert headings == ["a and b compared", "a/seed-0", "b/seed-0", run.name, "b/seed-1"]


def test_runs_with_one_name_of_a_model_are_told_apart_by_their_folders(tmp_path):
    folders = [tmp_path / name for name in ("x/one", "y/one", "two")]
    for folder in folders:
        write_config(write_result(folder))
    page = Page(write_report(*folders))
    headings = re.findall(r"<h1>(.*?)</h1>", page.source)
    assert headings == ["x/one, y/one and two compared", "x/one", "y/one", "two"]


def test_an_evaluated_run_starts_with_its_result_and_another_with_its_name(run):
    assert re.findall(r"<h1>(.*?)</h1>", Page(write_report(run)).source) == [run.name]
    write_result(run, 91.07)
    page = Page(write_report(run))
    assert re.findall(r"<h1>(.*?)</h1>", page.source) == ["Accuracy 91.07\xa0%, UAR 86.07\xa0%"]
    assert f"done {run.name} · mae_vit_tiny_patch16, 12,271 training images" in page.text
    sections = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert sections[:5] == ["Result", "Classes", "Reconstructions", "Training", "Command"]
    assert "UAR by chance, %" in page.text


@pytest.mark.parametrize(
    ("options", "more", "told"),
    [
        ({"finetune": "/a/b/c.pth"}, {"train_images": 80}, "fine-tuned from b/c.pth, 80 training"),
        ({"finetune": ""}, {}, "vit, from scratch, 12,271 training images"),
        ({"mask_ratio": 0.75}, {}, "vit, pre-training, 12,271 training images"),
        ({}, {"checkpoint": "r/best.pth"}, "vit, evaluation of r/best.pth"),
        ({}, {"checkpoint": "x", "classifier": "nearest neighbours"}, "nearest neighbours of x"),
        ({"finetune": HOSTILE}, {}, "fine-tuned from example.org/x onerror=alert(2)>&amp;"),
    ],
)
def test_a_run_says_what_its_model_was_trained_from(tmp_path, options, more, told):
    write_config(write_result(tmp_path / "run", **more), options=options, model={"name": "vit"})
    page = Page(write_report(tmp_path / "run"))
    page.check_self_contained()
    assert told in page.text


BAR = re.compile(r'<div class="bar"><span>(.*?)</span>(.*?)<span>([^<]*)</span></div>')
MARK = re.compile(r'<i class="(\w+)" style="(?:width|left):([\d.]+)%(?:;width:([\d.]+)%)?"></i>')


def bars(page):
    """Of each chart, the bars: name, marks with their places in %, and the value."""
    charts = re.findall(r'<figure class="bars">.*?</figure>', page.source)
    return [
        [
            (name, [(m[1], *map(float, filter(None, m.groups()[1:]))) for m in marks], value)
            for name, body, value in BAR.findall(chart)
            for marks in [MARK.finditer(body)]
        ]
        for chart in charts
    ]


def test_the_bars_show_the_last_epochs_with_chance_and_every_seed(tmp_path):
    folders = groups_of(tmp_path, a=[70, 71], b=[80, 84])
    for folder, uar in zip(folders, (50, 52, 60, 64), strict=True):
        last = {"epoch": 99, "accuracy": uar + 10, "uar": uar, "macro_f1": 2.5}
        write_result(folder, 90.0, last=last)
    page = Page(write_report(*folders))
    uar, accuracy = bars(page)
    # Two of the three classes have images; the larger has 1185 of 1663.
    assert uar == [
        ("a", [("fill", 51), ("chance", 50), ("dot", 50), ("dot", 52)], "51.00 ± 1.41"),
        ("b", [("fill", 62), ("chance", 50), ("dot", 60), ("dot", 64)], "62.00 ± 2.83"),
    ]
    assert [row[1][:2] for row in accuracy] == [
        [("fill", 61), ("chance", 71.26)],
        [("fill", 72), ("chance", 71.26)],
    ]
    assert "4 runs: 2 of a and 2 of b, each tested on 3068 images" in page.text
    assert "Chance level: UAR 50.0\xa0%" in page.text
    assert "Compared at the last epoch of each run" in page.text
    assert "as these runs did" in page.text
    assert "a minus b, seed by seed: accuracy −11.00" in page.text


def test_epochs_that_were_not_chosen_on_the_test_images_are_compared(tmp_path):
    folders = [write_result(tmp_path / n, a, selected_on="val") for n, a in (("x", 60), ("y", 70))]
    page = Page(write_report(*folders))
    _, accuracy = bars(page)
    assert accuracy[0] == ("x", [("fill", 60), ("chance", 71.26), ("range", 59, 2)], "60.00")
    assert "Compared at" not in page.text
    assert "flatters" not in page.text


def test_a_last_epoch_keeps_no_intervals_of_the_best_one(tmp_path):
    folders = [write_result(tmp_path / name) for name in "xy"]
    assert all("range" not in dict(row[1]) for row in bars(Page(write_report(*folders)))[1])
    last = {"epoch": 73, "accuracy": 80.0, "uar": 75.0, "macro_f1": 74.0}  # the best is the last
    write_result(tmp_path / "x", last=last)
    one, other = bars(Page(write_report(*folders)))[1]
    assert one[1][-1] == ("range", 79, 2)
    assert other[1][-1][0] == "chance"


def test_results_of_different_tests_are_marked_and_have_no_common_chance_level(tmp_path):
    folders = [write_result(tmp_path / "x"), write_result(tmp_path / "y", data="AffectNet")]
    text = Page(write_report(*folders)).text
    assert "tested under different conditions: compare with care" in text
    assert "Chance level" not in text
    assert "3068 images, AffectNet, test; labels by argmax of votes; epoch chosen on test" in text


def test_hostile_names_are_compared_as_text(tmp_path):
    folders = groups_of(tmp_path, **{"<b onload=x>&": [70, 71], "<i>": [80, 84]})
    page = Page(write_report(*folders))
    page.check_self_contained()
    assert "<b onload=x>& and <i> compared" in page.text
    assert "<b onload" not in page.source


def test_single_runs_are_compared_with_their_confidence_intervals(tmp_path):
    folders = [write_result(tmp_path / "one", 80.0), write_result(tmp_path / "two", 81.0)]
    page = Page(write_report(*folders))
    assert "one80.0079.00–81.00" in page.text
    assert "two81.0080.00–82.00" in page.text
    assert page.source.count("<h1>") == 3
    assert "compared" not in Page(write_report(folders[0])).text


def test_groups_with_one_name_are_distinguished(tmp_path):
    folders = groups_of(tmp_path, **{"x/g": [1, 2], "y/g": [3, 4]})
    text = Page(write_report(*folders)).text
    assert "x/g" in text
    assert "y/g minus" not in text
    assert "x/g minus y/g" in text
