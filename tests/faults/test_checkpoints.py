"""Checkpoints: runs killed while saving, truncated files, flipped bits, weights that are NaN."""

import multiprocessing
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from injection import kill
from torch import nn

from engine_train import MAX_SKIPPED, TrainState
from runs import (
    assert_same_run,
    command,
    load,
    log,
    pretrain,
    same,
    signal_at,
    status,
    wait_for,
)
from training.gradients import Eager
from training.saver import Saver
from util.checkpoint import newest_checkpoint, numbered_checkpoints, read_checkpoint
from util.errors import BadInput
from util.rundir import BEST
from util.stop import StopRequest

# SIGKILL while saving


def make_state():
    torch.manual_seed(0)
    model = nn.Linear(300, 500)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu"))


def train(state):
    """A step that depends on the weights before it and on the position, as in a run."""
    generator = torch.Generator().manual_seed(state.position.epoch)
    for parameter in state.model.parameters():
        parameter.grad = parameter.detach() + torch.randn(parameter.shape, generator=generator)
    state.optimizer.step()
    state.position.next_epoch()


def save_on_and_on(folder, reports):
    """Resume from the newest file, then train and save forever, reporting what is saved."""
    torch.set_num_threads(1)
    state = make_state()
    if found := newest_checkpoint(folder):
        assert not found.damaged
        state.load_state_dict(found.checkpoint)
    saver = Saver(
        folder,
        {},
        every=2,
        keep=2,
        epochs=10**9,
        begun=state.position,
        warn=print,
        give_up=StopRequest().ask,
    )
    while True:
        train(state)
        saver.save(state, best=state.position.epoch % 3 == 0)
        saver.wait()
        reports.send(state.position.epoch)


def unfinished(folder):
    return list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.long)])
def test_kill_while_saving_leaves_a_whole_checkpoint_that_resumes_exactly(kills, tmp_path):
    context, rng = multiprocessing.get_context("fork"), np.random.default_rng()
    undisturbed, torn = make_state(), 0
    for k in range(kills):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=save_on_and_on, args=(tmp_path, send), daemon=True)
        process.start()
        send.close()
        reported = receive.recv()
        assert len(unfinished(tmp_path)) <= 1  # leftovers of the process before are gone
        if k % 2:
            time.sleep(rng.uniform(0, 0.05))
        else:  # soon after it has started to write
            wait_for(lambda: unfinished(tmp_path))
            time.sleep(rng.uniform(0, 0.002))
        reported = kill(process, receive, reported)
        torn += bool(unfinished(tmp_path))

        found = newest_checkpoint(tmp_path)
        assert not found.damaged
        saved = found.checkpoint["epoch"] + 1
        assert reported <= saved <= reported + 1
        while undisturbed.position.epoch < saved:
            train(undisturbed)
        assert same(found.checkpoint, undisturbed.state_dict())
        # The best file may be one save ahead of the last: then that save is repeated.
        best = read_checkpoint(tmp_path / BEST)["epoch"] + 1 if saved >= 3 else 0
        assert best % 3 == 0
        assert saved - 3 < best <= saved + 1
        for number, path in numbered_checkpoints(tmp_path):
            assert read_checkpoint(path)["epoch"] == number
    assert torn > kills / 4


# Runs a program that hangs halfway through writing its sixth checkpoint.
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


def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(undisturbed, tmp_path, capfd):
    _, *arguments = command(tmp_path, more="--save_steps 3")
    # Epoch 0 saves five times; steps continue while the sixth save hangs.
    code, _ = signal_at(
        [sys.executable, "-c", STUCK, *arguments], "epoch 1/2  step 6/", signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    assert [path.name.split(".pth")[0] for path in tmp_path.glob(".*.tmp")] == [".checkpoint-last"]
    killed = load(tmp_path)
    assert (killed["epoch"], killed["step"]) == (0, 0)
    assert pretrain(tmp_path, "--save_steps 3") == 0
    assert "at epoch 1, step 0" in capfd.readouterr().out
    assert_same_run(tmp_path, undisturbed("mae", 1))
    assert list(tmp_path.glob(".*.tmp")) == []


# Damaged files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of two epochs, the newest twice."""
    folder, state = tmp_path_factory.mktemp("saved"), make_state()
    saver = Saver(
        folder,
        {},
        every=1,
        keep=0,
        epochs=9,
        begun=state.position,
        warn=print,
        give_up=StopRequest().ask,
    )
    for _ in range(2):
        train(state)
        saver.save(state)
        saver.wait()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)  # copies the hard links as separate files
    return folder


def flip(path, at, bit=0):
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def cut(path, share):
    os.truncate(path, int(share * path.stat().st_size))


