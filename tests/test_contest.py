"""benchmarks/contest.py: both sides at equal labels and minutes, in one table."""

import json

import numpy as np
import pytest

from benchmarks import contest, rivals
from layouts import picture, save
from util.rundir import read_json
from util.summary import read_log


def run(options):
    return contest.main(options.split())


def leave_run(folder, uar, seconds):
    """Write a run's results: a test per number in `uar`, after equal parts of the seconds."""
    folder.mkdir(parents=True)
    scores = {"accuracy": 90.0, "macro_f1": 90.0, "images_seen": 1000 * len(uar)}
    result = {**scores, "uar": max(uar), "last": {**scores, "uar": uar[-1], "epoch": len(uar) - 1}}
    (folder / "eval.json").write_text(json.dumps(result))
    lines = [json.dumps({"test_uar": u, "epoch_s": seconds / len(uar)}) for u in uar]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")


def test_the_table_compares_last_epochs_seed_by_seed(tmp_path):
    leave_run(tmp_path / "pre-training", [0.0], 120)
    for labels, gain in ((80, 10.0), (560, -1.0)):
        for seed, scratch in enumerate((40.0, 50.0)):
            folder = tmp_path / f"labels-{labels}"
            leave_run(folder / f"resnet18/seed-{seed}", [80.0, scratch], 180)
            leave_run(folder / f"pre-trained/seed-{seed}", [70.0, scratch + gain + seed], 60)
    args = contest.build_parser().parse_args(f"--faces x --output_dir {tmp_path}".split())
    _, _, few, many = contest.table(args)
    assert few == "| 80 | 3.0 | 45.00 ± 7.07 | 55.50 ± 7.78 | +10.50 ± 0.71 |"
    assert many == "| 560 | 3.0 | 45.00 ± 7.07 | 44.50 ± 7.78 | −0.50 ± 0.71 |"
    assert contest.passes(args)[2:] == ["| 80 | 2,000 | 2,000 |", "| 560 | 2,000 | 2,000 |"]
    chart = contest.curves(args)
    more = f"--faces x --output_dir {tmp_path} --labels 80 --pseudo_passes 9"
    for seed in (0, 1):
        leave_run(tmp_path / f"labels-80/pseudo-labelled/seed-{seed}", [60.0], 30)
        (tmp_path / f"labels-80/pseudo-labelled/seed-{seed}.json").write_text('{"seconds": 6}')
    *_, longer = contest.table(contest.build_parser().parse_args(more.split()))
    assert longer == ("| 80 | 3.6 | 45.00 ± 7.07 | 55.50 ± 7.78 | 60.00 ± 0.00 | +15.00 ± 7.07 |")
    assert chart.shape[1] > 2 * chart.shape[0] * 0.9
    drawn = {tuple(pixel) for pixel in chart.reshape(-1, 3).tolist()}
    for side in (contest.SCRATCH, contest.TUNED):
        assert tuple(bytes.fromhex(contest.COLOURS[side][1:])) in drawn


def test_seeds_in_any_order_give_the_same_curves(tmp_path):
    leave_run(tmp_path / "pre-training", [0.0], 120)
    for seed in (0, 1):
        folder = tmp_path / "labels-80"
        leave_run(folder / f"resnet18/seed-{seed}", [10.0, 20.0 + seed], 200)
        leave_run(folder / f"pre-trained/seed-{seed}", [30.0, 40.0 + seed], 60 + 60 * seed)
        leave_run(folder / f"pseudo-labelled/seed-{seed}", [50.0, 60.0 + seed], 30)
        (folder / f"pseudo-labelled/seed-{seed}.json").write_text('{"seconds": 6}')
    charts = [
        contest.curves(contest.build_parser().parse(f"{common} --seeds {seeds}".split()))
        for common in [f"--faces x --output_dir {tmp_path} --labels 80 --pseudo_passes 9"]
        for seeds in ("0 1", "1 0")
    ]
    assert np.array_equal(*charts)


def test_quoted_options_are_passed_on_unchanged():
    words = ["--faces", "x", "--output-dir", "y", "--pretrain", "--epochs 3 --data_path 'a-b c'"]
    assert contest.build_parser().parse(words).pretrain == ["--epochs", "3", "--data_path", "a-b c"]


