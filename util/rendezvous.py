"""How the ranks of one launch attempt find each other, and none of an earlier attempt."""

import hashlib
import json
import os
import re
import socket
import sys
import time
from datetime import timedelta
from typing import Any, NamedTuple

from util.errors import BadInput, Fault, Lost

PAUSE = 0.02  # seconds between queries of the store


class Process(NamedTuple):
    """The process of a rank."""

    host: str
    namespace: str  # of process ids: containers on a machine may have their own; '' if not Linux
    pid: int
    began: int  # distinguishes it from an earlier process of the same id


met: list[Process] = []  # by rank, once the rendezvous is complete


class Address(NamedTuple):
    """Where process 0 holds the store through which all meet."""

    given: str  # by which option or variables, for messages
    host: str
    port: int


def from_environment(name: str, default: int | None = None) -> int:
    """A rank, size or port that a launcher has set. Raises BadInput if it is missing or wrong."""
    text = str(os.environ.get(name, "" if default is None else default))
    if not text.isdecimal():
        raise BadInput(
            f"{name} is {text!r} in the environment: must be a whole number; start several "
            "processes with torchrun, which sets it"
        )
    return int(text)


def find_address(url: str) -> Address | None:
    """The address in `--dist_url`, or in the environment; None for file://. Raises BadInput."""
    if url.startswith("file:///"):
        return None
    if url == "env://":
        host = os.environ.get("MASTER_ADDR", "")
        if not host:
            raise BadInput(
                "MASTER_ADDR is not set: start several processes with torchrun, or set it to the "
                "machine of process 0, and MASTER_PORT to a free port there"
            )
        port = from_environment("MASTER_PORT")
        address = Address(f"MASTER_ADDR={host} MASTER_PORT={port}", host, port)
    else:
        parts = re.fullmatch(r"tcp://(?:\[([^]]+)\]|([^][:/]+)):(\d+)", url)
        if not parts:
            raise BadInput(f"--dist_url {url}: must be env://, tcp://HOST:PORT or file:///PATH")
        address = Address(f"--dist_url {url}", parts[1] or parts[2], int(parts[3]))
    if not 1 <= address.port < 2**16:
        raise BadInput(f"{address.given}: a port is a number from 1 to {2**16 - 1}")
    return address


def open_store(url: str, rank: int, world: int, timeout: float) -> Any:
    """The store at `url`, which the launcher or rank 0 holds.

    Raises BadInput for an unusable address, Fault if its name stays unknown or its port is in use.
    """
    from torch.distributed.rendezvous import rendezvous

    address = find_address(url)
    of_torchrun = url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if address:
        await_name(address, timeout)
    if address and rank == 0 and not of_torchrun:
        check_port(address)
    # URLs other than env:// need the rank, which env:// accepts, too.
    store, _, _ = next(rendezvous(url, rank, world, timeout=timedelta(seconds=timeout)))
    store.set_timeout(timedelta(seconds=timeout))
    return store


def check_port(address: Address) -> None:
    """Raises Fault if this process cannot listen on the port, over IPv6 and IPv4.

    If only IPv6 is taken, torch listens on IPv4, and the others may wait for a stranger's answer.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", address.port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise Fault(
            f"{address.given}: port {address.port} cannot be used on {socket.gethostname()} "
            f"({os.strerror(error.errno)}), perhaps because of another run; set another for all "
            "processes"
        ) from None


def await_name(address: Address, timeout: float) -> None:
    """Wait until the host's name is known: that of a container may appear late. Raises Fault.

    Torch would wait as well, but print a page of warnings each time.
    """
    until, told = time.monotonic() + timeout, False
    while True:
        try:
            socket.getaddrinfo(address.host, address.port)
            return
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", error)
            problem = f"{address.given}: {address.host} is unknown here ({why})"
        if time.monotonic() > until:
            raise Fault(f"{problem}, even after --dist_timeout {timeout:g} s; correct the name")
        if not told:
            print(f"warning: {problem}; trying again", file=sys.stderr, flush=True)
            told = True
        time.sleep(1)


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
