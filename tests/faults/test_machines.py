"""Runs on several machines, and under a scheduler that preempts them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit

import main_submit
from runs import ROOT, assert_same_run, command, finish, free_port, launched, load, start, status
from util.errors import RESUMABLE, BadInput


def agents(output):
    """Two launchers, as on two machines, each with one process."""
    where = f"--rdzv_endpoint=127.0.0.1:{free_port()} --rdzv_id=faces --rdzv_backend=c10d"
    options = f"--nnodes=2 --nproc_per_node=1 --local_addr=127.0.0.1 {where}".split()
    _, *program = command(output)
    return [
        start([sys.executable, "-m", "torch.distributed.run", *options, *program]) for _ in range(2)
    ]


def test_two_machines_train_stop_and_resume_like_one(undisturbed, tmp_path):
    stopped = agents(tmp_path)
    await_text(tmp_path / "log.txt", '"epoch": 0')
    stopped[1].send_signal(signal.SIGTERM)  # whichever holds rank 0
    assert {agent.wait(120) for agent in stopped} == {1}, [a.stdout.read() for a in stopped]
    assert status(tmp_path) == "resumable"
    assert load(tmp_path)["epoch"] == 0
    going_on = agents(tmp_path)
    said = [agent.communicate(timeout=240)[0] for agent in going_on]
    assert [agent.returncode for agent in going_on] == [0, 0], said
    assert_same_run(tmp_path, undisturbed("mae", 2))


def test_a_preempted_job_is_requeued_and_resumes_bit_for_bit(undisturbed, tmp_path):
    _, *program = command(tmp_path)
    options = ["--cluster", "local", "--gpus", "2", "--hours", "0.1"]
    arguments = launched("main_submit.py", [*options, *program, "--device", "cpu"])
    submitting = start(arguments, folder=tmp_path)  # not in the folder of the programs
    told = submitting.stdout.readline()
    job = int(re.match(r"job (\d+);", told)[1])
    said = tmp_path / "jobs" / f"{job}_0_log.out"
    await_text(said, "epoch 0/2  step 1/")
    for process in Path(f"/proc/{job}/task/{job}/children").read_text().split():
        os.kill(int(process), signal.SIGUSR1)  # as SLURM does, to all processes of a job
    rest = submitting.communicate(timeout=240)[0]
    assert submitting.returncode == 0, rest
    assert re.search(r"resuming from .*\n.*at epoch [01], step \d", said.read_text())
    assert_same_run(tmp_path, undisturbed("mae", 2))


def test_a_job_with_wrong_options_is_not_queued(tmp_path):
    arguments = launched("main_submit.py", ["--cluster", "local", "main_pretrain.py"])
    output = finish([*arguments, "--output_dir", str(tmp_path), "--modle", "x"], code=2)
    assert "--modle: no such option; did you mean --model" in output
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--sbatch account main_pretrain.py", "--sbatch account: must be KEY=VALUE"),
        ("--cluster local --nodes 2 main_pretrain.py", "--nodes 2: --cluster local only uses"),
        ("--gpus 8 main_dance.py", "invalid choice: 'main_dance.py'"),
        ("--gpus 8", "required: program"),
    ],
)
def test_options_of_a_job_are_checked(options, told):
    with pytest.raises(BadInput, match=re.escape(told)):
        main_submit.check_options(main_submit.build_parser().parse(options.split()))


def test_sbatch_gets_the_options_of_the_job(tmp_path):
    """A stand-in for sbatch keeps the script it gets."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/script\necho Submitted batch job 12\n')
    for name in ("srun", "scontrol"):
        (sbatch.parent / name).write_text("#!/bin/sh\n")
    for path in sbatch.parent.iterdir():
        path.chmod(0o755)
    options = "--nodes 2 --gpus 8 --hours 24 --partition faces --sbatch account=lab"
    _, *program = command(tmp_path / "run")
    told = subprocess.run(
        launched("main_submit.py", [*options.split(), *program]),
        env={**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert told.stdout.startswith("job 12;"), told
    script = (tmp_path / "script").read_text()
    for line in (
        *("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=10", "time=1440"),
        *("partition=faces", "account=lab", "signal=USR1@300", "job-name=main_pretrain", "requeue"),
    ):
        assert f"#SBATCH --{line}\n" in script, script
    for line in ("SUBMITIT_PREEMPT_SIGNAL=USR1", f"PYTHONPATH={ROOT}"):
        assert f"export {line}" in script
    [srun] = [line for line in script.splitlines() if line.startswith("srun ")]
    assert " --cpus-per-task=10 " in srun  # srun does not take it from sbatch


@pytest.mark.parametrize(
    ("asked_by", "rank", "queued", "code"),
    [
        ("SIGUSR1", 0, True, None),
        ("SIGUSR1", 1, False, None),  # rank 0 does it for all
        ("3 failed saves", 0, False, RESUMABLE),  # the disk would still be full
        ("SIGTERM", 0, False, RESUMABLE),  # cancelled
    ],
)
def test_only_a_job_that_ran_out_of_time_is_requeued(asked_by, rank, queued, code, monkeypatch):
    class Place:
        def export(self, set_cuda_visible_devices):
            self.rank = rank

    calls, waited = [], []
    monkeypatch.setattr(submitit.helpers, "TorchDistributedEnvironment", Place)
    monkeypatch.setattr(signal, "getsignal", lambda number: lambda *call: calls.append(call))
    monkeypatch.setattr(main_submit, "run_program", lambda *parts: RESUMABLE)
    monkeypatch.setattr(main_submit.StopRequest, "latest", asked_by)
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(sys, "argv", [])
    try:
        main_submit.Training("main_pretrain.py", [])()
        ended = None
    except SystemExit as end:
        ended = end.code
    assert (bool(calls), ended) == (queued, code)
    assert waited == [main_submit.KILL_WAIT] * (asked_by == "SIGTERM")


def await_text(path, text, seconds=120):
    """Wait until a file contains `text`."""
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, path.read_text() if path.exists() else f"no {path}"
        time.sleep(0.05)
