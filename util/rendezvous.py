"""How the ranks of one launch attempt find each other, and none of an earlier attempt."""

import hashlib
import json
import os
import socket
import time
from typing import Any, NamedTuple

from util.errors import Lost

PAUSE = 0.02  # seconds between queries of the store


class Process(NamedTuple):
    """The process of a rank."""

    host: str
    namespace: str  # of process ids: containers on a machine may have their own; '' if not Linux
    pid: int
    began: int  # distinguishes it from an earlier process of the same id


met: list[Process] = []  # by rank, once the rendezvous is complete


def this_process() -> Process:
    """The calling process."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return Process(socket.gethostname(), namespace, os.getpid(), time.time_ns())


def meet(store: Any, rank: int, world: int, timeout: float) -> str:
    """Wait until all ranks have joined; -> a name for this rendezvous, the same on all of them.

    A launcher that restarts all ranks may reuse the store of the previous attempt, which still
    holds its addresses. So rank 0 publishes the list of ranks present until all have confirmed that
    very list, and everything stored from then on is stored under the name of the rendezvous. Raises
    Lost after `timeout` seconds.
    """
    own, until = json.dumps(this_process()), time.monotonic() + timeout
    store.set(f"here/{rank}", own)
    while time.monotonic() < until:
        if rank == 0:
            call_roll(store, world)
        called = peek(store, "called")
        if called and own in json.loads(called)[rank : rank + 1]:  # an older one may be shorter
            store.set(f"answer/{rank}", called)
        complete = peek(store, "complete")
        if complete and own in json.loads(complete)[rank : rank + 1]:
            met[:] = [Process(*json.loads(process)) for process in json.loads(complete)]
            return hashlib.sha256(complete.encode()).hexdigest()[:16]
        time.sleep(PAUSE)
    called = peek(store, "called")  # None: some ranks never registered
    if called:
        absent = [str(r) for r in range(world) if peek(store, f"answer/{r}") != called]
    else:
        absent = [str(r) for r in range(world) if not peek(store, f"here/{r}")]
    raise Lost(
        f"not all {world} processes joined the rendezvous within --dist_timeout {timeout:g} s: "
        f"no answer from rank {', '.join(absent[:8])}{', …' if len(absent) > 8 else ''}"
    )


def call_roll(store: Any, world: int) -> None:
    """Rank 0's part: publish the list of ranks present; complete once all have confirmed it."""
    here = [peek(store, f"here/{r}") for r in range(world)]
    if None in here:
        return
    called = json.dumps(here)
    store.set("called", called)
    if all(peek(store, f"answer/{r}") == called for r in range(world)):
        store.set("complete", called)


def peek(store: Any, key: str) -> str | None:
    """The stored value, without waiting for it; None if there is none."""
    return store.get(key).decode() if store.check([key]) else None
