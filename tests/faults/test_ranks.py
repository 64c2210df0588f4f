"""If one of several processes is killed, stopped or fails, the others soon end and name it."""

import os
import random
import re
import signal
import sys
from functools import partial
from threading import Thread, Timer

import pytest
import torch
from injection import at_step, errors, run_with

from runs import ROOT, assert_same_run, finish, free_port, load, run_two, small_run, status
from util import process_failures, rendezvous
from util.errors import BadInput, Fault, Lost

TIMEOUT = 5  # seconds, --dist_timeout where a test waits for it; longer than a slow start


def signal_itself(number, victim, epoch, step, rank):
    if rank == victim:
        at_step(epoch, step, lambda: os.kill(os.getpid(), number))


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        (signal.SIGKILL, 1),
        (signal.SIGKILL, 0),
        (signal.SIGSTOP, 1),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.long),
    ],
)
def test_the_other_process_ends_and_names_it(number, victim, tmp_path):
    stopped, other = number == signal.SIGSTOP, 1 - victim
    before = partial(signal_itself, number, victim, 1, 3)
    more = f"--dist_timeout {TIMEOUT if stopped else 60} --save_steps 2"
    codes, said, seconds = run_with(before, tmp_path, more, survivors=[other])
    assert codes[other] == 1, said[other]
    assert codes[victim] == (None if stopped else -signal.SIGKILL)
    assert seconds < 40

    [line] = errors(said[other])
    fate = "is stopped \\(SIGSTOP\\)" if stopped else "was killed or has ended"
    assert re.search(rf"process {victim} \(pid \d+ on \S+\) {fate}", line), line
    assert "Traceback" not in said[other]
    saved = load(tmp_path)
    if victim == 0:  # it may have been writing the checkpoint of step 2
        assert (saved["epoch"], saved["step"]) in [(0, 2), (0, 0)]
        return
    assert "newest checkpoint: epoch 1, step 3" in line
    assert (saved["epoch"], saved["step"]) == (0, 3)
    assert status(tmp_path) == "failed"


@pytest.mark.long
def test_a_run_that_has_lost_a_process_resumes_exactly(undisturbed, tmp_path):
    before = partial(signal_itself, signal.SIGKILL, 1, 0, 4)
    run_with(before, tmp_path, survivors=[0])
    assert load(tmp_path)["step"] == 4
    run_two("main_pretrain", small_run(tmp_path))
    assert_same_run(tmp_path, undisturbed("mae", 2))


