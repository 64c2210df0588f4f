"""Requests to stop, by a signal or by the run itself: they only set a flag that the loop reads."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from util.errors import Fault

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Launchers wait about 30 s before they kill. If a step has not ended this long after the request,
# the state of the step before it is saved meanwhile.
PATIENCE = 8.0  # seconds


class StopRequest:
    """Whether, and since when, this process has been asked to stop."""

    latest = ""  # reason of the latest request in this process, for code that runs programs

    def __init__(self) -> None:
        self.signal: str = ""  # the signal's name, or another reason
        self._since = 0.0
        self._told = False

    def install(self) -> None:
        """Handle the signals in `SIGNALS`; a second Ctrl-C interrupts at once."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)

    def ask(self, reason: str) -> None:
        """Request a stop; only the first request counts."""
        if not self.signal:
            self.signal, self._since = reason, time.monotonic()
            StopRequest.latest = reason

    def end_if_asked(self) -> None:
        """For work that has nothing to save: raises Fault if a stop was requested."""
        if self.signal:
            raise Fault(f"asked to stop ({self.signal}); nothing was written")

    def overdue(self) -> bool:
        """True once, when the request is older than `PATIENCE`."""
        late = bool(self.signal) and not self._told and time.monotonic() - self._since > PATIENCE
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