DAMAGE = {
    "cut at 0": lambda path: cut(path, 0),
    "cut at 10 %": lambda path: cut(path, 0.1),
    "cut at 50 %": lambda path: cut(path, 0.5),
    "cut at 99.9 %": lambda path: cut(path, 0.999),
    "one byte flipped": lambda path: flip(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_skipped_for_older_ones_until_none_is_left(copy, damage):
    damaged = ["checkpoint-last.pth", "checkpoint-1.pth", "checkpoint-0.pth"]
    for k, name in enumerate(damaged[:2]):
        DAMAGE[damage](copy / name)
        found = newest_checkpoint(copy)
        assert found.path == copy / damaged[k + 1]
        assert [line.split(": ")[0] for line in found.damaged] == [
            str(copy / name) for name in damaged[: k + 1]
        ]
        assert found.checkpoint["epoch"] == (1, 0)[k]
    DAMAGE[damage](copy / damaged[2])
    with pytest.raises(BadInput, match="no checkpoint in it can be read") as refusal:
        newest_checkpoint(copy)
    assert all(name in str(refusal.value) for name in damaged)


@pytest.mark.parametrize("flips", [200, pytest.param(5000, marks=pytest.mark.long)])
def test_a_flipped_bit_anywhere_is_detected_or_changes_nothing(copy, flips):
    path, rng = copy / "checkpoint-last.pth", np.random.default_rng(0)
    whole, size, found = read_checkpoint(path), path.stat().st_size, 0
    # Two thirds of them where there is structure: the pickle at the start, the index at the end.
    for _ in range(flips):
        at = rng.choice([rng.integers(2000), size - 1 - rng.integers(3000), rng.integers(size)])
        bit = rng.integers(8)
        flip(path, at, bit)
        try:
            # Some bytes mean nothing: padding, time stamps.
            assert same(read_checkpoint(path), whole), (at, bit)
        except BadInput as error:
            assert str(path) in str(error)  # noqa: PT017 – either is right
            found += 1
        flip(path, at, bit)
    assert same(read_checkpoint(path), whole)
    assert found > flips / 4


def test_a_damaged_newest_checkpoint_is_skipped_and_the_result_is_the_same(
    undisturbed, tmp_path, capfd
):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("mae", 1), folder)
    whole = (folder / "checkpoint-1.pth").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (folder / "checkpoint-last.pth").write_bytes(flipped)
    (folder / "checkpoint-1.pth").write_bytes(whole[: len(whole) // 2])
    assert pretrain(folder) == 0
    output = capfd.readouterr().out
    assert "warning: skipped " in output
    assert f"resuming from {folder}/checkpoint-0.pth" in output
    assert_same_run(folder, undisturbed("mae", 1))

    for path in folder.glob("checkpoint-*.pth"):
        path.write_bytes(whole[:1000])
    assert pretrain(folder) == 2
    assert "no checkpoint in it can be read" in capfd.readouterr().err
    assert log(folder) == log(undisturbed("mae", 1))


# Weights that are not finite


def make_nan_after(monkeypatch, steps):
    """One weight of the model becomes NaN between two steps."""
    clear, taken = Eager.clear, []

    def clear_and_spoil(self):
        clear(self)
        taken.append(1)
        if len(taken) == steps:
            trained = next(p for p in self.model.parameters() if p.requires_grad)
            trained.data.view(-1)[0] = np.nan

    monkeypatch.setattr(Eager, "clear", clear_and_spoil)


def all_finite(checkpoint):
    return all(weight.isfinite().all() for weight in checkpoint["model"].values())


def test_nan_weights_end_the_run_and_are_never_saved(tmp_path, monkeypatch, capfd):
    make_nan_after(monkeypatch, 3)
    assert pretrain(tmp_path, "--save_steps 1") == 1
    said = capfd.readouterr()
    assert "weights of epoch 0, step 3 are not finite (model " in said.out
    assert f"not finite in {MAX_SKIPPED} steps in a row" in said.err
    assert "last good checkpoint: epoch 0, step 2" in said.err
    assert status(tmp_path) == "failed"
    saved = load(tmp_path)
    assert (saved["epoch"], saved["step"]) == (-1, 2)
    assert all_finite(saved)


def test_nan_weights_after_the_last_step_are_not_saved_as_the_result(tmp_path, monkeypatch, capfd):
    make_nan_after(monkeypatch, 12)
    assert pretrain(tmp_path, "--save_steps 5 --epochs 1") == 1
    assert "last good checkpoint: epoch 0, step 10" in capfd.readouterr().err
    assert status(tmp_path) == "failed"
    assert load(tmp_path)["step"] == 10


def test_a_step_that_makes_the_weights_overflow_is_not_saved(tmp_path, capfd):
    assert pretrain(tmp_path, "--save_steps 1 --lr 1e39 --warmup_epochs 0") == 1
    assert "last good checkpoint: none yet" in capfd.readouterr().err
    assert list(tmp_path.glob("*checkpoint*")) == []
