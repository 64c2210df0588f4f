"""If a data worker is killed, stopped, hangs or fails, the run ends clearly and loses nothing."""

import multiprocessing
import os
import random
import re
import signal
import sys
import time
from functools import partial
from threading import Timer

import pytest
import torch
from injection import at_step, errors, run_with, stuck
from torch.utils.data import Dataset

from datasets import build_loader, decode
from datasets.loader import ErrorsAsSamples, collate
from datasets.pretrain import PretrainDataset
from datasets.sampler import GlobalBatchSampler
from engine_train import Trainer, TrainState
from memory import exhaust, memory_limit
from odd_images import write_faces
from runs import assert_same_run, load, pretrain, status
from training.gradients import Eager
from training.observer import RunObserver
from training.precision import Precision
from util import process_failures
from util.distributed import ProcessInfo
from util.errors import BadInput, Fault, Lost
from util.log import NullLog
from util.stop import StopRequest


class Doing(Dataset):
    """Black images; the worker that reads number 20 calls `act`."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 64

    def __getitem__(self, item):
        if item[1] == 20:
            self.act()
        return torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor(item[1])


def batches_with(act, timeout=30):
    dataset = Doing(act)
    yield from build_loader(dataset, GlobalBatchSampler(64, 8), workers=2, timeout=timeout)


def send_itself(number):
    os.kill(os.getpid(), number)


def raise_a_class_of_its_own():
    class Unpicklable(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")
            self.hidden = lambda: None

    raise Unpicklable("a lock", "a socket")


def refuse():
    raise BadInput("--data_path: 8 files in a row are not images")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            partial(send_itself, signal.SIGKILL),
            r"\(process \d+\) was killed by a signal \(Killed\)",
        ),
        (partial(send_itself, signal.SIGBUS), r"\(Bus error\); .* allow more \(containers: --shm"),
        (partial(os._exit, 3), "ended with exit code 3; --num_workers 0 shows why"),
        (sys.exit, "a data worker ended"),
        (raise_a_class_of_its_own, "a data worker failed: Unpicklable: a lock and a socket"),
    ],
    ids=["killed", "bus-error", "exit", "exits-well", "unpicklable"],
)
def test_a_worker_that_ends_or_fails_is_reported_at_once_in_one_line(act, said):
    began = time.monotonic()
    with pytest.raises((RuntimeError, Lost)) as error:
        # A worker that exits normally is only noticed after the time-out.
        list(batches_with(act, timeout=2 if act is sys.exit else 60))
    assert re.search(said, str(process_failures.explain(error.value)))
    assert "\n" not in str(process_failures.explain(error.value))
    assert time.monotonic() - began < 30
    process_failures.kill_workers()


def test_a_dead_worker_is_not_reported_as_slow():
    """The time-out may occur while torch is reporting its death."""
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader timed out after 2.1 seconds")
    assert str(process_failures.explain(error)).startswith("a data worker ended")


def test_bad_input_found_by_a_worker_stays_bad_input():
    with pytest.raises(BadInput, match="8 files in a row are not images") as error:
        list(batches_with(refuse))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("act", [partial(time.sleep, 1000), partial(send_itself, signal.SIGSTOP)])
def test_a_worker_that_hangs_times_out_and_is_killed(act):
    with pytest.raises(RuntimeError) as error:
        list(batches_with(act, timeout=1))
    assert re.search(r"returned nothing for 1(\.05)? s", str(process_failures.explain(error.value)))
    began = time.monotonic()
    process_failures.kill_workers()
    assert time.monotonic() - began < 10
    assert multiprocessing.active_children() == []


def in_worker(act, epoch, index, rank=0, of_rank=0):
    """Make the data worker that reads this image call `act`."""
    usual = PretrainDataset.__getitem__

    def unusual(dataset, item):
        if tuple(item) == (epoch, index) and multiprocessing.parent_process():
            act()
        return usual(dataset, item)

    if rank == of_rank:
        PretrainDataset.__getitem__ = unusual


def place_in_order(epoch, index):
    """The step that needs an image."""
    sampler = GlobalBatchSampler(90, 8)
    sampler.start_at(epoch)
    return next(step for step, batch in enumerate(sampler) if (epoch, index) in batch)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (partial(send_itself, signal.SIGKILL), r"a data worker \(process \d+\) was killed"),
        (partial(send_itself, signal.SIGSTOP), r"the data workers returned nothing for 3\.\d+ s"),
    ],
    ids=["killed", "stopped"],
)
def test_a_run_whose_worker_dies_or_hangs_loses_nothing(act, told, undisturbed, tmp_path):
    before = partial(in_worker, act, 1, 17)
    codes, said, _ = run_with(
        before, tmp_path, "--num_workers 2 --dist_timeout 4", world=1, within=60
    )
    assert codes == [1], said
    [line] = errors(said[0])
    assert re.search(told, line), line
    assert "Traceback" not in said[0]
    assert status(tmp_path) == "failed"
    saved = load(tmp_path)
    # Batches that were being read ahead when a worker was killed are lost.
    assert 0 <= place_in_order(1, 17) - saved["step"] <= 4
    assert f"newest checkpoint: epoch 1, step {saved['step']}" in line
    assert pretrain(tmp_path) == 0
    assert_same_run(tmp_path, undisturbed("mae", 1))


def test_a_worker_beyond_a_container_s_memory_limit_is_reported(tmp_path):
    """Where the limit is reached by the run's main process, it dies as by any SIGKILL."""
    with memory_limit(2**26) as folder:
        before = partial(in_worker, partial(exhaust, folder), 1, 17)
        codes, said, _ = run_with(before, tmp_path, "--num_workers 2", world=1)
        assert codes == [1], said
    [line] = errors(said[0])
    assert re.search(r"killed by a signal \(Killed\); if memory ran out, lower --num_workers", line)
    assert "newest checkpoint: epoch" in line


