"""A run resumes on other numbers of processes and with other options, or reports why not."""

import hashlib
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from injection import at_step, errors

import engine_pretrain
import engine_train
from runs import load, log, pretrain, small_run, start_ranks
from training.resume import StepParts, batch_change

STEPS = 12  # per epoch of `small_run`: 90 images in global batches of 8


def record(output, rank):
    """Write a line for every micro-batch: hashes of its images and masks."""
    usual = engine_pretrain.MaskedLoss.__call__

    def recording(loss, model, batch):
        images, noise = (x.flatten(1).numpy() for x in batch[:2])
        if images.any():  # black images are a pass whose result is discarded
            pairs = (i.tobytes() + n.tobytes() for i, n in zip(images, noise, strict=True))
            with open(f"{output}.{rank}", "a") as file:
                print(*(hashlib.sha1(pair).hexdigest() for pair in pairs), file=file)
        return usual(loss, model, batch)

    engine_pretrain.MaskedLoss.__call__ = recording


def record_and_stop(output, epoch, step, rank):
    record(output, rank)
    if rank == 0:
        at_step(epoch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def recorded(output, world, accum=1):
    """The hashes of each step, in the order of the global batch."""
    ranks = [Path(f"{output}.{rank}").read_text().splitlines() for rank in range(world)]
    micro = [" ".join(parts) for parts in zip(*ranks, strict=True)]
    return [" ".join(micro[k : k + accum]).split() for k in range(0, len(micro), accum)]


@pytest.fixture
def injected(monkeypatch):
    """Undo changes to this process after the test."""
    monkeypatch.setattr(engine_train.Trainer, "_step", engine_train.Trainer._step)
    monkeypatch.setattr(engine_pretrain.MaskedLoss, "__call__", engine_pretrain.MaskedLoss.__call__)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on one process, with the record of its images beside it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        usual = engine_pretrain.MaskedLoss.__call__
        patch.setattr(engine_pretrain.MaskedLoss, "__call__", usual)
        record(folder.with_name("seen"), 0)
        assert pretrain(folder) == 0
    return folder


def two(folder, more, before, codes):
    ranks = start_ranks("main_pretrain", small_run(folder, more), 2, before)
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == codes


def test_a_run_resumes_on_other_processes_with_the_same_global_batch(whole, injected, tmp_path):
    expected = recorded(whole.with_name("seen"), 1)
    assert len(expected) == 2 * STEPS

    run, parts = tmp_path / "run", []
    two(run, "--batch_size 4", partial(record_and_stop, tmp_path / "a", 0, 3), [75, 75])
    parts += recorded(tmp_path / "a", 2)
    seen = tmp_path / "seen"
    record(seen, 0)
    at_step(1, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert pretrain(run) == 75
    parts += recorded(seen, 1)
    more = "--batch_size 2 --accum_iter 2"
    two(run, more, partial(record, tmp_path / "b"), [0, 0])
    parts += recorded(tmp_path / "b", 2, accum=2)
    assert parts == expected

    for ours, theirs in zip(log(run), log(whole), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert ours["train_lr"] == theirs["train_lr"]
    ours, theirs = load(run)["model"], load(whole)["model"]
    # Not equal bit for bit, as sums have another order.
    assert not all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def half(whole, tmp_path):
    """A run that has done its first epoch."""
    shutil.copytree(whole, tmp_path / "half")
    (tmp_path / "half" / "checkpoint-0.pth").rename(tmp_path / "half" / "checkpoint-last.pth")
    (tmp_path / "half" / "checkpoint-1.pth").unlink()
    return tmp_path / "half"


def refused(folder, more, capfd):
    before = sorted((p.name, p.read_bytes()) for p in folder.glob("*.pth"))
    assert pretrain(folder, more) == 2
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    assert sorted((p.name, p.read_bytes()) for p in folder.glob("*.pth")) == before
    [line] = errors(said.err)
    return line


def test_another_global_batch_is_refused_with_the_arithmetic(half, whole, capfd):
    line = refused(half, "--batch_size 20 --accum_iter 3", capfd)
    assert "global_batch 8 -> 60" in line
    assert "--batch_size 20 × --accum_iter 3 × 1 processes = 60 images" in line
    assert "had 8 × 1 × 1 = 8 before; restore this with --batch_size 8 --accum_iter 1" in line
    line = refused(half, "--batch_size 5", capfd)
    assert "restore this with --batch_size 4 --accum_iter 2" in line
    assert pretrain(half, "--batch_size 4 --accum_iter 2") == 0
    assert log(half)[1]["train_loss"] == pytest.approx(log(whole)[1]["train_loss"], rel=1e-5)


def saved(batch_size, accum, processes):
    options = {"batch_size": batch_size, "accum_iter": accum}
    return {"run": {"global_batch": batch_size * accum * processes}, "args": options}


@pytest.mark.parametrize(
    ("before", "now", "advice"),
    [
        ((64, 8, 8), (64, 8, 4), "restore this with --batch_size 64 --accum_iter 16"),
        ((64, 1, 4), (64, 1, 8), "restore this with --batch_size 32 --accum_iter 1"),
        ((64, 1, 4), (64, 1, 3), "256 cannot be divided among 3 processes: start 2"),
        ((1, 1, 2), (1, 1, 4), "2 cannot be divided among 4 processes: start 2"),
        ((48, 1, 2), (40, 1, 1), "restore this with --batch_size 32 --accum_iter 3"),
    ],
)
def test_the_advice_keeps_the_global_batch(before, now, advice):
    assert batch_change(saved(*before), StepParts(*now)).endswith(f"; {advice}")


def test_changed_options_are_listed_and_refused_unless_overridden(half, capfd):
    more = "--mask_ratio 0.5 --weight_decay 0.1 --seed 7 --epochs 3"
    line = refused(half, more, capfd)
    for change in ("mask_ratio 0.75 -> 0.5", "weight_decay 0.05 -> 0.1", "seed 0 -> 7"):
        assert change in line
    assert "epochs" not in line
    assert "--override_resume" in line
    assert pretrain(half, f"{more} --override_resume") == 0
    said = capfd.readouterr().out
    assert "warning: continuing with changed options: mask_ratio 0.75 -> 0.5" in said
    assert "--epochs 2 -> 3" in said
    assert [record["epoch"] for record in log(half)] == [0, 1, 2]


def test_another_model_is_refused_even_with_override_resume(half, capfd):
    line = refused(half, "--model mae_vit_small_patch16 --override_resume", capfd)
    assert "model mae_vit_tiny_patch16 -> mae_vit_small_patch16" in line


def test_fewer_epochs_count_as_a_changed_option(half, capfd):
    assert "epochs 2 -> 1" in refused(half, "--epochs 1", capfd)


def test_overriding_the_global_batch_restarts_the_epoch(injected, capfd, tmp_path):
    at_step(0, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert pretrain(tmp_path) == 75
    assert load(tmp_path)["step"] == 6
    more = "--batch_size 10 --epochs 1 --override_resume"
    assert pretrain(tmp_path, more) == 0
    said = capfd.readouterr().out
    assert "global_batch 8 -> 10 (each step has" in said
    assert "at epoch 0, step 0" in said
    assert "step 9/9" in said


def test_a_finished_run_ends_at_once_and_can_be_extended(copy, capfd):
    before = load(copy)
    assert pretrain(copy) == 0
    assert load(copy)["epoch"] == before["epoch"]
    assert "step 1/" not in capfd.readouterr().out
    assert pretrain(copy, "--epochs 3") == 0
    assert "--epochs 2 -> 3, the schedule is stretched" in capfd.readouterr().out
    assert [record["epoch"] for record in log(copy)] == [0, 1, 2]
