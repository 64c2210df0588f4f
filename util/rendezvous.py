"""How ranks find each other: all those of one attempt, and nobody of an earlier one."""

import hashlib
import json
import os
import socket
import time
from typing import Any, NamedTuple

from util.errors import Lost

PAUSE = 0.02  # seconds between looks at the store


class Process(NamedTuple):
    """Where a rank runs."""

    host: str
    namespace: str  # of process ids: containers of one machine may have their own; '': not Linux
    pid: int
    began: int  # tells it from an earlier one


met: list[Process] = []  # by rank, once they have met


def this_process() -> Process:
    """The one this is called in."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return Process(socket.gethostname(), namespace, os.getpid(), time.time_ns())


def meet(store: Any, rank: int, world: int, timeout: float) -> str:
    """Wait until all ranks are there; -> a name for this meeting, equal on all of them.

    A launcher that starts all ranks again may give them the store it gave those before, which
    holds their addresses still. So rank 0 reads out who is there until everybody has answered to
    the very same list, and what is stored from then on is stored under the meeting's name.
    Raises Lost after `timeout` seconds.
    """
    own, until = json.dumps(this_process()), time.monotonic() + timeout
    store.set(f"here/{rank}", own)
    while time.monotonic() < until:
        if rank == 0:
            call_roll(store, world)
        called = look(store, "called")
        if called and own in json.loads(called)[rank : rank + 1]:  # of fewer, perhaps, before
            store.set(f"answer/{rank}", called)
        complete = look(store, "complete")
        if complete and own in json.loads(complete)[rank : rank + 1]:
            met[:] = [Process(*json.loads(process)) for process in json.loads(complete)]
            return hashlib.sha256(complete.encode()).hexdigest()[:16]
        time.sleep(PAUSE)
    called = look(store, "called")  # None: some have never been here
    if called:
        absent = [str(r) for r in range(world) if look(store, f"answer/{r}") != called]
    else:
        absent = [str(r) for r in range(world) if not look(store, f"here/{r}")]
    raise Lost(
        f"the processes did not all meet within --dist_timeout {timeout:g} s: no answer from "
        f"{', '.join(absent[:8])}{', …' if len(absent) > 8 else ''} of {world}"
    )


def call_roll(store: Any, world: int) -> None:
    """Rank 0's part: read out who is there; done when all have answered to that."""
    here = [look(store, f"here/{r}") for r in range(world)]
    if None in here:
        return
    called = json.dumps(here)
    store.set("called", called)
    if all(look(store, f"answer/{r}") == called for r in range(world)):
        store.set("complete", called)


def look(store: Any, key: str) -> str | None:
    """What is stored, without waiting for it."""
    return store.get(key).decode() if store.check([key]) else None
