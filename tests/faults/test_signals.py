"""Signals that ask to stop, to a process or its whole group; ignored ones; suspending."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from injection import at_step, run_with

import main_export
import models_saved
from datasets.packed.store_writer import Parts
from runs import ROOT, assert_same_run, load, pretrain, run_here, start_ranks, status
from util.errors import RESUMABLE


def stop_group(number, rank, count=1):
    """Lead a process group of its own, as under a terminal; all of it gets signals at step 3."""
    os.setpgid(0, 0)
    at_step(1, 3, lambda: [os.killpg(0, number) for _ in range(count)])


OTHERS = (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@pytest.mark.parametrize(
    "number", [signal.SIGHUP, *(pytest.param(n, marks=pytest.mark.long) for n in OTHERS)]
)
def test_a_signal_to_a_run_and_its_data_workers_loses_nothing(number, undisturbed, tmp_path):
    before = partial(stop_group, number, count=2)  # schedulers repeat them
    codes, [said], _ = run_with(before, tmp_path, "--num_workers 2", world=1)
    assert codes == [RESUMABLE], said
    assert status(tmp_path) == "resumable"
    assert f"asked to stop ({number.name}): saved after step 4 of epoch 1" in said
    assert "Traceback" not in said
    assert load(tmp_path)["step"] == 4
    if number == signal.SIGHUP:
        assert pretrain(tmp_path) == 0
        assert_same_run(tmp_path, undisturbed("mae", 1))


def ignore(number, rank):
    signal.signal(number, signal.SIG_IGN)
    stop_group(number, rank)


def test_a_run_under_nohup_outlives_its_terminal(tmp_path):
    codes, said, _ = run_with(partial(ignore, signal.SIGHUP), tmp_path, "--num_workers 2", world=1)
    assert codes == [0], said
    assert status(tmp_path) == "done"


def suspend(seconds, rank):
    """Stop the whole group at step 3; a process outside it lets it continue."""
    os.setpgid(0, 0)
    wake = f"sleep {seconds}; kill -CONT -{os.getpid()}"

    def stop():
        subprocess.Popen(["sh", "-c", wake], start_new_session=True)
        os.killpg(0, signal.SIGSTOP)

    at_step(1, 3, stop)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_suspended_continues(world, undisturbed, tmp_path):
    """All processes and data workers stop for longer than anything in a run takes."""
    more = "--num_workers 1 --dist_timeout 60"
    codes, said, seconds = run_with(partial(suspend, 5), tmp_path, more, world=world)
    assert codes == [0] * world, said
    assert seconds > 5
    assert_same_run(tmp_path, undisturbed("mae", world))


# Programs that write other things


def hang_up_while_packing(rank):
    """The whole group, at the twentieth image."""
    os.setpgid(0, 0)
    usual, calls = Parts.add, []

    def add(parts, image):
        calls.append(image)
        if len(calls) == 20:
            os.killpg(0, signal.SIGHUP)
        usual(parts, image)

    Parts.add = add


def test_packing_is_resumable_after_a_hang_up(tmp_path):
    options = f"--data_path synthetic:200:8 --output {tmp_path / 'store'} --num_workers 2"
    output = tmp_path / "said"
    [process] = start_ranks("main_pack", options.split(), 1, hang_up_while_packing, output)
    process.join(60)
    said = (tmp_path / "said.0").read_text()
    assert process.exitcode == RESUMABLE, said
    assert "asked to stop (SIGHUP) after 20 images; the same command resumes" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_exporting_leaves_nothing_behind(number, tmp_path, monkeypatch, capfd):
    def hang_up(*_given):
        assert len(list(tmp_path.iterdir())) == 2  # also the folder being filled
        for _ in range(2):
            os.kill(os.getpid(), number)

    checkpoint = tmp_path / "checkpoint.pth"
    checkpoint.write_bytes(b"")
    monkeypatch.setattr(models_saved, "open_saved", hang_up)
    output = str(tmp_path / "new")
    options = ["--checkpoint", str(checkpoint), "--to", "safetensors", "--output", output]
    assert run_here(main_export, options) == RESUMABLE
    assert f"asked to stop ({number.name})" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == [checkpoint]


COUNT = """
import signal, sys, time
got = []
signal.signal(signal.SIGHUP, lambda *_: got.append(1))
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
print("waiting", flush=True)
end = time.monotonic() + 20
while not got and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(len(got))
"""


def test_a_launcher_started_by_reproduce_gets_one_signal_for_all(tmp_path):
    """torchrun gives up at the second one, before its processes have saved."""
    start = f"run_command([sys.executable, '-c', {COUNT!r}, LAUNCHER])"
    code = f"import sys; from main_reproduce import LAUNCHER, run_command; sys.exit({start})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    for number in (signal.SIGHUP, signal.SIGTERM):  # as terminals and service managers do
        os.killpg(process.pid, number)
    process.stdout.close()
    assert process.wait(30) == 1
