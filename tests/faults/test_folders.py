"""The output folder of a run: unusable, locked, in use; repeated stop signals; torn log lines."""

import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from injection import kill

import disks
from datasets.packed.store_writer import Parts
from runs import (
    assert_same_run,
    command,
    load,
    log,
    pretrain,
    start,
    status,
    wait_for,
)
from util import checkpoint
from util.errors import BadInput
from util.files import disk_errors
from util.log import RunLog
from util.rundir import RunDir

# Folders that cannot be used


def test_a_read_only_folder_is_named(refuse, tmp_path):
    with disks.small_disk(tmp_path / "disk", "1m") as folder:
        (folder / "run").mkdir()
        disks.remount(folder, "ro")
        for output in (folder / "run", folder / "new"):
            line = refuse([], output)
            assert f"--output_dir {output}: cannot be written (Read-only file system)" in line


def test_an_output_dir_that_is_or_lies_in_a_file_is_refused(refuse, tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    for output in (path, path / "below"):
        assert f"--output_dir {output}: is a file or inside one" in refuse([], output)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("below", ["", "/below/it"])
def test_an_output_dir_that_is_or_lies_in_a_dangling_link_is_refused(below, refuse, tmp_path):
    (tmp_path / "link").symlink_to("gone")
    output, link = f"{tmp_path}/link{below}", f"{tmp_path}/link"
    told = f"{output}: {link} is a link to gone, which does not exist; create that folder, or name"
    assert f"--output_dir {told}" in refuse([], output)
    with (
        pytest.raises(BadInput, match=re.escape(f"--output {told}")),
        disk_errors(f"--output {output}", BadInput),
    ):
        Parts(Path(output), {})
    assert not (tmp_path / "gone").exists()


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(refuse, tmp_path):
    out = tmp_path / "out"
    first = start(command(out, more="--epochs 500 --save_ckpt False"))
    try:
        for line in first.stdout:
            if "step 1/" in line:
                break
        line = refuse([], out)
        assert f"process {first.pid} on" in line
        assert "is training in it" in line
        assert not (out / "status.json").exists()
    finally:
        first.kill()
        first.communicate()


def test_only_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    """Whatever process it names: the number may be in use again, or on another machine."""
    (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
    with open(tmp_path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="process 1 on elsewhere is training in it"):
            RunDir(tmp_path)
    folder = RunDir(tmp_path)
    expected = f"process {os.getpid()} on {socket.gethostname()}\n"
    assert (tmp_path / ".lock").read_text() == expected
    folder.release()


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


# Names


def assert_complete(folder, said):
    """A run wrote everything except TensorBoard's events, and said so once."""
    assert "Traceback" not in said
    assert said.count("so TensorBoard's events are left out") == 1
    names = {"config.json", "log.txt", "report.html", "status.json", "checkpoint-last.pth"}
    assert names <= {path.name for path in folder.iterdir()}
    assert list(folder.rglob("events.*")) == []
    assert any((folder / "figures").iterdir())
    assert "<svg" in (folder / "report.html").read_text()
    assert status(folder) == "done"


def test_an_output_dir_that_is_not_utf8_gets_everything_except_events(tmp_path, capfd):
    folder = tmp_path / os.fsdecode(b"not-\xff-utf8")
    for epochs in (1, 2):
        assert pretrain(folder, f"--epochs {epochs} --vis_freq 1 --data_path synthetic:8") == 0
    assert_complete(folder, capfd.readouterr().out.partition("report:")[2])
    assert [record["epoch"] for record in log(folder)] == [0, 1]


def test_an_output_dir_in_utf8_under_the_posix_locale_gets_everything_except_events(tmp_path):
    folder = tmp_path / "gesichter-für-später"
    posix = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = "--epochs 1 --vis_freq 1 --data_path synthetic:8 --num_workers 0"
    run = start(command(folder, more=options), **posix)
    said = run.communicate(timeout=240)[0]
    assert run.returncode == 0, said
    assert_complete(folder, said)


# Stop signals


def test_repeated_stop_signals_during_a_save_do_not_disturb_it(undisturbed, tmp_path, monkeypatch):
    write, asked = checkpoint.write_file_or_raise, []

    class Asking:
        """A file in whose middle SIGTERM arrives, twice."""

        def __init__(self, file):
            self.file, self.writes = file, 0

        def write(self, data):
            self.file.write(data)
            self.writes += 1
            if self.writes == 50:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)
                    asked.append(1)

        def flush(self):
            self.file.flush()

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "write_file_or_raise", lambda saved, file: write(saved, Asking(file))
        )
        assert pretrain(tmp_path, "--save_steps 5") == 75
    assert len(asked) >= 4  # in the save of step 5 and in the one that the signals cause
    assert status(tmp_path) == "resumable"
    assert list(tmp_path.glob(".*.tmp")) == []
    assert load(tmp_path)["step"] >= 6
    assert pretrain(tmp_path) == 0
    assert_same_run(tmp_path, undisturbed("mae", 1))


# log.txt


def write_lines(folder, epoch, reports):
    log = RunLog(folder, folder / "events", epoch, 0)
    while True:
        log.epoch({"epoch": epoch, "train_loss": 0.5, "filled": "x" * 3 * 10**6})
        reports.send(epoch)
        epoch += 1


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.long)])
def test_a_kill_while_a_line_is_logged_loses_only_that_line(kills, tmp_path):
    context, rng = multiprocessing.get_context("fork"), np.random.default_rng()
    file, epoch, torn = tmp_path / "log.txt", 0, 0
    for k in range(kills):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=write_lines, args=(tmp_path, epoch, send), daemon=True)
        process.start()
        send.close()
        reported = receive.recv()
        if k % 2:
            time.sleep(rng.uniform(0, 0.03))
        else:  # as soon as part of a line is written
            before = file.stat().st_size
            wait_for(lambda: file.stat().st_size != before)  # noqa: B023
        reported = kill(process, receive, reported)
        torn += not file.read_text().endswith("\n")
        epoch = reported + 1  # where a run would resume
        RunLog(tmp_path, tmp_path / "events", epoch, 0).close()
        epochs = [json.loads(line)["epoch"] for line in file.read_text().splitlines()]
        assert epochs == list(range(epoch))
        if epoch > 8:  # keeps the file small
            file.unlink()
            epoch = 0
    assert torn or kills < 100


def test_a_torn_log_line_is_removed_when_the_run_resumes(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("mae", 1), folder)
    first, second = (folder / "log.txt").read_text().splitlines(keepends=True)
    (folder / "log.txt").write_text(first + second[: len(second) // 2])
    (folder / "checkpoint-1.pth").unlink()
    os.replace(folder / "checkpoint-0.pth", folder / "checkpoint-last.pth")
    assert pretrain(folder) == 0
    assert log(folder) == log(undisturbed("mae", 1))
