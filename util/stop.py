"""Requests to stop: by a signal, the run itself, or the end of the launcher. A loop reads them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from util.errors import Fault

# From users and their terminals, and from schedulers ahead of a time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
SIGNALS += (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

# Set by launchers that are the parents of all processes and, unless killed, outlive them.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK")

# Launchers wait about 30 s before they kill. If a step has not ended this long after the request,
# the state of the step before it is saved meanwhile.
PATIENCE = 8.0  # seconds

Handler = Callable[[int, FrameType | None], None]


def handle_signals(handler: Handler) -> dict[int, Any]:
    """Let `handler` handle `SIGNALS`, except ignored ones: `nohup` ignores SIGHUP.

    Returns the handlers before, by signal.
    """
    watched = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in watched}


class StopRequest:
    """Whether, and since when, this process has been asked to stop."""

    latest = ""  # reason of the latest request in this process, for code that runs programs

    def __init__(self) -> None:
        self.signal: str = ""  # the signal's name, or another reason
        self._since = 0.0
        self._told = False
        self.at_once = False  # whether the first signal raises KeyboardInterrupt, with its name
        self._launcher: int | None = None

    def install(self, at_once: bool = False) -> None:
        """Handle signals from now on; a second Ctrl-C raises KeyboardInterrupt in any case."""
        self.at_once = at_once
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None
        handle_signals(self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt
        first, name = not self.signal, signal.Signals(number).name
        self.ask(name)
        if first and self.at_once:
            raise KeyboardInterrupt(name)

    def ask(self, reason: str) -> None:
        """Request a stop; only the first request counts."""
        if not self.signal:
            self.signal, self._since = reason, time.monotonic()
            StopRequest.latest = reason

    def asked(self) -> bool:
        """Whether a stop was requested, or the launcher has ended: nobody would stop this then."""
        if self._launcher and os.getppid() != self._launcher:
            self.ask("launcher ended")
        return bool(self.signal)

    def end_if_asked(self) -> None:
        """For work that has nothing to save: raises Fault if a stop was requested."""
        if self.asked():
            raise Fault(f"asked to stop ({self.signal}); nothing was written")

    def overdue(self) -> bool:
        """True once, when the request is older than `PATIENCE`."""
        late = self.asked() and not self._told and time.monotonic() - self._since > PATIENCE
        self._told = self._told or late
        return late


@contextmanager
def defer_worker_errors() -> Iterator[None]:
    """Delay torch's exception about a killed data worker until the block has ended.

    Torch raises it from its SIGCHLD handler, wherever the main thread is at that moment.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGCHLD, lambda *given: arrived.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
    if arrived:
        handler(*arrived[-1])


def shield_worker(_worker: int = 0) -> None:
    """Let a data worker survive the signals that ask its whole process group to stop.

    The main process needs its workers until it has finished the step. A second SIGTERM does end the
    worker: it comes from the main process itself.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
