"""Stopped or killed anywhere, a run ends exactly as an undisturbed one."""

import multiprocessing
import shutil
import signal
import sys

import pytest
from runs import assert_same_run, command, finish, load, log, signal_at, status

from util.errors import BadInput
from util.rundir import RunDir

STEPS = {1: 12, 2: 6}  # an epoch: 90 images in batches of 8, on one or two processes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Finished runs by (family, processes), made when first asked for."""
    made = {}

    def make(family, processes):
        if (family, processes) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{processes}")
            finish(command(folder, family, processes=processes))
            made[family, processes] = folder
        return made[family, processes]

    return make


@pytest.mark.parametrize(
    ("family", "processes"),
    [
        ("mae", 1),
        ("fcmae", 2),
        pytest.param("mae", 2, marks=pytest.mark.long),
        pytest.param("fcmae", 1, marks=pytest.mark.long),
    ],
)
def test_stopped_in_mid_epoch_it_goes_on_bit_for_bit(family, processes, undisturbed, tmp_path):
    code, output = signal_at(command(tmp_path, family, processes=processes), "epoch 1/2  step 2/")
    assert code == (75 if processes == 1 else 1), output  # launchers turn every code into 1
    assert status(tmp_path) == "resumable"
    assert "asked to stop: saved after step" in output
    stopped = load(tmp_path)
    assert stopped["epoch"] == 0
    assert 2 <= stopped["step"] < STEPS[processes]

    output = finish(command(tmp_path, family, "--num_workers 2", processes))
    assert f"at epoch 1, step {stopped['step']}" in output
    assert status(tmp_path) == "done"
    assert_same_run(tmp_path, undisturbed(family, processes))


@pytest.mark.parametrize(("family", "processes"), [("mae", 1), ("fcmae", 2)])
def test_killed_it_goes_on_from_its_newest_checkpoint(family, processes, undisturbed, tmp_path):
    arguments = command(tmp_path, family, "--save_steps 2", processes)
    signal_at(arguments, "epoch 1/2  step 4/", signal.SIGKILL)
    killed = load(tmp_path)
    assert (killed["epoch"], killed["step"] % 2) == (0, 0)
    finish(command(tmp_path, family, "--save_steps 2 --num_workers 0", processes))
    assert_same_run(tmp_path, undisturbed(family, processes))


# Runs a program whose sixth checkpoint never gets beyond its first half.
STUCK = """
import itertools, runpy, sys, time
from contextlib import contextmanager
import util.checkpoint

replacing, saves = util.checkpoint.replacing, itertools.count(1)

class Half:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        time.sleep(1000)

@contextmanager
def stuck(path):
    with replacing(path) as file:
        yield Half(file) if next(saves) == 6 else file

util.checkpoint.replacing = stuck
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_while_saving_it_goes_on_from_the_checkpoint_before(undisturbed, tmp_path):
    _, *arguments = command(tmp_path, more="--save_steps 3")
    # Epoch 0 saves five times; while the sixth is being written the steps go on.
    code, _ = signal_at(
        [sys.executable, "-c", STUCK, *arguments], "epoch 1/2  step 6/", signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    assert [path.name.split(".pth")[0] for path in tmp_path.glob(".*.tmp")] == [".checkpoint-last"]
    killed = load(tmp_path)
    assert (killed["epoch"], killed["step"]) == (0, 0)
    output = finish(command(tmp_path, more="--save_steps 3"))
    assert "at epoch 1, step 0" in output
    assert_same_run(tmp_path, undisturbed("mae", 1))
    assert list(tmp_path.glob(".*.tmp")) == []


def test_a_killed_runs_data_workers_do_not_keep_its_folder_locked(tmp_path):
    context = multiprocessing.get_context("fork")
    folder, running, ended = RunDir(tmp_path), context.Event(), context.Event()
    worker = context.Process(target=lambda: (running.set(), ended.wait(60)))
    worker.start()
    assert running.wait(60)
    with pytest.raises(BadInput, match="is training in it"):
        RunDir(tmp_path)
    folder.release()  # as the system does when a process is killed
    RunDir(tmp_path).release()
    ended.set()
    worker.join()


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_end_is_the_same(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("mae", 1), folder)
    whole = (folder / "checkpoint-1.pth").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (folder / "checkpoint-last.pth").write_bytes(flipped)
    (folder / "checkpoint-1.pth").write_bytes(whole[: len(whole) // 2])
    output = finish(command(folder))
    assert "passed over" in output
    assert f"going on from {folder}/checkpoint-0.pth" in output
    assert_same_run(folder, undisturbed("mae", 1))

    for path in folder.glob("checkpoint-*.pth"):
        path.write_bytes(whole[:1000])
    output = finish(command(folder), code=2)
    assert "no checkpoint in it can be read" in output
    assert log(folder) == log(undisturbed("mae", 1))


def test_resume_starts_a_new_folder_from_a_named_checkpoint(undisturbed, tmp_path):
    source = undisturbed("mae", 1) / "checkpoint-0.pth"
    finish(command(tmp_path, more=f"--resume {source}"))
    assert [record["epoch"] for record in log(tmp_path)] == [1]
    a, b = load(tmp_path), load(undisturbed("mae", 1))
    assert all((a["model"][name] == b["model"][name]).all() for name in b["model"])
