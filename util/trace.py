"""Where the time of a step goes, for users to see: a trace of a few steps."""

from pathlib import Path

import torch

SETTLING = 10  # steps before the traced ones: memory is allocated, kernels are chosen or compiled


class StepTrace:
    """Writes torch's profiler trace of some steps, to be opened in chrome://tracing or Perfetto."""

    def __init__(self, path: Path, steps: int) -> None:
        """`steps` of them, after the first ones; with 0, nothing is traced."""
        self._profiler = steps and torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=SETTLING - 2, warmup=2, active=steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        )
        if self._profiler:
            self._profiler.start()

    def step(self) -> None:
        """A step is done."""
        if self._profiler:
            self._profiler.step()
