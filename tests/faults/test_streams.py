"""Standard output and error that are closed at the start, or break while a program runs."""

import os
import subprocess
import sys

import pytest
from injection import run_with

from runs import ROOT, assert_same_run, launched, small_run, start_ranks, status


def shell(program, options, closed, processes=1):
    """Run a program by a shell that closes some of its standard streams."""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *launched(program, options, processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_change_how_a_program_ends(closed):
    ended = shell("main_pretrain.py", ["--modle", "x"], closed)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("main_pretrain.py: error: --modle") or "2>&-" in closed


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_without_standard_streams_is_undisturbed(processes, undisturbed, tmp_path):
    """No file of the run gets the number of a stream, and with it what libraries print."""
    ended = shell("main_pretrain.py", small_run(tmp_path), "<&- >&- 2>&-", processes)
    assert ended.returncode == 0
    assert status(tmp_path) == "done"
    assert_same_run(tmp_path, undisturbed("mae", processes))


def break_pipes(rank):
    """Let output and errors go to pipes that nobody reads any more."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        end, begin = os.pipe()
        os.dup2(begin, number)
        os.close(end)
        os.close(begin)
        setattr(sys, name, open(number, "w", buffering=1))  # noqa: SIM115 – like Python's own


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_outlives_the_reader_of_its_output(world, undisturbed, tmp_path):
    codes, _, _ = run_with(break_pipes, tmp_path, world=world)
    assert codes == [0] * world
    assert status(tmp_path) == "done"
    assert_same_run(tmp_path, undisturbed("mae", world))


def test_packing_outlives_the_reader_of_its_output(tmp_path):
    store = tmp_path / "store"
    options = f"--data_path synthetic:40:8 --output {store} --num_workers 0"
    [process] = start_ranks("main_pack", options.split(), 1, break_pipes)
    process.join(60)
    assert process.exitcode == 0
    assert (store / "manifest.json").exists()


def test_a_program_that_is_piped_into_head_succeeds():
    """Its output is longer than what the pipe and Python's buffer hold."""
    code = (
        "import sys; from util.streams import lasting_streams\n"
        "with lasting_streams():\n"
        "    for k in range(20_000): print('line', k)\n"
        "    print('error', file=sys.stderr)\n"
    )
    piped = f'exec 3>&1; {{ {sys.executable} -c "$0"; echo $? >&3; }} 2>&1 | head -n 1'
    ended = subprocess.run(["sh", "-c", piped, code], capture_output=True, text=True, cwd=ROOT)
    assert sorted(ended.stdout.split("\n")) == ["", "0", "line 0"]
    assert ended.stderr == ""
