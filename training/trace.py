"""Where the time of a step goes, for users to see: a trace of a few steps."""

from collections.abc import Callable
from pathlib import Path

import torch

SETTLING = 10  # steps before the traced ones, in which memory is allocated and kernels are made


class StepTrace:
    """Writes torch's profile of some steps, to be opened in Perfetto (ui.perfetto.dev)."""

    def __init__(self, path: Path, steps: int, tell: Callable[[str], None]) -> None:
        """`steps` of them, after the first ones; with 0, nothing is traced."""
        self.path, self.steps, self.tell = path, steps, tell
        self._profiler = None
        if steps:
            when = torch.profiler.schedule(wait=SETTLING - 2, warmup=2, active=steps, repeat=1)
            self._profiler = torch.profiler.profile(schedule=when, on_trace_ready=self._write)
            self._profiler.start()

    def step(self) -> None:
        """A step is done."""
        if self._profiler:
            self._profiler.step()

    def close(self) -> None:
        """The run is over: what was traced by then is written."""
        if self._profiler:
            self._profiler.stop()
            self.tell(f"warning: --profile {self.steps}: the run ended before so many steps")

    def _write(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self.path))
        self.tell(f"--profile {self.steps}: {self.path} is written")
        self._profiler = None