def test_a_file_in_which_a_worker_hangs_is_named(tmp_path):
    folder = write_faces(tmp_path / "faces", 90, side=60)
    file = folder / "good040.png"
    with stuck(file):
        options = f"--data_path {folder} --num_workers 2 --dist_timeout 4"
        codes, said, _ = run_with(None, tmp_path / "out", options, world=1)
    assert codes == [1], said
    [line] = errors(said[0])
    assert re.search(rf"nothing for 3\.\d+ s; .*process \d+ has been reading {file} for \d", line)
    assert "if that file hangs again, remove it" in line
    assert status(tmp_path / "out") == "failed"


def test_the_file_that_a_killed_worker_was_reading_is_named(tmp_path):
    folder = write_faces(tmp_path / "faces", 90, side=60)
    file, before = str(folder / "good040.png"), partial(kill_reader, folder)
    options = f"--data_path {folder} --num_workers 2"
    codes, said, _ = run_with(before, tmp_path / "out", options, world=1)
    assert codes == [1], said
    assert re.search(rf"killed by a signal \(Killed\) while reading {file}; ", errors(said[0])[0])


def kill_reader(folder, _rank):
    """Kill the data worker that reads number 40, as a lack of memory would."""
    usual = decode._read

    def read(path):
        if path == str(folder / "good040.png"):
            send_itself(signal.SIGKILL)
        return usual(path)

    decode._read = read


def kill_amid_update(_rank, at):
    """Kill a data worker during the `at`-th optimizer step."""
    step, updates = torch.optim.AdamW.step, []

    def unusual(self, *given, **named):
        updates.append(None)
        if len(updates) == at:
            pid = multiprocessing.active_children()[0].pid
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return step(self, *given, **named)

    torch.optim.AdamW.step = unusual


def test_a_run_whose_worker_dies_during_an_update_loses_nothing(undisturbed, tmp_path):
    before = partial(kill_amid_update, at=15)  # step 3 of 12 of the second epoch
    codes, said, _ = run_with(
        before, tmp_path, "--num_workers 2 --dist_timeout 4", world=1, within=60
    )
    assert codes == [1], said
    [line] = errors(said[0])
    assert re.search(r"a data worker \(process \d+\) was killed", line), line
    assert "newest checkpoint: epoch 1, step 3" in line
    assert pretrain(tmp_path) == 0
    assert_same_run(tmp_path, undisturbed("mae", 1))


