"""main_reproduce.py and util.summary: one run per seed, and a summary of their metrics."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import main_reproduce as reproduce
from util.summary import Spread, group_runs, paired_difference

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "main_reproduce.py"

# A stand-in for main_finetune.py: records its command line and ends as `--end` says.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path

def option(name, default=None):
    found = [i for i, arg in enumerate(sys.argv) if arg == name]
    return sys.argv[found[-1] + 1] if found else default

seed, folder, end = int(option("--seed")), Path(option("--output_dir")), option("--end", "done")
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "calls.txt", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("waiting", flush=True)
    time.sleep(60)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if end.isdigit() and seed == 1:
    word = {"2": "bad_input", "75": "resumable"}.get(end, "failed")
    (folder / "status.json").write_text(json.dumps({"status": word}))
    sys.exit(int(end))
accuracy = {0: 90.0, 1: 91.5, 2: 93.0}.get(seed, 50.0)
result = {"accuracy": accuracy, "uar": accuracy - 5, "macro_f1": accuracy - 6, "n": 3068,
          "data": "RAF-DB basic", "split": "test", "selected_on": "test", "classes": ["a", "b"],
          "last": {"accuracy": accuracy - 1, "uar": accuracy - 7, "macro_f1": accuracy - 8}}
if end != "silent":
    (folder / "eval.json").write_text(json.dumps(result))
(folder / "status.json").write_text(json.dumps({"status": "done"}))
"""
RECIPE = """# RAF-DB. It's a recipe.
# Published: RAF-DB accuracy 91.07 %
# Published: something else 1 %
--model vit --epochs 2  # few
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a recipe, where a stand-in replaces main_finetune.py."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "recipe.args").write_text(RECIPE)
    monkeypatch.setattr(reproduce, "MAIN", tmp_path / "fake.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(folder):
    """The command lines that the stand-in was started with for a seed."""
    path = folder / "calls.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start(*argv):
    """Run main_reproduce.py with these arguments."""
    return reproduce.reproduce(["@recipe.args", "--output-dir", "out", *argv])


def test_every_option_is_passed_on_unchanged_and_in_order(here):
    code = start("--seeds", "0", "7", "--data_path", "a b", "--drop-path=0.1", "--mixup", "-1")
    assert code == 0
    passed = ["@recipe.args", "--data_path", "a b", "--drop_path=0.1", "--mixup", "-1"]
    for seed in ("0", "7"):
        expected = [*passed, "--seed", seed, "--output_dir", str(Path("out", f"seed-{seed}"))]
        assert calls(here / "out" / f"seed-{seed}") == [expected]


def test_the_table_has_mean_deviation_single_values_and_published_numbers(here, capfd):
    assert start() == 0
    out = capfd.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    for row in (
        "RAF-DB basic, test; epoch chosen on test; mean ± standard deviation (n − 1) over 3 seeds, "
        "in %",
        "accuracy UAR macro-F1",
        "best epoch 91.50 ± 1.50 86.50 ± 1.50 85.50 ± 1.50",
        "last epoch 90.50 ± 1.50 84.50 ± 1.50 83.50 ± 1.50",
        "seed 1 91.50 86.50 85.50",
        "seed 1 90.50 84.50 83.50",
        "published 91.07",
        "published by the original authors: RAF-DB accuracy 91.07 %",
    ):
        assert row in rows, row
    assert "something else" not in out


def test_two_published_numbers_are_shown_in_one_cell(here, capfd):
    recipe = RECIPE.replace("91.07 %", "91.07 or 91.79 %")
    (here / "recipe.args").write_text(recipe)
    assert start() == 0
    rows = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert "published 91.07 or 91.79" in rows


def test_summary_and_report_contain_all_seeds(here):
    assert start() == 0
    summary = json.loads((here / "out" / "summary.json").read_text())
    assert summary["seeds"] == [0, 1, 2]
    assert summary["best"]["accuracy"] == {
        "mean": 91.5, "deviation": 1.5, "values": [90.0, 91.5, 93.0]
    }  # fmt: skip
    assert summary["last"]["uar"]["mean"] == 84.5
    assert summary["published"] == "RAF-DB accuracy 91.07 %"
    assert summary["options"] == {"--model": "vit", "--epochs": "2", "--processes": "1"}
    page = (here / "out" / "report.html").read_text().replace("\xa0", " ")
    assert "<h1>out, 3 seeds</h1>" in page
    assert "84.50 ± 1.50" in page  # UAR of the last epochs
    assert "91.50 ± 1.50" in page
    assert "90.00 · 91.50 · 93.00" in page


def test_a_finished_seed_is_not_run_again_but_counted(here, capfd):
    assert start("--seeds", "0") == 0
    assert start("--seeds", "0", "1") == 0
    assert [len(calls(here / "out" / f"seed-{seed}")) for seed in (0, 1)] == [1, 1]
    assert start("--seeds", "2") == 0
    assert "best epoch   91.50 ± 1.50" in capfd.readouterr().out


@pytest.mark.parametrize("missing", ["eval.json", "status.json"])
def test_an_unfinished_seed_is_run_again(here, missing):
    assert start("--seeds", "0") == 0
    (here / "out" / "seed-0" / missing).unlink()
    assert start("--seeds", "0") == 0
    assert len(calls(here / "out" / "seed-0")) == 2


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("75", 75, "seed 1: stopped; the same command resumes from there"),
        ("2", 2, "seed 1: fake.py ended with exit code 2"),
        ("1", 1, "seed 1: fake.py ended with exit code 1"),
    ],
)
def test_a_failed_or_stopped_run_ends_the_series_with_its_exit_code(here, capfd, end, code, said):
    assert start("--end", end) == code
    assert said in capfd.readouterr().out
    assert not (here / "out" / "seed-2").exists()
    assert json.loads((here / "out" / "summary.json").read_text())["seeds"] == [0]


@pytest.mark.parametrize(("end", "code"), [("killed", 137), ("silent", 1)])
def test_a_run_without_results_is_a_failure(here, end, code):
    assert start("--seeds", "0", "--end", end) == code
    assert not (here / "out" / "summary.json").exists()


@pytest.mark.parametrize(("end", "code"), [("75", 75), ("2", 2), ("1", 1)])
def test_the_exit_code_of_the_run_is_restored_after_a_launcher(here, monkeypatch, end, code):
    def launch(command):
        at = command.index(str(reproduce.MAIN))
        assert command[1:at] == [
            "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"
        ]  # fmt: skip
        return min(1, subprocess.run([sys.executable, *command[at:]]).returncode)

    monkeypatch.setattr(reproduce, "run_command", launch)
    assert start("--seeds", "1", "--processes", "4", "--end", end) == code


@pytest.mark.parametrize("change", [["--epochs", "3"], ["--amp", "off"], ["--processes", "2"]])
def test_seeds_with_different_options_are_never_mixed(here, change):
    assert start("--seeds", "0") == 0
    with pytest.raises(reproduce.BadInput, match=rf"summary.json: .*now {' '.join(change)}; name"):
        start("--seeds", "1", *change)
    assert not (here / "out" / "seed-1").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--output_dir", "o", "--seed", "3"], "--seed: give all seeds to --seeds"),
        (["--output_dir", "o", "--seeds", "1", "1"], "--seeds 1 1: give each seed once"),
        (["--output_dir", "o", "--seeds", "x"], "--seeds: must be a whole number >= 0, not 'x'"),
        (["--seeds", "1"], "--output_dir"),
        (["--output_dir", "o", "@absent.args"], "absent.args: cannot be read as a recipe"),
        (["--output_dir", "o", "@odd.args"], "odd.args: cannot be read as a recipe"),
    ],
)
def test_bad_input_gives_one_error_line_and_exit_code_2(tmp_path, argv, said):
    (tmp_path / "odd.args").write_text('--data_path "not closed\n')
    run = subprocess.run(
        [sys.executable, SCRIPT, *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert said in run.stderr


def test_help_needs_no_heavy_imports():
    code = (
        "import runpy, sys\nsys.argv[1:] = ['--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'numpy', 'sklearn') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--processes" in run.stdout
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_stop_signals_are_left_to_the_run(here, number):
    code = (
        "import sys; from pathlib import Path; import main_reproduce as reproduce\n"
        "reproduce.MAIN = Path('fake.py'); sys.exit(reproduce.main())"
    )
    command = [sys.executable, "-c", code, "--output_dir", "out", "--end", "wait"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.stdout.readline() != "waiting\n":
            assert process.poll() is None
        time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(20) == 75
        assert "the same command resumes from there" in process.stdout.read()
    assert not (here / "out" / "seed-1").exists()


# ------------------------------------------------------------------------------------- summary


def test_mean_and_deviation_equal_numpys():
    values = (88.1, 90.4, 89.0, 91.7)
    spread = Spread(values)
    assert (spread.mean, spread.deviation) == pytest.approx(
        (np.mean(values), np.std(values, ddof=1))
    )
    assert Spread((88.125,)).deviation is None


@pytest.mark.parametrize(
    ("values", "shown"),
    [((1.0, 2.0), "+1.50 ± 0.71"), ((-1.0, -2.0), "−1.50 ± 0.71"), ((-0.001,), "+0.00")],
)
def test_differences_are_shown_with_their_sign(values, shown):
    assert Spread(values).show("+") == shown


def write_eval(folder, accuracy=80.0, **more):
    folder.mkdir(parents=True, exist_ok=True)
    result = {"accuracy": accuracy, "uar": accuracy, "macro_f1": accuracy, "n": 9, **more}
    (folder / "eval.json").write_text(json.dumps(result))
    return folder


def test_runs_are_grouped_by_folder_and_sorted_by_seed(tmp_path):
    folders = [
        write_eval(tmp_path / name)
        for name in ("a/seed-10", "single", "a/seed-9", "b/seed-1", "b/seed-x", "a")
    ]
    (tmp_path / "a" / "seed-3").mkdir()
    found = group_runs([*folders, folders[0], tmp_path / "a" / "seed-3"])
    assert [(group.seeds, len(group.results)) for group in found] == [
        ((9, 10), 2), ((), 1), ((1,), 1), ((), 1), ((), 1)
    ]  # fmt: skip
    assert found[0].folders == (folders[2], folders[0])


def test_paired_differences_are_per_seed(tmp_path):
    values = {"a": {5: 80.0, 2: 90.0}, "b": {2: 85.0, 5: 85.0}}
    folders = [
        write_eval(tmp_path / name / f"seed-{seed}", accuracy)
        for name, runs in values.items()
        for seed, accuracy in runs.items()
    ]
    groups = group_runs(folders)
    assert paired_difference(groups, "accuracy").values == (5.0, -5.0)
    assert paired_difference([*groups, groups[0]], "accuracy") is None
    assert paired_difference(groups[:1], "accuracy") is None
