"""What happens between steps and epochs: log lines, checkpoints, stopping on request."""

import time
from collections.abc import Callable

from engine_train import Position, StepResult, Trainer, TrainState
from training.saver import Saver
from training.trace import StepTrace
from util.distributed import on_main
from util.errors import Fault, Stopped
from util.log import Meter, NullLog, duration, peak_memory
from util.program import BEGAN
from util.stop import StopRequest


class RunObserver:
    """The training loop's observer; after its `with` block, everything saved is on disk."""

    def __init__(
        self,
        log: NullLog,
        saver: Saver | None,
        *,
        meter: Meter,
        at_lines: Callable[[], None],
        device_type: str,
        steps: int,
        epochs: int,
        global_batch: int,
        print_freq: int,
        save_steps: int,
        trace: StepTrace,
    ) -> None:
        """`at_lines` runs on all ranks whenever a log line is due, for what they exchange."""
        self.log, self.saver, self.meter, self.at_lines = log, saver, meter, at_lines
        self.device_type, self.steps, self.epochs = device_type, steps, epochs
        self.global_batch, self.print_freq, self.save_steps = global_batch, print_freq, save_steps
        self.trace = trace
        self._begun = False

    def __enter__(self) -> "RunObserver":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Wait for the last save.

        If it fails, raises as Saver.finish does, on all ranks; after another error, only warns.
        """
        try:
            self.trace.close()
            if self.saver and error is None:
                on_main(self.saver.finish)
            elif self.saver:
                self.saver.wait()
        except Exception as failure:
            if error is None:
                raise
            self.log.line(f"warning: {failure}")

    @property
    def last_saved(self) -> str:
        """See engine_train.Observer."""
        return self.saver.last_saved if self.saver else "none (--save_ckpt False)"

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """See engine_train.Observer."""
        position = state.position
        self.trace.step()
        self.meter.step(result.seconds, result.waited)
        if not self._begun:
            self._begun = True
            self.log.line(f"first step after {time.monotonic() - BEGAN:.1f} s")
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
            # All wait for rank 0: launchers kill it soon after another rank has ended.
            raise Stopped(on_main(lambda: self._save_and_end(state)))
        if self.saver and self.save_steps and position.step % self.save_steps == 0:
            self._save(state)

    def _save(self, state: TrainState, best: bool = False) -> None:
        self.log.catch_up()
        self.saver.save(state, best)

    def _save_and_end(self, state: TrainState) -> str:
        """Save a run that was asked to stop; -> its last message. Raises as Saver.finish does."""
        self._save(state)
        self.saver.finish()
        return self._saved(state.position)

    def save_unfinished(self, state: TrainState) -> None:
        """See engine_train.Observer; when all epochs are done, the run is saved already."""
        if self.saver and state.position.epoch < self.epochs:
            self._save(state)
            self.saver.wait()
            if not self.saver.failure:
                self.log.line(self._saved(state.position))

    def rescue(self, state: TrainState, is_consistent: bool) -> str:
        """Save the progress of a run that is stopped by an error; -> what is kept, in words.

        `is_consistent`: the state matches its position. If not, only earlier checkpoints are kept.
        """
        if not self.saver:
            return "nothing was saved (--save_ckpt False)"
        try:
            if is_consistent and state.position.epoch < self.epochs:
                self._save(state)
            self.saver.wait()
        except Exception as failure:
            self.log.line(f"warning: {failure}")
        if not self.saver.folder:  # not on rank 0, which reports
            return ""
        return f"newest checkpoint: {self.last_saved}; the same command resumes from there"

    def finish_epoch(self, trainer: Trainer, measure: Callable[[int], dict[str, float]]) -> None:
        """Measure, log the epoch, advance, save: in this order, so that no log line is lost.

        A run killed before the save repeats the epoch and writes its line again.
        """
        state, steps = trainer.state, self.steps
        epoch, sums = state.position.epoch, state.position.sums
        measured = measure(epoch)
        self.log.epoch(
            {
                "epoch": epoch,
                "train_loss": sums.loss / sums.steps if sums.steps else None,
                "train_lr": trainer.lr_at(epoch + (steps - 1) / steps),
                "train_grad_norm": sums.grad_norm / sums.steps if sums.steps else None,
                **measured,
                "skipped_steps": sums.skipped,
                "images_per_s": round(steps * self.global_batch / max(sums.seconds, 1e-9), 1),
                "data_wait": round(sums.waited / max(sums.seconds, 1e-9), 4),
                "epoch_s": round(sums.seconds, 2),
            }
        )
        self.log.scalars(measured, epoch + 1)
        best = state.position.best_epoch == epoch
        state.position.next_epoch()
        if self.saver:
            self._save(state, best)

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
        by = StopRequest.latest or "another process"
        return (
            f"asked to stop ({by}): saved after step {position.step} of epoch {position.epoch}; "
            "the same command resumes from there"
        )
