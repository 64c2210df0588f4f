"""File systems that lack something: locks, links, odd names, exact times."""

import errno
import os
import platform
import shutil
import sys
from functools import partial

import pytest

import disks
import main_pack
from datasets import open_images
from engine_train import Trainer
from odd_images import write_faces
from refused import NUMBERS, refuse_locks
from runs import (
    assert_same_run,
    load,
    pretrain,
    run_here,
    small_run,
    start_ranks,
    status,
    stop_in_mid_epoch,
)

# Locks


def without_locks(error, _rank):
    refuse_locks(error)


def run_without_locks(error, program, options, tmp_path):
    """Run a program in a process in which locks fail with `error`; -> exit code and output."""
    if platform.machine() not in NUMBERS or sys.platform != "linux":
        pytest.skip("needs Linux on x86_64 or aarch64")
    before, output = partial(without_locks, error), tmp_path / "said"
    (process,) = start_ranks(program, options, world=1, before=before, output=output)
    process.join(120)
    return process.exitcode, (tmp_path / "said.0").read_text()


@pytest.mark.parametrize(
    "error",
    [
        errno.ENOSYS,  # Lustre without -o flock
        errno.ENOLCK,  # NFS without lockd
        errno.EOPNOTSUPP,
    ],
)
def test_without_locks_a_run_warns_once_and_trains(error, tmp_path):
    run = tmp_path / "run"
    options = small_run(run, "--epochs 1 --data_path synthetic:8")
    code, said = run_without_locks(error, "main_pretrain", options, tmp_path)
    assert code == 0, said
    what = f"warning: {run}/.lock: this file system cannot lock files ({os.strerror(error)}); start"
    assert said.count(what) == said.count("cannot lock files") == 1
    assert status(run) == "done"


def test_without_locks_a_failed_run_still_leaves_its_status(tmp_path):
    options = small_run(tmp_path / "run", "--data_path synthetic:2")
    code, said = run_without_locks(errno.ENOSYS, "main_pretrain", options, tmp_path)
    assert code == 2, said
    assert said.count("cannot lock files") == 1
    assert status(tmp_path / "run") == "bad_input"


def test_a_lock_that_fails_otherwise_stops_a_run(tmp_path):
    options = small_run(tmp_path / "run")
    code, said = run_without_locks(errno.EIO, "main_pretrain", options, tmp_path)
    assert code == 2, said
    assert f"--output_dir {tmp_path}/run: cannot be written (Input/output error)" in said


def test_without_locks_images_are_packed(tmp_path):
    write_faces(tmp_path / "faces", 3)
    options = f"--data_path {tmp_path}/faces --output {tmp_path}/store --num_workers 0"
    code, said = run_without_locks(errno.ENOLCK, "main_pack", options.split(), tmp_path)
    assert code == 0, said
    assert said.count("cannot lock files (No locks available)") == 1
    assert len(open_images(str(tmp_path / "store")).source) == 3


# USB sticks: no links, no exact times, names that differ in case only are the same


@pytest.fixture(params=["vfat", "exfat"])
def stick(request, tmp_path):
    with disks.portable_disk(tmp_path / "stick", request.param) as folder:
        (folder / "upper").touch()
        assert (folder / "UPPER").exists()
        with pytest.raises(OSError, match="a:b"):
            (folder / "a:b").touch()
        yield folder


def test_a_run_on_a_stick_stops_and_resumes_exactly(stick, undisturbed, capfd):
    """Its checkpoints are copied where they would be linked."""
    usual = stop_in_mid_epoch()
    try:
        assert pretrain(stick / "run") == 75
    finally:
        Trainer._step = usual
    assert load(stick / "run", "checkpoint-0.pth")["epoch"] == 0
    assert pretrain(stick / "run") == 0
    assert "warning" not in capfd.readouterr().out
    assert_same_run(stick / "run", undisturbed("mae", 1))
    assert (stick / "run" / "report.html").exists()


def test_images_on_a_stick_are_read_and_packed(stick, tmp_path):
    faces = write_faces(stick / "faces", 12)
    shutil.copytree(faces, tmp_path / "faces")
    here, there = open_images(str(tmp_path / "faces")).source, open_images(str(faces)).source
    assert here.digest == there.digest
    assert (here.image(3) == there.image(3)).all()
    pack = f"--data_path {faces} --output {stick}/store --num_workers 0"
    assert run_here(main_pack, pack.split()) == 0
    assert run_here(main_pack, ["--verify", f"{stick}/store"]) == 0
    more = f"--data_path {stick}/store --epochs 1 --num_workers 1"
    assert pretrain(stick / "run", more) == 0
    (faces / "good003.png").rename(faces / "GOOD003.png")
    assert open_images(str(faces)).source.digest != there.digest
