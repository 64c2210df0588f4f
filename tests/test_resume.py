"""A run that is stopped or killed anywhere ends exactly like an uninterrupted one."""

import signal

import pytest
import torch

from runs import (
    assert_same_run,
    command,
    finish,
    load,
    log,
    pretrain,
    run,
    same,
    signal_at,
    small_run,
    status,
)
from util.errors import BAD_INPUT

STEPS = {1: 12, 2: 6}  # per epoch: 90 images in batches of 8, on one or two processes


@pytest.mark.parametrize(
    ("family", "processes"),
    [
        ("mae", 1),
        ("fcmae", 1),
        ("resnet", 1),
        pytest.param("mae", 2, marks=pytest.mark.long),
        pytest.param("fcmae", 2, marks=pytest.mark.long),
        pytest.param("resnet", 2, marks=pytest.mark.long),
    ],
)
def test_a_run_stopped_in_mid_epoch_resumes_bit_for_bit(family, processes, undisturbed, tmp_path):
    code, output = signal_at(command(tmp_path, family, processes=processes), "epoch 1/2  step 2/")
    assert code == (75 if processes == 1 else 1), output  # launchers turn every code into 1
    assert status(tmp_path) == "resumable"
    assert "asked to stop (SIGTERM): saved after step" in output
    stopped = load(tmp_path)
    assert stopped["epoch"] == 0
    assert 2 <= stopped["step"] < STEPS[processes]

    output = finish(command(tmp_path, family, "--num_workers 2", processes))
    assert f"at epoch 1, step {stopped['step']}" in output
    assert status(tmp_path) == "done"
    assert_same_run(tmp_path, undisturbed(family, processes))


@pytest.mark.parametrize(
    ("family", "processes"), [("mae", 1), pytest.param("fcmae", 2, marks=pytest.mark.long)]
)
def test_a_killed_run_resumes_from_its_newest_checkpoint(family, processes, undisturbed, tmp_path):
    arguments = command(tmp_path, family, "--save_steps 2", processes)
    signal_at(arguments, "epoch 1/2  step 4/", signal.SIGKILL)
    killed = load(tmp_path)
    assert (killed["epoch"], killed["step"] % 2) == (0, 0)
    run("main_pretrain", small_run(tmp_path, "--save_steps 2", family), processes)
    assert_same_run(tmp_path, undisturbed(family, processes))


def test_resume_continues_a_checkpoint_in_a_new_folder(undisturbed, tmp_path):
    source = undisturbed("mae", 1) / "checkpoint-0.pth"
    assert pretrain(tmp_path, f"--resume {source}") == 0
    assert [record["epoch"] for record in log(tmp_path)] == [1]
    a, b = load(tmp_path), load(undisturbed("mae", 1))
    assert all((a["model"][name] == b["model"][name]).all() for name in b["model"])


def test_a_run_of_an_older_release_resumes_only_with_predict_ratio_1(undisturbed, tmp_path, capfd):
    old = load(undisturbed("mae", 1), "checkpoint-0.pth")
    for part in ("run", "args"):
        assert old[part].pop("predict_ratio") == 1
    torch.save(old, tmp_path / "old.pth")
    resume = f"--resume {tmp_path / 'old.pth'}"
    assert pretrain(tmp_path / "half", f"{resume} --predict_ratio 0.5") == BAD_INPUT
    assert "other options (predict_ratio 1.0 -> 0.5)" in capfd.readouterr().err
    assert pretrain(tmp_path / "all", resume) == 0
    assert same(load(tmp_path / "all")["model"], load(undisturbed("mae", 1))["model"])
