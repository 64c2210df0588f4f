"""What becomes of the processes that this one needs: other ranks and data workers, in one line."""

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

from util.distributed import met_others, own_rank
from util.errors import BAD_INPUT, BadInput, Fault, Lost
from util.rendezvous import met

T = TypeVar("T")

PATIENCE = 2.0  # seconds for the store, which may have died with its process
LOST = "another process ended or hangs"
STATES = {"Z": "was killed or has ended", "T": "is stopped (SIGSTOP)"}

_silent = False  # whether the store has not answered: it is not asked again


def explain(error: Exception) -> BadInput | Fault | None:
    """What another process did to this one, by the error it caused here; None for other errors."""
    if isinstance(error, Lost):
        return Fault(str(error))
    # Torch hides the signal that killed a worker behind a complaint of its own.
    text = f"{error}\n{error.__cause__ or ''}"
    if re.search("DataLoader (worker|timed out)|Pin memory thread", text):
        return Fault(about_worker(text))
    distributed = sys.modules.get("torch.distributed")
    of_distributed = distributed and isinstance(error, distributed.DistError)
    if of_distributed or re.search(r"\bgloo\b", text, re.IGNORECASE):
        return about_rank(text)
    return None


def about_worker(text: str) -> str:
    """What torch says of a data worker, and what to do."""
    killed = re.search(r"worker \(pid (\d+)\) is killed by signal: ([\w ]+)", text)
    late = re.search(r"timed out after ([\d.]+) seconds", text)
    if killed:
        pid, name = killed.groups()
        advice = "if memory ran out, lower --num_workers or --batch_size"
        if name == "Bus error":
            advice = "allow more shared memory (containers: --shm-size 8g), or --num_workers 0"
        return f"a data worker (process {pid}) was killed by a signal ({name}); {advice}"
    # The alarm may go off while torch already reports a worker that is gone.
    if late and "exited unexpectedly" not in text:
        return (
            f"the data workers brought nothing for {float(late[1]):g} s; a disk or network that "
            "hangs, or one that needs a longer --dist_timeout"
        )
    code = re.search(r"exit code (\d+)", text)
    how = f" with exit code {code[1]}" if code else ""
    return f"a data worker ended{how}; --num_workers 0 shows why"


def about_rank(text: str) -> BadInput | Fault:
    """What the network says of another rank, and what is known of them all."""
    ended = ends()
    for rank, (code, reason) in ended.items():
        if code == BAD_INPUT:
            return BadInput(f"process {rank}: {reason}")
    lines = [line for line in text.splitlines() if line.strip()]
    network = re.sub(r"^\[[^]]*\] *", "", lines[0]).split(". ")[0][:160] if lines else "no answer"
    told = [f"process {rank}: {reason}" for rank, (_, reason) in ended.items()]
    causes = [line for line in told if LOST not in line]
    known = causes or missing() or told or ["its own message, or the launcher's, says why"]
    return Fault(f"{LOST} ({network}); {'; '.join(known)}")


def missing() -> list[str]:
    """The ranks of this machine that are gone or stopped."""
    own = met[own_rank()] if met else None
    if not own or not own.namespace:
        return []
    near = [(rank, p) for rank, p in enumerate(met) if p[:2] == own[:2]]
    found = [(rank, p, condition(p.pid)) for rank, p in near]
    return [f"process {rank} (pid {p.pid} on {p.host}) {said}" for rank, p, said in found if said]


def condition(pid: int) -> str:
    """What is wrong with a process of this machine; '' if nothing shows."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        state = "Z"
    return STATES.get(state, "")


def kill_workers() -> None:
    """End this process's data workers: one that hangs would be waited for, one stopped for ever."""
    children = multiprocessing.active_children()
    if not children:
        return
    # Torch's handler would raise, also long after, when a worker that hangs in a disk dies at last.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in children:
        child.kill()
    for child in children:
        child.join(1)


def tell_end(rank: int, code: int, reason: str) -> None:
    """Leave for the other ranks how this one ends, and why, in one line."""
    _ask(lambda store: store.append("ends", f"{rank}\t{code}\t{reason}\n"))


def ends() -> dict[int, tuple[int, str]]:
    """Exit codes and reasons of other ranks, as far as they could tell."""

    def read(store: Any) -> str:
        return store.get("ends").decode() if store.check(["ends"]) else ""

    lines = [line.split("\t", 2) for line in (_ask(read) or "").splitlines()]
    return {int(rank): (int(code), reason) for rank, code, reason in lines}


def may_speak() -> bool:
    """Whether nobody has spoken for the run yet; true where that cannot be known."""
    return _ask(lambda store: store.add("spoken", 1)) in (1, None)


def _ask(question: Callable[[Any], T]) -> T | None:
    """The answer of the store by which the ranks have met; None if it does not answer."""
    global _silent
    if not met_others() or _silent:
        return None
    answer: list[T] = []

    def ask() -> None:
        store = sys.modules["torch.distributed"].distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=PATIENCE))
        with suppress(RuntimeError):  # it was in a process that is gone
            answer.append(question(store))

    # A stopped process keeps its connections: calls may wait for it whatever their time-out.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    _silent = not answer
    return answer[0] if answer else None
