"""Runs, in separate processes, that are made to fail at a given step, and files that hang."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import engine_train
from runs import small_run, start_ranks


def at_step(epoch, step, act):
    """Call `act()` in this process just before it does this step for the first time."""
    usual, acts = engine_train.Trainer._step, [act]

    def unusual(trainer, *rest):
        position = trainer.state.position
        if (position.epoch, position.step) == (epoch, step) and acts:
            acts.pop()()
        return usual(trainer, *rest)

    engine_train.Trainer._step = unusual


def run_with(before, folder, more="", world=2, survivors=None, within=120):
    """Run `small_run`, with `before(rank)` first in each process, until the survivors have ended.

    -> each rank's exit code (None: still running when the survivors had ended), each rank's output,
    and the seconds until the last survivor ended. Other processes are killed.
    """
    Path(folder).mkdir(exist_ok=True)
    began = time.monotonic()
    output = Path(folder) / "said"
    ranks = start_ranks("main_pretrain", small_run(folder, more), world, before, output)
    for rank in range(world) if survivors is None else survivors:
        ranks[rank].join(max(0.1, began + within - time.monotonic()))
    seconds = time.monotonic() - began
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    said = [Path(f"{output}.{rank}").read_text() for rank in range(world)]
    for rank in range(world):
        os.remove(f"{output}.{rank}")
    return codes, said, seconds


def kill(process, receive, reported):
    """Kill a process that keeps reporting; -> its last report, or `reported` if none came."""
    process.kill()
    process.join()
    while receive.poll():
        try:
            reported = receive.recv()
        except EOFError:
            break
    return reported


def errors(text):
    """The error lines in a program's output."""
    return [line for line in text.splitlines() if ": error: " in line]


LEASE = """
import fcntl, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)  # the request to give the lease up
with open(sys.argv[1], "r+") as file:
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def stuck(path):
    """Make opening a file hang (for 45 s, see proc(5), lease-break-time), as on a lost network."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", LEASE, path], text=True, **pipes) as holder:
        if holder.stdout.readline() != "held\n":
            pytest.skip("this file system has no leases")
        yield
        holder.stdin.close()
