"""benchmarks/contest.py: both sides at equal labels and minutes, in one table."""

import json

import numpy as np
import pytest

from benchmarks import contest, rivals
from util.rundir import read_json
from util.summary import read_log


def run(options):
    return contest.main(options.split())


def leave_run(folder, uar, seconds):
    """What a program leaves: a look a number of `uar`, an equal part of the seconds each."""
    folder.mkdir(parents=True)
    scores = {"accuracy": 90.0, "macro_f1": 90.0}
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
    picture = contest.curves(args)
    assert picture.shape[1] > 2 * picture.shape[0] * 0.9
    drawn = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in contest.COLOURS.values()} <= drawn


@pytest.mark.long
def test_it_trains_both_sides_for_the_same_minutes(tmp_path, capsys):
    options = (
        "--faces synthetic-lab:32:16 --unlabelled synthetic-lab:64 --labels 16 --seeds 1 "
        f"--input_size 32 --passes 64 --recipe 1e-3:4 --output_dir {tmp_path}"
    )
    short = ["--pretrain", "--epochs 1 --warmup_epochs 0 --batch_size 8"]
    assert contest.main([*options.split(), *short]) == 0
    said = capsys.readouterr().out
    tuned, rival = (
        tmp_path / "labels-16" / name / "seed-1" for name in ("pre-trained", "resnet18")
    )
    minutes = rivals.minutes_of([str(tmp_path / "pre-training"), str(tuned)])
    assert read_json(rival / "eval.json")["minutes"] == pytest.approx(minutes, abs=0.01)
    for folder in (tuned, rival):
        assert len(read_log(folder)) == contest.LOOKS
        assert read_json(folder / "config.json")["data"]["count"] == 16
    assert str(tmp_path / "pre-training/checkpoint-last.pth") in str(
        read_json(tuned / "config.json")["options"]["finetune"]
    )
    assert (tmp_path / "table.md").read_text() in said
    assert (tmp_path / "curves.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("eval.json")}
    assert contest.main([*options.split(), *short]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("eval.json")} == before


def test_a_program_that_fails_is_named(tmp_path, capsys):
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
def test_bad_input_is_told_before_anything_runs(more, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contest, "run", lambda *_: pytest.fail("ran"))
    assert run(f"{more} --output_dir {tmp_path}") == 2
    assert message in capsys.readouterr().err


def test_it_continues_with_the_same_options_only(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(contest, "run", lambda command, log: ran.append(command))
    monkeypatch.setattr(contest, "table", lambda args: [])
    monkeypatch.setattr(contest, "curves", lambda args: np.zeros((2, 2, 3), np.uint8))
    options = "--faces synthetic-lab:32:16 --unlabelled synthetic --labels 8 --recipe 1e-3:8"
    assert run(f"{options} --output_dir {tmp_path}") == 0
    programs = ["main_finetune.py"] * 2 + ["benchmarks/rivals.py"] * 2
    assert [command[0] for command in ran[1:]] == programs
    assert run(f"{options} --output_dir {tmp_path} --passes 9") == 2
    assert "was begun with --passes 32000, now 9" in capsys.readouterr().err