def fail(error, rank):
    def act():
        raise error

    if rank == 1:
        at_step(0, 2, act)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (BadInput("--data_path: 20 files"), 2, "process 1: --data_path: 20 files; newest"),
        pytest.param(
            ValueError("this one\nonly"),
            *(1, r"process 1: ValueError: this one\nonly; newest"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_process_0_reports_why_another_process_failed(error, code, told, tmp_path):
    codes, said, _ = run_with(partial(fail, error), tmp_path)
    assert codes == [code, code]
    [line] = errors(said[0])
    assert f"{told} checkpoint: epoch 0, step 2" in line
    # A traceback is shown for defects of the program only.
    assert ("Traceback" in said[1]) == (code == 1)
    assert load(tmp_path)["step"] == 2
    assert status(tmp_path) == {1: "failed", 2: "bad_input"}[code]


MODULES = [str(ROOT), str(ROOT / "tests" / "faults"), str(ROOT / "tests" / "helpers")]
# Runs a program that is killed in the launcher's first attempt.
KILLED_ONCE = f"""
import os, runpy, signal, sys
sys.path[:0] = {MODULES!r}
from injection import at_step
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at_step(1, 3, lambda: os.kill(os.getpid(), signal.SIGNUMBER))
sys.argv[0] = {str(ROOT / "main_pretrain.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "number",
    ["KILL", pytest.param("STOP", marks=pytest.mark.long)],  # torchrun waits 30 s for it
)
def test_torchrun_restarts_the_run(number, undisturbed, tmp_path):
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE.replace("SIGNUMBER", f"SIG{number}"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--max_restarts", "1", "--master_port", str(free_port()), str(script)]
    output = finish(
        [
            *launcher,
            *small_run(tmp_path / "run", f"--dist_timeout {20 if number == 'STOP' else 60}"),
        ]
    )
    assert len(errors(output)) == 1
    assert "at epoch 1, step 3" in output
    assert status(tmp_path / "run") == "done"
    assert_same_run(tmp_path / "run", undisturbed("mae", 2))


@pytest.mark.long
def test_a_run_killed_or_stopped_at_any_time_ends_the_same(undisturbed, tmp_path):
    rng = random.Random(0)
    for k in range(20):
        victim, number = rng.randrange(2), rng.choice([signal.SIGKILL, signal.SIGSTOP])
        before = partial(signal_at_random, number, victim, rng.random())
        folder = tmp_path / str(k)
        codes, said, _ = run_with(
            before, folder, f"--dist_timeout {TIMEOUT} --save_steps 1", survivors=[1 - victim]
        )
        assert codes[1 - victim] in (0, 1), said  # 0: the victim lived until all was done
        assert all(f"process {victim} (pid" in line for line in errors(said[1 - victim])), said
        run_two("main_pretrain", small_run(folder))
        assert_same_run(folder, undisturbed("mae", 2))


def signal_at_random(number, victim, when, rank):
    """At any time in the two epochs, not only between steps."""
    if rank == victim:
        at_step(0, 0, Timer(0.05 + 2 * when, os.kill, (os.getpid(), number)).start)


def test_other_errors_are_not_blamed_on_another_process():
    assert process_failures.explain(ValueError("gloomy")) is None
    assert process_failures.explain(RuntimeError("CUDA out of memory")) is None


def test_the_cause_of_a_failure_is_reported_instead_of_its_consequences(monkeypatch):
    lost = RuntimeError("[gloo/pair.cc:5] Connection closed by peer [10.0.0.2]:7. GLHF!")
    heard = {2: (1, f"{process_failures.LOST} (Timed out)"), 3: (1, "the loss was not finite")}
    monkeypatch.setattr(process_failures, "ends", lambda: heard)

    def said():
        ended = process_failures.explain(lost)
        return type(ended), str(ended).partition("hangs ")[2] or str(ended)

    closed = "(Connection closed by peer [10.0.0.2]:7)"
    assert said() == (Fault, f"{closed}; process 3: the loss was not finite")
    del heard[3]
    assert said() == (Fault, f"{closed}; process 2: {process_failures.LOST} (Timed out)")
    heard.clear()
    assert said() == (Fault, f"{closed}; see its own message, or the launcher's")
    heard[1] = (2, "--data_path: 20 files in a row are not images")
    assert said() == (BadInput, "process 1: --data_path: 20 files in a row are not images")


def meet_all(store, world, absent=(), timeout=20):
    """Let threads rendezvous as ranks through a store; -> the name or the error of each."""
    said = [None] * world

    def one(rank):
        try:
            said[rank] = rendezvous.meet(store, rank, world, timeout)
        except Lost as error:
            said[rank] = str(error)

    threads = [Thread(target=one, args=(rank,)) for rank in range(world) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_restarted_processes_ignore_those_of_the_attempt_before(monkeypatch):
    """torchrun restarts with the store of the earlier attempt, which still holds its addresses."""
    monkeypatch.setattr(rendezvous, "met", [])
    store = torch.distributed.HashStore()
    names = [meet_all(store, 3) for _ in range(5)]
    assert all(len(set(of_one)) == 1 for of_one in names)
    assert len({of_one[0] for of_one in names}) == 5
    assert [process.pid for process in rendezvous.met] == [os.getpid()] * 3
    more = meet_all(store, 5)  # as torchrun --nnodes 1:4 may
    assert len(set(more)) == 1
    assert len(rendezvous.met) == 5


@pytest.mark.parametrize("before", [0, 1])
def test_a_process_that_never_joins_is_named(before, monkeypatch):
    monkeypatch.setattr(rendezvous, "met", [])
    store = torch.distributed.HashStore()
    for _ in range(before):  # what it left in an earlier attempt is not taken for an answer
        meet_all(store, 3)
    said = meet_all(store, 3, absent=[1], timeout=1)
    joined = "not all 3 processes joined the rendezvous within --dist_timeout 1 s"
    assert said[0].endswith(f"{joined}: no answer from rank 1")
    assert "no answer from" in said[2]
