"""Explains errors caused by other processes (ranks and data workers) in one line."""

import multiprocessing
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from util.distributed import is_distributed, own_rank
from util.errors import BAD_INPUT, BadInput, Fault, Lost
from util.rendezvous import met

T = TypeVar("T")

PATIENCE = 2.0  # seconds to wait for the store, which may be gone with its process
LOST = "another process ended or hangs"
SHARED_MEMORY = "/dev/shm"
NO_SHARED_MEMORY = (
    f"shared memory ({SHARED_MEMORY}) is full or cannot be used: allow more (containers: "
    "--shm-size 8g or --ipc=host), or use --num_workers 0"
)
STATES = {"Z": "was killed or has ended", "T": "is stopped (SIGSTOP)"}

_silent = False  # whether the store has failed to answer: it is not queried again


def explain(error: Exception) -> BadInput | Fault | None:
    """Translate an error that another process caused in this one; None for other errors."""
    if isinstance(error, Lost):
        return Fault(str(error))
    # Torch's own error hides the signal that killed a worker: include its cause.
    text = f"{error}\n{error.__cause__ or ''}"
    if re.search("DataLoader (worker|timed out)|Pin memory thread", text):
        return Fault(about_worker(text))
    distributed = sys.modules.get("torch.distributed")
    of_distributed = distributed and isinstance(error, distributed.DistError)
    if of_distributed or re.search(r"\bgloo\b", text, re.IGNORECASE):
        return about_rank(text)
    return None


def about_worker(text: str) -> str:
    """Explain torch's message about a data worker, and say what to do.

    Lines about the files that workers are reading may follow it: see `datasets.reading`.
    """
    killed = re.search(r"worker \(pid (\d+)\) is killed by signal: ([\w ]+)", text)
    late = re.search(r"timed out after ([\d.]+) seconds", text)
    files = re.findall(r"^data worker (\d+) has been (reading .*) (for \d+ s)$", text, re.MULTILINE)
    if killed:
        pid, name = killed.groups()
        amid = "".join(f" while {what}" for reader, what, _ in files if reader == pid)
        advice = "if memory ran out, lower --num_workers or --batch_size"
        if name == "Bus error":
            advice = f"unless a disk has failed, {NO_SHARED_MEMORY}"
        return f"a data worker (process {pid}) was killed by a signal ({name}){amid}; {advice}"
    # The timeout may expire while torch is already reporting a worker that is gone.
    if late and "exited unexpectedly" not in text:
        said = [f"the data workers returned nothing for {float(late[1]):g} s"]
        said += [f"process {pid} has been {what} {time}" for pid, what, time in files[:3]]
        remove = "if that file hangs again, remove it; else " if files else ""
        said += [f"{remove}a disk or network hangs, or needs a longer --dist_timeout"]
        return "; ".join(said)
    if "shared memory(shm)" in text:
        return f"a data worker failed: {NO_SHARED_MEMORY}"
    code = re.search(r"exit code (\d+)", text)
    how = f" with exit code {code[1]}" if code else ""
    return f"a data worker ended{how}; --num_workers 0 shows why"


def about_rank(text: str) -> BadInput | Fault:
    """Explain a network error by what is known about the other ranks."""
    ended = ends()
    for rank, (code, reason) in ended.items():
        if code == BAD_INPUT:
            return BadInput(f"process {rank}: {reason}")
    lines = [line for line in text.splitlines() if line.strip()]
    network = re.sub(r"^\[[^]]*\] *", "", lines[0]).split(". ")[0][:160] if lines else "no answer"
    told = [f"process {rank}: {reason}" for rank, (_, reason) in ended.items()]
    causes = [line for line in told if LOST not in line]
    known = causes or missing() or told or ["see its own message, or the launcher's"]
    return Fault(f"{LOST} ({network}); {'; '.join(known)}")


def missing() -> list[str]:
    """The ranks on this machine that are gone or stopped."""
    own = met[own_rank()] if met else None
    if not own or not own.namespace:
        return []
    near = [(rank, p) for rank, p in enumerate(met) if p[:2] == own[:2]]
    found = [(rank, p, condition(p.pid)) for rank, p in near]
    return [f"process {rank} (pid {p.pid} on {p.host}) {said}" for rank, p, said in found if said]


def condition(pid: int) -> str:
    """What is wrong with a process on this machine; '' if nothing is visible."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        state = "Z"
    return STATES.get(state, "")


def kill_workers() -> None:
    """Kill this process's data workers: at exit it would wait for one that hangs or is stopped."""
    children = multiprocessing.active_children()
    if not children:
        return
    # Torch's handler would raise, even much later, when a worker that hangs on a disk finally dies.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in children:
        child.kill()
    for child in children:
        child.join(1)


def tell_end(rank: int, code: int, reason: str) -> None:
    """Record for the other ranks how this one ends, and why, in one line."""
    _ask(lambda store: store.append("ends", f"{rank}\t{code}\t{reason}\n"))


def ends() -> dict[int, tuple[int, str]]:
    """Exit codes and reasons that other ranks have recorded."""

    def read(store: Any) -> str:
        return store.get("ends").decode() if store.check(["ends"]) else ""

    lines = [line.split("\t", 2) for line in (_ask(read) or "").splitlines()]
    return {int(rank): (int(code), reason) for rank, code, reason in lines}


def may_speak() -> bool:
    """Claim to report the end of the run: True if no rank has yet, or if that is unknown."""
    return _ask(lambda store: store.add("spoken", 1)) in (1, None)


def _ask(question: Callable[[Any], T]) -> T | None:
    """Query the store through which the ranks have met; None if it does not answer."""
    global _silent
    if not is_distributed() or _silent:
        return None
    answer: list[T] = []

    def ask() -> None:
        store = sys.modules["torch.distributed"].distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=PATIENCE))
        with suppress(RuntimeError):  # the process that held it is gone
            answer.append(question(store))

    # A stopped process keeps its connections open: calls to it may ignore their timeout.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    _silent = not answer
    return answer[0] if answer else None
