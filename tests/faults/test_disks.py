"""Full or read-only disks: what was saved stays, and training continues."""

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys

import pytest
import torch

import disks
import main_finetune
from finetuned import results
from runs import (
    assert_same_run,
    finetune_options,
    load,
    pretrain,
    run_here,
    run_two,
    small_run,
    status,
    wait_for,
)
from util.checkpoint import save_checkpoint
from util.files import write_file
from util.log import RunLog
from util.rundir import BEST, LAST

FULL = "could not be written (No space left on device)"


@pytest.fixture
def disk(tmp_path, undisturbed):
    """A disk that has room for a checkpoint and a half."""
    size = (undisturbed("mae", 1) / LAST).stat().st_size
    with disks.small_disk(tmp_path / "disk", f"{size * 3 // 2 >> 10}k") as folder:
        yield folder


def free(folder):
    return shutil.disk_usage(folder).free


def unfinished(folder):
    return [path.name for path in folder.rglob("*.tmp")]


def when_said(monkeypatch, actions):
    """Do something when a run logs a text for the first time."""
    line = RunLog.line

    def look(self, said):
        line(self, said)
        for text in [text for text in actions if text in said]:
            actions.pop(text)()

    monkeypatch.setattr(RunLog, "line", look)


def fill(folder):
    """Fill a disk."""
    with open(folder / "filler", "wb", buffering=0) as file:
        while free(folder):
            file.write(bytes(free(folder)))


def test_training_continues_on_a_full_disk_and_logs_missing_lines_later(
    disk, undisturbed, monkeypatch, capfd
):
    disks.remount(disk, "size=900m")
    seen = []

    def look():
        seen.append((unfinished(disk), free(disk), load(disk)["step"]))

    fill_up, make_room = lambda: fill(disk), (disk / "filler").unlink
    when_said(
        monkeypatch,
        {"epoch 0/2  step 6/": fill_up, FULL: look, "epoch 1/2  step 2/": make_room},
    )
    assert pretrain(disk, "--save_steps 5 --vis_freq 1") == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    kept = "newest checkpoint: epoch 0, step 5; training continues"
    # The saves of step 10 and of epoch 0.
    assert captured.out.count(f"warning: {disk}/{LAST}: {FULL}; {kept}") == 2
    assert f"warning: {disk}/log.txt: {FULL}, will retry" in captured.out
    assert (
        "warning: the reconstruction picture could not be written: [Errno 28] No space left"
        in captured.out
    )
    assert "TensorBoard's events could not be written (No space left on device)" in captured.out
    assert seen == [([], 0, 5)]
    assert len(list(disk.glob("events.*"))) == 2
    assert_same_run(disk, undisturbed("mae", 1))
    assert status(disk) == "done"


def test_a_run_starts_even_if_tensorboard_events_cannot_be_written(tmp_path, capfd):
    with disks.small_disk(tmp_path / "disk", "64k") as folder:
        fill(folder)
        log = RunLog(tmp_path, folder / "events", 0, 0.0)
        log.scalars({"loss": 1.0}, 0.5)
        log.line("goes on")
        log.close()
    said = capfd.readouterr()
    assert "TensorBoard's events could not be written (No space left on device)" in said.out
    assert "goes on" in said.out
    assert said.err == ""