@pytest.mark.long
def test_it_trains_both_sides_for_the_same_minutes(tmp_path, capsys):
    faces = tmp_path / "faces"
    for k in range(12):
        (faces / "unlabelled").mkdir(parents=True, exist_ok=True)
        save(picture("Sad", k, "train", 32, True), faces / "unlabelled" / f"{k}.png")
    options = (
        f"--faces synthetic-lab:32:16 --unlabelled {faces}/unlabelled --labels 16 --seeds 1 "
        f"--input_size 32 --passes 64 --pseudo_passes 50 --output_dir {tmp_path / 'out'}"
    )
    more = ["--pretrain", "--epochs 1 --warmup_epochs 0 --batch_size 4", "--recipe", "1e-3:4"]
    assert contest.main([*options.split(), *more]) == 0
    said = capsys.readouterr().out
    tuned, pseudo, rival = (
        tmp_path / "out/labels-16" / name / "seed-1"
        for name in ("pre-trained", "pseudo-labelled", "resnet18")
    )
    minutes = rivals.minutes_of([str(tmp_path / "out/pre-training"), str(tuned), str(pseudo)])
    minutes += read_json(pseudo.with_suffix(".json"))["seconds"] / 60
    assert read_json(rival / "eval.json")["minutes"] == pytest.approx(minutes, abs=0.01)
    for folder in (tuned, rival):
        assert len(read_log(folder)) == contest.LOOKS
        assert read_json(folder / "config.json")["data"]["count"] == 16
    assert len(read_log(pseudo)) == 2
    assert read_json(pseudo / "config.json")["data"]["pseudo_labelled"] == 12
    for folder, begin in ((tuned, tmp_path / "out/pre-training"), (pseudo, tuned)):
        asked = read_json(folder / "config.json")["options"]
        assert asked["finetune"] == str(begin / "checkpoint-last.pth")
    assert (tmp_path / "out/table.md").read_text() in said
    assert [contest.images_seen(folder) for folder in (tuned, pseudo)] == [128, 56]
    assert (tmp_path / "out/curves.png").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("eval.json")}
    assert contest.main([*options.split(), *more]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("eval.json")} == before


def test_a_failing_program_is_named_with_its_log(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    options = f"--faces synthetic-lab:32:16 --unlabelled {tmp_path}/none --labels 8"
    assert run(f"{options} --output_dir {tmp_path}/out") == 2
    error = capsys.readouterr().err
    assert "main_pretrain.py" in error
    assert f"see {tmp_path}/out/pre-training.txt" in error
    assert "none" in (tmp_path / "out/pre-training.txt").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--faces synthetic-lab:32:16 --labels 8", "--unlabelled synthetic-lab:32:16/unlabelled"),
        ("--faces synthetic-lab:32:16 --unlabelled synthetic", "--labels 560: synthetic-lab:32:16"),
    ],
)
def test_bad_input_is_reported_before_anything_runs(more, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contest, "run", lambda *_: pytest.fail("ran"))
    assert run(f"{more} --output_dir {tmp_path}") == 2
    assert message in capsys.readouterr().err


def test_it_resumes_with_the_same_options_only(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(contest, "run", lambda command, log: ran.append(command))
    monkeypatch.setattr(contest, "starts", lambda *_: {"end": 2.5})
    monkeypatch.setattr(contest, "table", lambda args: [])
    monkeypatch.setattr(contest, "passes", lambda args: [])
    monkeypatch.setattr(contest, "curves", lambda args: np.zeros((2, 2, 3), np.uint8))
    options = "--faces synthetic-lab:32:16 --unlabelled synthetic --labels 8 --recipe 1e-3:8"
    assert run(f"{options} --output_dir {tmp_path}") == 0
    programs = ["main_finetune.py"] * 2 + ["benchmarks/rivals.py"] * 2
    assert [command[0] for command in ran[1:]] == programs
    assert all(command[command.index("--minutes") + 1] == 2.5 for command in ran[3:])
    assert run(f"{options} --output_dir {tmp_path} --passes 9") == 2
    assert "was made with --passes 32000, now 9" in capsys.readouterr().err
