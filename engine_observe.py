"""What happens between steps: log lines, checkpoints, the end of a run that is asked to stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_train import Position, StepResult, TrainState
from util.checkpoint import LAST, save_checkpoint
from util.errors import Fault, Stopped
from util.log import Meter, NullLog, duration, peak_memory


class Saver:
    """Writes a run's checkpoints: rank 0 has a folder, the others None."""

    def __init__(
        self, folder: Path | None, extra: dict[str, Any], every: int, keep: int, epochs: int
    ) -> None:
        """`extra` goes into each file; every `every` epochs one is kept by number, `keep` of them.

        The last of `epochs` is always kept.
        """
        self.folder, self.extra = folder, extra
        self.every, self.keep, self.epochs = every, keep, epochs
        self.last_saved = "none yet"

    def save(self, state: TrainState) -> None:
        """The state as it is now; at the beginning of an epoch perhaps under its number too."""
        done = state.position.epoch
        self.last_saved = f"of epoch {done}, step {state.position.step}"
        if self.folder is None:
            return
        numbered = state.position.step == 0 and (done % self.every == 0 or done == self.epochs)
        checkpoint = {**state.state_dict(), **self.extra}
        try:
            save_checkpoint(checkpoint, self.folder, done - 1 if numbered else None, self.keep)
        except OSError as error:
            raise Fault(
                f"{self.folder / LAST}: could not be written ({error.strerror}); "
                "the checkpoints before it are as they were"
            ) from None


class RunObserver:
    """The training loop's observer."""

    def __init__(
        self,
        log: NullLog,
        saver: Saver | None,
        meter: Meter,
        at_lines: Callable[[], None],
        device_type: str,
        steps: int,
        epochs: int,
        global_batch: int,
        print_freq: int,
        save_steps: int,
    ) -> None:
        """`at_lines` runs on all ranks whenever a line is due: what ranks have to exchange."""
        self.log, self.saver, self.meter, self.at_lines = log, saver, meter, at_lines
        self.device_type, self.steps, self.epochs = device_type, steps, epochs
        self.global_batch, self.print_freq, self.save_steps = global_batch, print_freq, save_steps

    @property
    def last_saved(self) -> str:
        """See engine_train.Observer."""
        return self.saver.last_saved if self.saver else "none (--save_ckpt False)"

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """See engine_train.Observer."""
        position = state.position
        self.meter.step(result.seconds, result.waited)
        self.log.progress(position.step, self.steps, f"epoch {position.epoch}")
        if result.skipped:
            self.log.line(
                f"warning: step {position.step - 1} of epoch {position.epoch} skipped: "
                "its loss or gradient was not finite"
            )
        if position.step % self.print_freq == 0 or position.step == self.steps:
            self.at_lines()
            self._tell(position, result)
        if result.stop and not self.saver:
            raise Fault("asked to stop; nothing was saved (--save_ckpt False)")
        if result.stop:
            self.saver.save(state)
            raise Stopped(self._saved(position))
        if self.saver and self.save_steps and position.step % self.save_steps == 0:
            self.saver.save(state)

    def save_unfinished(self, state: TrainState) -> None:
        """See engine_train.Observer."""
        if self.saver:
            self.saver.save(state)
            self.log.line(self._saved(state.position))

    def _tell(self, position: Position, result: StepResult) -> None:
        speed = self.meter.take(self.global_batch)
        at = position.epoch + position.step / self.steps
        self.log.line(
            f"epoch {position.epoch}/{self.epochs}  step {position.step}/{self.steps}  "
            f"loss {result.loss:.4f}  lr {result.lr:.3g}  grad {result.grad_norm:.3g}  "
            f"{speed['images_per_s']:.0f} img/s  data {speed['data_wait']:.0%}  "
            f"mem {peak_memory(self.device_type) / 2**30:.1f} GB  left {duration(speed['left'])}"
        )
        scalars = {"train_loss": result.loss, "lr": result.lr, "grad_norm": result.grad_norm}
        scalars |= {name: speed[name] for name in ("images_per_s", "data_wait")}
        self.log.scalars(scalars, at)

    @staticmethod
    def _saved(position: Position) -> str:
        return (
            f"asked to stop: saved after step {position.step} of epoch {position.epoch}; "
            "the same command goes on from there"
        )
