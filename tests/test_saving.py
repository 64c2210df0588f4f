"""Saving in the background while training continues, and what a run logs meanwhile."""

import copy
import errno
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import training.saver
from engine_train import Position, StepResult, TrainState
from runs import ROOT, load, pretrain, same, status
from training.checkpoint_snapshot import CheckpointSnapshot, tensors_of
from training.observer import RunObserver
from training.run import Run, steps_between_saves
from training.saver import Saver
from training.trace import StepTrace
from util.checkpoint import save_checkpoint
from util.distributed import ProcessInfo
from util.errors import BadInput, Fault, Stopped
from util.log import Meter, NullLog
from util.stop import StopRequest


def make_state(width=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    state = TrainState(model, torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu"))
    train(state)
    return state


def train(state):
    """A step, which changes the whole state in place."""
    state.model(torch.randn(8, 3)).square().sum().backward()
    state.optimizer.step()
    state.position.step += 1


def make_saver(folder, keep=0, warn=print, stop=None):
    ask = (stop or StopRequest()).ask
    own = {"args": {"lr": [0.1]}}
    begun = Position()
    return Saver(folder, own, every=1, keep=keep, epochs=9, begun=begun, warn=warn, give_up=ask)


class Disk:
    """A disk that blocks saving while `ready` is not set, and may be full."""

    def __init__(self):
        self.ready, self.full = threading.Event(), False
        self.ready.set()

    def save(self, *parts, **options):
        assert self.ready.wait(60)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_checkpoint(*parts, **options)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(training.saver, "save_checkpoint", disk.save)
    return disk


def test_a_file_contains_the_state_at_the_call_although_training_continues(tmp_path, disk):
    state, saver = make_state(), make_saver(tmp_path)
    expected = copy.deepcopy({**state.state_dict(), **saver.extra})
    disk.ready.clear()
    saver.save(state)
    train(state)
    saver.extra["args"]["lr"].append(7)
    assert not same(state.state_dict()["model"], expected["model"])
    assert saver.last_saved == "none yet"
    disk.ready.set()
    saver.wait()
    assert same(load(tmp_path), expected)
    assert saver.last_saved == "epoch 0, step 1"


def test_a_save_waits_for_the_save_before(tmp_path, disk, monkeypatch):
    state, saver = make_state(), make_saver(tmp_path)
    state.position.next_epoch()
    first = copy.deepcopy(state.state_dict()["model"])
    disk.ready.clear()
    saver.save(state)
    train(state)
    state.position.next_epoch()
    wait = saver.wait
    monkeypatch.setattr(saver, "wait", lambda: (disk.ready.set(), wait()))
    saver.save(state)  # else it would overwrite the copy that is still being written
    saver.wait()
    assert same(load(tmp_path, "checkpoint-0.pth")["model"], first)
    assert same(load(tmp_path, "checkpoint-1.pth")["model"], state.state_dict()["model"])


def test_best_last_and_numbered_checkpoint_of_one_save_are_one_file(tmp_path):
    state, saver = make_state(), make_saver(tmp_path)
    state.position.next_epoch()
    saver.save(state, best=True)
    saver.wait()
    names = [f"checkpoint-{name}.pth" for name in ("best", "last", "0")]
    assert len({(tmp_path / name).stat().st_ino for name in names}) == 1
    assert load(tmp_path)["epoch"] == 0


def test_failed_saves_are_reported_and_several_in_a_row_stop_the_run(tmp_path, disk):
    told, stop, state = [], StopRequest(), make_state()
    saver = make_saver(tmp_path, warn=told.append, stop=stop)
    saver.save(state)
    saver.wait()
    for saves, full in enumerate([True, True, False, True, True, True]):
        assert not stop.signal
        disk.full = full
        train(state)
        saver.save(state, best=True)
        saver.wait()
        assert bool(saver.failure) == full
        assert saver.last_saved == f"epoch 0, step {1 if saves < 2 else 4}"
    assert stop.signal == "3 failed saves"
    assert len(told) == 5
    for line in told:
        assert "checkpoint-last.pth: could not be written (No space left" in line
        assert "checkpoint-best.pth may be an older one" in line
    assert [line.rpartition("; ")[2] for line in told] == [
        *["training continues"] * 4,
        "3 times in a row: stopping",
    ]
    kept = "newest checkpoint: epoch 0, step 4"
    with pytest.raises(Stopped, match=f"{kept}; the same command resumes from there"):
        saver.finish()


def test_a_run_that_could_not_save_anything_is_not_resumable(tmp_path, disk):
    disk.full, saver = True, make_saver(tmp_path)
    saver.save(make_state())
    with pytest.raises(Fault, match="nothing has been saved"):
        saver.finish()


def test_a_failed_last_save_makes_the_run_fail(tmp_path, disk, capfd):
    disk.full = True
    assert pretrain(tmp_path, "--epochs 1") == 1
    assert "could not be written (No space left on device)" in capfd.readouterr().err
    assert status(tmp_path) == "failed"


class Lines(NullLog):
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


def make_observer(saver, log=None):
    return RunObserver(
        log or Lines(),
        saver,
        meter=Meter(1),
        at_lines=lambda: None,
        device_type="cpu",
        steps=4,
        epochs=9,
        global_batch=8,
        print_freq=1,
        save_steps=0,
        trace=StepTrace(Path(), 0, print),
    )


@pytest.mark.parametrize(
    ("device", "world", "asked", "steps"),
    [
        ("cuda", 8, None, 500),
        ("cuda", 8, 0, 0),
        ("cuda", 1, None, 0),
        ("cpu", 2, None, 0),
        ("cpu", 2, 7, 7),
    ],
)
def test_several_gpus_save_more_often(device, world, asked, steps):
    run = Run(
        ProcessInfo(0, world),
        torch.device(device),
        stop=StopRequest(),
        output=Path(),
        folder=None,
        cores=1,
    )
    assert steps_between_saves(asked, run) == steps


def end_after_a_save(observer, error):
    with observer:
        observer.saver.save(make_state())
        raise error


def test_a_failed_save_does_not_hide_why_a_run_ended(tmp_path, disk):
    disk.full, log = True, Lines()
    saver = make_saver(tmp_path, warn=log.line)
    with pytest.raises(BadInput, match="the reason"):
        end_after_a_save(make_observer(saver, log), BadInput("the reason"))
    assert len(log.lines) == 1
    assert log.lines[0].startswith("warning: ")
    assert "could not be written" in log.lines[0]


def test_a_run_stopped_by_an_error_finishes_its_save(tmp_path, disk, monkeypatch):
    saver = make_saver(tmp_path)
    disk.ready.clear()
    wait = saver.wait
    monkeypatch.setattr(saver, "wait", lambda: (saver._writing and disk.ready.set(), wait()))
    with pytest.raises(KeyboardInterrupt):
        end_after_a_save(make_observer(saver), KeyboardInterrupt())
    assert load(tmp_path)["step"] == 1


def test_saved_is_logged_only_after_a_successful_save(tmp_path, disk):
    log = Lines()
    observer = make_observer(make_saver(tmp_path), log)
    observer.save_unfinished(make_state())
    assert load(tmp_path)["step"] == 1
    assert "saved after step 1 of epoch 0" in log.lines[0]
    disk.full = True
    observer.save_unfinished(make_state())
    assert len(log.lines) == 1


def test_the_time_to_the_first_step_is_logged(tmp_path):
    log, state = Lines(), make_state()
    observer = make_observer(make_saver(tmp_path), log)
    for step in (1, 2):
        state.position.step = step
        observer.after_step(state, StepResult(0.5, 0.1, False, False, 1e-3, 0.1, 0.0))
    assert [line.startswith("first step after ") for line in log.lines] == [True, False, False]


def test_testing_after_the_last_epoch_saves_nothing(tmp_path):
    """By then, the model may have the weights of the best epoch."""
    state = make_state()
    state.position.epoch, state.position.step = 9, 0
    make_observer(make_saver(tmp_path)).save_unfinished(state)
    assert list(tmp_path.iterdir()) == []


def file_of(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


def test_a_copy_gives_the_same_file_and_shares_no_memory():
    w, large = torch.randn(4, 5), torch.randn(10, 10)
    checkpoint = {
        **make_state().state_dict(),
        "tied": [w, w, w.t()],
        "views": (large[2:4, ::2], large[5]),
        "odd": [torch.tensor(3), torch.empty(0), torch.ones(3, dtype=torch.bfloat16)],
        "args": {"lr": [0.1]},
    }
    taken = CheckpointSnapshot().take(checkpoint)
    assert file_of(taken) == file_of(checkpoint)
    assert taken["args"]["lr"] is not checkpoint["args"]["lr"]
    addresses = {t.data_ptr() for t in tensors_of(checkpoint)} - {0}
    assert not addresses & {t.data_ptr() for t in tensors_of(taken)}


def test_a_copy_reuses_the_memory_of_the_last_one_and_grows_with_its_tensors():
    def addresses(taken):
        return [t.data_ptr() for t in tensors_of(taken)]

    host, state = CheckpointSnapshot(), make_state()
    first = addresses(host.take(state.state_dict()))
    train(state)
    again = host.take(state.state_dict())
    assert addresses(again) == first
    assert same(again, state.state_dict())
    wider = {**make_state(width=6).state_dict(), "model_ema": state.model.state_dict()}
    assert same(host.take(wider), wider)
    assert same(host.take(wider), wider)


# Prints how many threads a saver's first saves add to a process with two threads.
THREADS = """
import os, sys, torch
from pathlib import Path
from torch import nn
from training.saver import Saver
from engine_train import TrainState
from util.stop import StopRequest

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
model = nn.Linear(2000, 2000)
state = TrainState(model, torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu"))
model(torch.ones(64, 2000)).sum().backward()
end = StopRequest().ask
saver = Saver(
    Path(sys.argv[1]), {}, every=1, keep=0, epochs=9, begun=state.position, warn=print, give_up=end
)
before = threads()
for _ in range(2):
    state.position.next_epoch()
    saver.save(state)
    saver.wait()
print(threads() - before)
"""


def test_the_saving_thread_starts_no_other_threads(tmp_path):
    """With more threads than cores, OpenMP's stop spinning, and training takes twice as long."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", THREADS, tmp_path]
    said = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert said.stdout == "1\n", said
