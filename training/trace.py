"""A trace of a few steps, which shows where their time goes."""

from collections.abc import Callable
from pathlib import Path

import torch

SETTLING = 10  # untraced steps at first, in which memory is allocated and kernels are compiled


class StepTrace:
    """Writes torch's profile of some steps, to be opened in Perfetto (ui.perfetto.dev)."""

    def __init__(self, path: Path, steps: int, tell: Callable[[str], None]) -> None:
        """Trace `steps` steps, after the first ones; none if it is 0."""
        self.path, self.steps, self.tell = path, steps, tell
        self._profiler = None
        if steps:
            when = torch.profiler.schedule(wait=SETTLING - 2, warmup=2, active=steps, repeat=1)
            self._profiler = torch.profiler.profile(schedule=when, on_trace_ready=self._write)
            self._profiler.start()

    def step(self) -> None:
        """Called after each step."""
        if self._profiler:
            self._profiler.step()

    def close(self) -> None:
        """Called when the run ends; what was traced so far is written."""
        if self._profiler:
            self._profiler.stop()
            self.tell(f"warning: --profile {self.steps}: the run ended too soon to trace all steps")

    def _write(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self.path))
        self.tell(f"--profile {self.steps}: wrote {self.path}")
        self._profiler = None
