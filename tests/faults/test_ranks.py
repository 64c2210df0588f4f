"""A process of several is killed, stopped or fails: the others end soon and say who it was."""

import os
import random
import re
import signal
import sys
from functools import partial

import pytest
from injection import at_step, errors, run_with, small_run
from runs import ROOT, assert_same_run, finish, free_port, load, run_two, status

from util import peers

TIMEOUT = 8  # seconds, --dist_timeout where it is waited for; no slow start may take as long


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run_two("main_pretrain", small_run(folder))
    return folder


def signal_itself(number, victim, epoch, step, rank):
    if rank == victim:
        at_step(epoch, step, lambda: os.kill(os.getpid(), number))


@pytest.mark.parametrize(
    ("number", "fate"),
    [(signal.SIGKILL, "was killed or has ended"), (signal.SIGSTOP, "is stopped (SIGSTOP)")],
    ids=["killed", "stopped"],
)
@pytest.mark.parametrize("victim", [1, 0])
def test_the_other_process_ends_and_names_it(number, fate, victim, undisturbed, tmp_path):
    before = partial(signal_itself, number, victim, 1, 3)
    more = f"--dist_timeout {TIMEOUT if number == signal.SIGSTOP else 60} --save_steps 2"
    other = 1 - victim
    codes, said, seconds = run_with(before, tmp_path, more, survivors=[other])
    assert codes[other] == 1, said[other]
    assert codes[victim] == (-signal.SIGKILL if number == signal.SIGKILL else None)
    assert seconds < 30

    [line] = errors(said[other])
    assert re.search(rf"process {victim} \(pid \d+ on \S+\) {re.escape(fate)}", line), line
    assert "the same command goes on" in line
    assert "Traceback" not in said[other]
    if victim == 1:
        assert status(tmp_path) == "failed"
        assert "the newest checkpoint is of epoch 1, step 3" in line
    saved = load(tmp_path)
    # Process 0 may have been writing the one of step 2 when it was killed.
    assert (saved["epoch"], saved["step"]) in ([(0, 3)] if victim == 1 else [(0, 2), (0, 0)])
    run_two("main_pretrain", small_run(tmp_path, more))
    assert_same_run(tmp_path, undisturbed)


def fail(rank):
    def act():
        raise ValueError("this one\nonly")

    if rank == 1:
        at_step(0, 2, act)


def test_the_reason_of_one_process_is_told_by_process_0(tmp_path):
    codes, said, _ = run_with(fail, tmp_path)
    assert codes == [1, 1]
    [line] = errors(said[0])
    assert "process 1: ValueError: this one only" in line
    assert "the newest checkpoint is of epoch 0, step 2" in line
    assert "Traceback" in said[1]  # a defect, not a fault: its place is worth knowing
    assert load(tmp_path)["step"] == 2


def fail_to_save(rank):
    """Process 1 is killed, and process 0 cannot save any more."""
    signal_itself(signal.SIGKILL, 1, 1, 3, rank)
    if rank == 0:
        import engine_observe

        def full(*_):
            raise OSError(28, "No space left on device")

        at_step(1, 3, lambda: setattr(engine_observe, "save_checkpoint", full))


def test_what_cannot_be_saved_any_more_is_told(undisturbed, tmp_path):
    more = "--save_steps 2"
    codes, said, _ = run_with(fail_to_save, tmp_path, more, survivors=[0])
    assert codes[0] == 1
    [line] = errors(said[0])
    assert "the newest checkpoint is of epoch 1, step 2" in line
    assert "No space left on device" in said[0]
    assert load(tmp_path)["step"] == 2


# Runs a program that is killed in the launcher's first attempt.
KILLED_ONCE = f"""
import os, runpy, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "faults")!r}, {str(ROOT / "tests")!r}]
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
def test_torchrun_brings_the_run_back_by_itself(number, undisturbed, tmp_path):
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE.replace("SIGNUMBER", f"SIG{number}"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--max_restarts", "1", "--master_port", str(free_port()), str(script)]
    output = finish([*launcher, *small_run(tmp_path / "run", f"--dist_timeout {TIMEOUT}")])
    assert len(errors(output)) == 1
    assert "at epoch 1, step 3" in output
    assert status(tmp_path / "run") == "done"
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.long
def test_wherever_processes_are_killed_or_stopped_the_run_ends_the_same(undisturbed, tmp_path):
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
        assert_same_run(folder, undisturbed)


def signal_at_random(number, victim, when, rank):
    """Anywhere in the two epochs, not only between steps."""
    if rank == victim:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
        at_step(0, 0, lambda: signal.setitimer(signal.ITIMER_REAL, 0.05 + 2 * when))


def test_errors_of_other_kinds_are_not_laid_at_another_process():
    assert peers.explain(ValueError("gloomy")) == ""
    assert peers.explain(RuntimeError("CUDA out of memory")) == ""
