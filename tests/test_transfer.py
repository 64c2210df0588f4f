"""Copies between host and device, with CUDA replaced by a record of what it is asked."""

import time
from contextlib import contextmanager

import pytest
import torch

from training import transfer
from training.transfer import Batches, on_host

GPU = torch.device("cuda", 0)


class Stream:
    """A stream that records who waits for it."""

    def __init__(self, record):
        self.record = record

    def wait_stream(self, other):
        self.record.append("wait for copies" if other is not self else "wait for itself")


@pytest.fixture
def record(monkeypatch):
    """The order of what happens; copies to the GPU are only recorded."""
    record = []
    computing, copying = Stream(record), Stream(record)

    @contextmanager
    def inside(stream):
        assert stream is copying
        yield

    def copy(batch, device):
        assert device is GPU
        if batch is not None:
            record.append(f"copy {batch[1]}")
        return batch

    class Event:
        """Its time is the length of the record when it was made."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = len(record)

        def query(self):
            return True

        def elapsed_time(self, end):
            return 1000.0 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(transfer, "copy_stream", lambda device: copying)
    monkeypatch.setattr(transfer, "to_device", copy)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, stream: record.append("keep until computed")
    )
    return record


def load(count, record):
    for k in range(count):
        record.append(f"load {k}")
        yield torch.full((2,), k), k


def test_a_batch_is_asked_for_only_after_the_one_before_was_given_to_the_gpu(record):
    for _, k in Batches(load(3, record), GPU):
        record.append(f"compute {k}")
    used = ("wait for copies", "keep until computed")
    steps = [(f"load {k}", f"copy {k}", *used, f"compute {k}") for k in range(3)]
    assert record == [what for step in steps for what in step]


def test_a_batch_fetched_ahead_is_the_next_one(record):
    batches = Batches(load(2, record), GPU)
    batches.fetch_ahead()
    batches.fetch_ahead()
    assert record == ["load 0", "copy 0"]
    assert [next(batches)[1], next(batches)[1]] == [0, 1]
    batches.fetch_ahead()
    assert next(batches, None) is None


def test_only_loading_counts_as_waiting(record):
    batches = Batches(load(3, record), GPU)
    next(batches)
    assert batches.waited() == 1  # "load 0" lies between the events, "copy 0" does not
    record += ["compute"] * 5
    batches.fetch_ahead()
    next(batches)
    next(batches)
    assert batches.waited() == 2
    assert batches.waited() == 0


def test_a_wait_that_the_gpu_has_not_reached_is_counted_later(record, monkeypatch):
    monkeypatch.setattr(torch.cuda.Event, "query", lambda event: event.time < len(record) - 3)
    batches = Batches(load(3, record), GPU)
    next(batches)
    assert batches.waited() == 0
    record += ["compute"] * 5
    assert batches.waited() == 1


def test_without_cuda_nothing_is_fetched_ahead():
    record = []
    batches = Batches(load(2, record), torch.device("cpu"))
    batches.fetch_ahead()
    assert record == []
    assert [k for _, k in batches] == [0, 1]


def test_without_cuda_the_host_waits():
    def slowly():
        time.sleep(0.05)
        yield torch.zeros(1)

    batches = Batches(slowly(), torch.device("cpu"))
    next(batches)
    assert 0.05 <= batches.waited() < 5
    assert batches.waited() == 0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_result_is_waited_for_after_the_next_one_was_launched(count, monkeypatch):
    order = []

    def copying(x):
        def wait():
            order.append(f"wait {x.item()}")
            return x

        return wait

    def results():
        for k in range(count):
            order.append(f"launch {k}")
            yield (torch.tensor(k),)

    monkeypatch.setattr(transfer, "to_host", copying)
    assert [x.item() for (x,) in on_host(results())] == list(range(count))
    launches, waits = ([f"{what} {k}" for k in range(count)] for what in ("launch", "wait"))
    pairs = zip([*launches[1:], None], waits, strict=True) if count else ()
    assert order == launches[:1] + [step for pair in pairs for step in pair if step]
