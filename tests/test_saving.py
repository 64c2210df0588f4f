"""What a run tells and saves while training goes on: what is in a file, and who waits for it."""

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
from training.checkpoint_snapshot import HostCopy, tensors_of
from training.observer import RunObserver
from training.saver import Saver
from training.trace import StepTrace
from util.checkpoint import save_checkpoint
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
    """A step, which changes everything in place."""
    state.model(torch.randn(8, 3)).square().sum().backward()
    state.optimizer.step()
    state.position.step += 1


def make_saver(folder, keep=0, warn=print, stop=None):
    ask = (stop or StopRequest()).ask
    own = {"args": {"lr": [0.1]}}
    begun = Position()
    return Saver(folder, own, every=1, keep=keep, epochs=9, begun=begun, warn=warn, give_up=ask)


class Disk:
    """What saving meets: while `ready` is not set, it takes its time."""

    def __init__(self):
        self.ready, self.full = threading.Event(), False
        self.ready.set()

    def save(self, *parts):
        assert self.ready.wait(60)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_checkpoint(*parts)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(training.saver, "save_checkpoint", disk.save)
    return disk


def test_a_file_holds_the_state_at_the_call_while_training_goes_on(tmp_path, disk):
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
    assert saver.last_saved == "of epoch 0, step 1"


def test_a_save_waits_for_the_one_before(tmp_path, disk, monkeypatch):
    state, saver = make_state(), make_saver(tmp_path)
    state.position.next_epoch()
    first = copy.deepcopy(state.state_dict()["model"])
    disk.ready.clear()
    saver.save(state)
    train(state)
    state.position.next_epoch()
    wait = saver.wait
    monkeypatch.setattr(saver, "wait", lambda: (disk.ready.set(), wait()))
    saver.save(state)  # would overwrite the copy that is still being written
    saver.wait()
    assert same(load(tmp_path, "checkpoint-0.pth")["model"], first)
    assert same(load(tmp_path, "checkpoint-1.pth")["model"], state.state_dict()["model"])


def test_one_save_makes_best_last_and_numbered_one_file(tmp_path):
    state, saver = make_state(), make_saver(tmp_path)
    state.position.next_epoch()
    saver.save(state, best=True)
    saver.wait()
    names = [f"checkpoint-{name}.pth" for name in ("best", "last", "0")]
    assert len({(tmp_path / name).stat().st_ino for name in names}) == 1
    assert load(tmp_path)["epoch"] == 0


def test_failures_are_told_and_several_in_a_row_ask_to_stop(tmp_path, disk):
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
        assert saver.last_saved == f"of epoch 0, step {1 if saves < 2 else 4}"
    assert stop.signal == "3 failed saves"
    assert len(told) == 5
    for line in told:
        assert "checkpoint-last.pth: could not be written (No space left" in line
        assert "checkpoint-best.pth may be an older one" in line
    assert [line.rpartition("; ")[2] for line in told] == [
        *["training goes on"] * 4,
        "3 times in a row: stopping",
    ]
    with pytest.raises(Stopped, match="of epoch 0, step 4; the same command goes on from there"):
        saver.finish()


def test_a_run_that_could_save_nothing_at_all_is_not_resumable(tmp_path, disk):
    disk.full, saver = True, make_saver(tmp_path)
    saver.save(make_state())
    with pytest.raises(Fault, match="nothing has been saved"):
        saver.finish()


def test_the_last_save_of_a_run_cannot_fail_unnoticed(tmp_path, disk, capfd):
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


def test_a_run_that_ends_by_an_error_still_finishes_its_save(tmp_path, disk, monkeypatch):
    saver = make_saver(tmp_path)
    disk.ready.clear()
    wait = saver.wait
    monkeypatch.setattr(saver, "wait", lambda: (saver._writing and disk.ready.set(), wait()))
    with pytest.raises(KeyboardInterrupt):
        end_after_a_save(make_observer(saver), KeyboardInterrupt())
    assert load(tmp_path)["step"] == 1


def test_saved_is_told_only_when_it_is_true(tmp_path, disk):
    log = Lines()
    observer = make_observer(make_saver(tmp_path), log)
    observer.save_unfinished(make_state())
    assert load(tmp_path)["step"] == 1
    assert "saved after step 1 of epoch 0" in log.lines[0]
    disk.full = True
    observer.save_unfinished(make_state())
    assert len(log.lines) == 1


def test_the_first_step_says_how_long_it_took_to_come_to_it(tmp_path):
    log, state = Lines(), make_state()
    observer = make_observer(make_saver(tmp_path), log)
    for step in (1, 2):
        state.position.step = step
        observer.after_step(state, StepResult(0.5, 0.1, False, False, 1e-3, 0.1, 0.0))
    assert [line.startswith("first step after ") for line in log.lines] == [True, False, False]


def test_testing_after_the_last_epoch_saves_nothing(tmp_path):
    """The model may hold the best epoch's weights by then."""
    state = make_state()
    state.position.epoch, state.position.step = 9, 0
    make_observer(make_saver(tmp_path)).save_unfinished(state)
    assert list(tmp_path.iterdir()) == []


def file_of(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


def test_a_copy_makes_the_same_file_and_shares_nothing():
    w, large = torch.randn(4, 5), torch.randn(10, 10)
    checkpoint = {
        **make_state().state_dict(),
        "tied": [w, w, w.t()],
        "views": (large[2:4, ::2], large[5]),
        "odd": [torch.tensor(3), torch.empty(0), torch.ones(3, dtype=torch.bfloat16)],
        "args": {"lr": [0.1]},
    }
    taken = HostCopy().take(checkpoint)
    assert file_of(taken) == file_of(checkpoint)
    assert taken["args"]["lr"] is not checkpoint["args"]["lr"]
    addresses = {t.data_ptr() for t in tensors_of(checkpoint)} - {0}
    assert not addresses & {t.data_ptr() for t in tensors_of(taken)}


def test_a_copy_takes_the_memory_of_the_one_before_and_grows_with_its_tensors():
    def addresses(taken):
        return [t.data_ptr() for t in tensors_of(taken)]

    host, state = HostCopy(), make_state()
    first = addresses(host.take(state.state_dict()))
    train(state)
    again = host.take(state.state_dict())
    assert addresses(again) == first
    assert same(again, state.state_dict())
    wider = {**make_state(width=6).state_dict(), "model_ema": state.model.state_dict()}
    assert same(host.take(wider), wider)
    assert same(host.take(wider), wider)


# A saver's first save, in a process that trains with two threads.
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


def test_the_thread_that_saves_starts_no_threads_of_its_own(tmp_path):
    """With more than there are cores, OpenMP's no longer spin: training takes twice as long."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", THREADS, tmp_path]
    said = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert said.stdout == "1\n", said