def test_process_0_reports_the_dead_worker_of_another_process(tmp_path):
    before = partial(in_worker_of_1, partial(send_itself, signal.SIGKILL))
    codes, said, _ = run_with(before, tmp_path, "--num_workers 1")
    assert codes == [1, 1]
    [line] = errors(said[0])
    assert re.search(r"process 1: a data worker \(process \d+\) was killed", line), line
    assert "newest checkpoint: epoch" in line


def in_worker_of_1(act, rank):
    for index in range(90):
        in_worker(act, 1, index, rank, of_rank=1)


class Keeper:
    """A saver that only counts."""

    folder, last_saved = "here", "epoch 0, step 0"

    def __init__(self, failure=None):
        self.saves, self.failure = 0, failure

    def save(self, state, best=False):
        if self.failure:
            raise self.failure
        self.saves += 1

    def wait(self):
        pass


def observer_with(saver):
    observer = RunObserver.__new__(RunObserver)
    observer.saver, observer.log, observer.epochs = saver, NullLog(), 2
    return observer


def trainer_of(model, accum=1):
    precision = Precision("off", torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, torch.optim.SGD(model.parameters()), scaler)
    return Trainer(
        state,
        Eager(model, lambda model, x: model(x).mean(), precision),
        lr_at=lambda epoch: 0.1,
        precision=precision,
        process=ProcessInfo(),
        stop=StopRequest(),
        accum=accum,
    )


def test_a_partly_updated_state_is_not_saved():
    """torch may raise a worker's death anywhere, even between updates of weights and position."""
    trainer = trainer_of(torch.nn.Linear(3, 1))
    state = trainer.state

    def interrupted():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    state.optimizer.step = interrupted
    keeper = Keeper()
    with pytest.raises(RuntimeError):
        trainer.run_epoch([torch.ones(2, 3)], 1, None)
    assert not trainer.is_consistent
    assert "newest checkpoint: epoch 0, step 0" in observer_with(keeper).rescue(
        state, trainer.is_consistent
    )
    assert keeper.saves == 0
    observer_with(keeper).rescue(state, True)
    assert keeper.saves == 1


def test_a_batch_stops_at_its_first_failure():
    """On a disk that hangs, each of the many images in a batch may take long."""

    class Away(Dataset):
        def __getitem__(self, item):
            asked.append(item)
            raise Lost("the disk is away")

    asked = []
    [told] = ErrorsAsSamples(Away()).__getitems__(range(64))
    assert isinstance(collate([told]), Lost)
    assert asked == [0]


def test_batch_norm_statistics_of_an_unfinished_step_are_not_saved():
    """Every forward pass updates batch norm, here before the second micro-batch fails."""

    def batches(count):
        yield from [torch.ones(2, 3)] * count
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    for layers, count, whole in ((1, 0, True), (1, 1, False), (0, 1, True)):
        model = torch.nn.Sequential(*[torch.nn.BatchNorm1d(3)] * layers, torch.nn.Linear(3, 1))
        trainer = trainer_of(model, accum=2)
        with pytest.raises(RuntimeError, match="DataLoader"):
            trainer.run_epoch(batches(count), 1, None)
        assert trainer.is_consistent == whole


def test_a_failed_last_save_does_not_hide_why_the_run_ended():
    state = TrainState(None, None, None)
    full = observer_with(Keeper(Fault("checkpoint-last.pth: could not be written")))
    assert "newest checkpoint: epoch 0, step 0" in full.rescue(state, True)
    assert "nothing was saved" in observer_with(None).rescue(state, True)


def kill_worker_after(seconds, rank):
    def kill_one():
        random.choice(multiprocessing.active_children()).kill()

    at_step(0, 1, Timer(seconds, kill_one).start)


@pytest.mark.long
def test_a_run_ends_the_same_whenever_a_worker_is_killed(undisturbed, tmp_path):
    ended = 0
    for k in range(30):
        folder = tmp_path / str(k)
        codes, said, _ = run_with(
            partial(kill_worker_after, 0.02 + 0.05 * k), folder, "--num_workers 2", world=1
        )
        assert codes[0] in (0, 1), said
        ended += codes[0]
        if codes[0]:
            assert "a data worker (process" in errors(said[0])[0], said
        assert pretrain(folder) == 0
        assert_same_run(folder, undisturbed("mae", 1))
    assert ended > 10