def test_standard_output_on_a_full_disk_does_not_end_a_run(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    assert pretrain(tmp_path) == 0
    assert_same_run(tmp_path, undisturbed("mae", 1))
    assert status(tmp_path) == "done"


def test_three_failed_saves_stop_a_run_that_can_resume_later(disk, undisturbed, capfd):
    assert pretrain(disk, "--save_steps 5") == 75
    said = capfd.readouterr()
    # The saves of step 10, of epoch 0, of step 5 and, because the run then stops, of step 6.
    assert [said.out.count(text) for text in (FULL, "continues\n", "in a row: stopping")] == [
        4,
        2,
        2,
    ]
    assert "newest checkpoint: epoch 0, step 5; the same command resumes" in said.err
    assert status(disk) == "resumable"
    assert (load(disk)["epoch"], load(disk)["step"]) == (-1, 5)
    assert unfinished(disk) == []
    others = 100_000  # log.txt, events, status.json
    assert shutil.disk_usage(disk).used < (disk / LAST).stat().st_size + others

    disks.remount(disk, "size=900m")
    assert pretrain(disk) == 0
    assert "at epoch 0, step 5" in capfd.readouterr().out
    assert_same_run(disk, undisturbed("mae", 1))


def test_all_processes_stop_together_when_the_disk_is_full(disk):
    run_two("main_pretrain", small_run(disk, "--save_steps 2 --batch_size 4"), code=75)
    assert status(disk) == "resumable"
    assert load(disk)["step"] == 2
    assert unfinished(disk) == []


def test_a_failed_last_save_makes_the_run_resumable(disk, undisturbed, capfd):
    assert pretrain(disk, "--save_steps 10 --epochs 1") == 75
    assert "newest checkpoint: epoch 0, step 10; the same" in capfd.readouterr().err
    assert status(disk) == "resumable"


def test_without_any_space_the_run_ends_with_one_error_line(disk, capfd):
    fill(disk)
    assert pretrain(disk) in (1, 2)
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error


def test_a_folder_that_becomes_read_only_is_handled_like_a_full_disk(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    folder.mkdir()

    def change(how):
        return subprocess.run(["chattr", how, folder], capture_output=True).returncode

    if change("+i"):
        pytest.skip("chattr cannot make a folder immutable here")
    change("-i")

    def forbid():
        wait_for((folder / LAST).exists)  # the checkpoint of step 3 is written in the background
        change("+i")

    when_said(monkeypatch, {"epoch 0/2  step 6/": forbid})
    try:
        assert pretrain(folder, "--save_steps 3") == 75
    finally:
        change("-i")
    assert "could not be written (Operation not permitted)" in capfd.readouterr().err
    assert load(folder)["step"] == 3
    assert pretrain(folder) == 0


def test_a_failed_copy_to_a_numbered_checkpoint_leaves_no_partial_file(tmp_path, monkeypatch):
    def no_links(*names):
        raise PermissionError("as on FAT")

    monkeypatch.setattr("os.link", no_links)
    with disks.small_disk(tmp_path / "disk", "3m") as disk:
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint({"model": {"w": torch.ones(500_000)}}, disk, 0)
        assert [path.name for path in disk.iterdir()] == [LAST]
        assert free(disk) > 900_000


# What file systems say that have no hard links, and a file that already has too many.
NO_LINKS = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV]


def refuse(function, number, applies=lambda *names: True):
    """A function of os that fails with an error number whenever that `applies`."""

    def refusing(*names):
        if applies(*names):
            raise OSError(number, os.strerror(number))
        return function(*names)

    return refusing


@pytest.mark.parametrize("number", NO_LINKS, ids=errno.errorcode.get)
def test_checkpoints_are_copied_where_links_are_refused(tmp_path, number, monkeypatch):
    monkeypatch.setattr(os, "link", refuse(os.link, number))
    save_checkpoint({"model": {"w": torch.ones(5)}}, tmp_path, 3, best=True)
    names = [LAST, "checkpoint-3.pth", BEST]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert len({(tmp_path / name).stat().st_ino for name in names}) == 3
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1


def of_folder(handle):
    return stat.S_ISDIR(os.fstat(handle).st_mode)


def test_a_disk_without_links_that_cannot_flush_folders_is_good_enough(
    tmp_path, undisturbed, monkeypatch, capfd
):
    monkeypatch.setattr(os, "link", refuse(os.link, errno.EPERM))
    monkeypatch.setattr(os, "fsync", refuse(os.fsync, errno.EINVAL, of_folder))
    assert pretrain(tmp_path) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "warning" not in said.out
    assert_same_run(tmp_path, undisturbed("mae", 1))
    assert unfinished(tmp_path) == []


def test_other_errors_of_flushing_a_folder_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(os.fsync, errno.EIO, of_folder))
    with pytest.raises(OSError, match="Input/output error"):
        write_file(tmp_path / "file", "x")


def test_a_lost_best_checkpoint_is_reported(sets, finetune, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(finetune(), folder)
    saved = load(finetune())
    torch.save(saved | {"best": 99.9, "best_epoch": 1}, folder / LAST)
    torch.save(load(finetune(), "checkpoint-0.pth"), folder / BEST)
    more = f"--data_path {sets / 'rafdb'} --epochs 3 --finetune {saved['run']['finetune']}"
    assert run_here(main_finetune, finetune_options(folder, "vit", more)) == 0
    assert "warning: epoch 1 was better; its weights are not here" in capfd.readouterr().out
    assert results(folder)["epoch"] == 0


def test_a_write_error_is_raised_and_leaves_no_file(tmp_path):
    checkpoint, limits = {"model": torch.ones(10**6)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(checkpoint, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
