"""What happens between steps and epochs: log lines, checkpoints, bad images, the end on request."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from engine_train import Position, StepResult, Trainer, TrainState
from training.checkpoint_snapshot import HostCopy
from training.trace import StepTrace
from util.checkpoint import (
    BEST,
    LAST,
    find_not_finite,
    numbered_checkpoints,
    save_checkpoint,
)
from util.distributed import gather_objects, on_main
from util.errors import BadInput, Fault, Stopped
from util.files import remove_unfinished
from util.log import Meter, NullLog, duration, peak_memory
from util.program import BEGAN

MAX_BAD_SHARE = 0.05
MAX_FAILED_SAVES = 3  # in a row
NOTHING = "none yet"


class Saver:
    """Writes a run's checkpoints: rank 0 has a folder, the others None.

    Training waits only while the state is copied: a thread writes the copy, which takes as much
    memory again as a checkpoint. One is written at a time, and whoever needs it on the disk waits.
    A save that fails is told, and training goes on to the next; after several the run is to stop.
    """

    def __init__(
        self,
        folder: Path | None,
        extra: dict[str, Any],
        every: int,
        keep: int,
        epochs: int,
        begun: Position,
        warn: Callable[[str], None],
        give_up: Callable[[str], None],
    ) -> None:
        """`extra` goes into each file; every `every` epochs one is kept by number, `keep` of them.

        The last of `epochs` is always kept. The folder must be this process's alone. `begun`: where
        the run goes on, if it does. `warn` and `give_up` may be called by a thread.
        """
        self.folder, self.extra = folder, extra
        self.every, self.keep, self.epochs = every, keep, epochs
        self.warn, self.give_up = warn, give_up
        self.last_saved = NOTHING  # the newest that is on the disk
        self.failure: Fault | Stopped | None = None  # why that is not the last one asked for
        self._failed = 0  # saves in a row that the disk did not take
        self._copy, self._thread = HostCopy(), ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        if folder:
            remove_unfinished(folder)
            if (folder / LAST).exists() or numbered_checkpoints(folder):
                self.last_saved = in_words(begun)

    def save(self, state: TrainState, best: bool = False) -> None:
        """The state as it is now; at the beginning of an epoch perhaps under its number too.

        `best`: as `checkpoint-best.pth` too.
        """
        if self.folder is None:
            return
        self.wait()
        done, step = state.position.epoch, state.position.step
        numbered = step == 0 and (done % self.every == 0 or done == self.epochs)
        checkpoint = self._copy.take({**state.state_dict(), **self.extra})
        number = done - 1 if numbered else None
        name = in_words(state.position)
        self._writing = self._thread.submit(self._write, checkpoint, name, number, best)

    def wait(self) -> None:
        """Until what was saved is on the disk, or has failed."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def finish(self) -> None:
        """The same for the last save of a run, which must not fail.

        Raises Stopped when the run can be gone on with from an older one, else Fault.
        """
        self.wait()
        if self.failure:
            raise self.failure

    def _write(self, checkpoint: dict[str, Any], name: str, number: int | None, best: bool) -> None:
        try:
            if wrong := find_not_finite(checkpoint):
                self._refuse(wrong, name)
                return
            save_checkpoint(checkpoint, self.folder, number, self.keep, best)
        except OSError as error:
            self._count_failure(error, best)
            return
        self.last_saved, self.failure, self._failed = name, None, 0

    def _refuse(self, wrong: str, name: str) -> None:
        """What a run that has diverged would leave is no checkpoint; the loss will end the run."""
        self.failure = Fault(
            f"the weights {name} are not finite ({wrong}) and were not saved; the last good "
            f"checkpoint is {self.last_saved}; lower --blr, set --clip_grad, or use --amp off"
        )
        self.warn(f"warning: {self.failure}")

    def _count_failure(self, error: OSError, best: bool) -> None:
        self._failed += 1
        what = f"{self.folder / LAST}: could not be written ({error.strerror}); "
        if self.last_saved == NOTHING:
            self.failure = Fault(f"{what}nothing has been saved")
        else:
            what += f"the newest checkpoint is {self.last_saved}"
            self.failure = Stopped(f"{what}; the same command goes on from there")
        best_stays = f"; {BEST} may be an older one" if best else ""
        last = self._failed >= MAX_FAILED_SAVES
        then = f"{self._failed} times in a row: stopping" if last else "training goes on"
        self.warn(f"warning: {what}{best_stays}; {then}")
        if last:
            self.give_up(f"{self._failed} failed saves")


def in_words(position: Position) -> str:
    """Which checkpoint one is, in words."""
    return f"of epoch {position.epoch}, step {position.step}"


class RunObserver:
    """The training loop's observer; at the end of its `with` block all it saved is on the disk."""

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
        trace: StepTrace,
    ) -> None:
        """`at_lines` runs on all ranks whenever a line is due: what ranks have to exchange."""
        self.log, self.saver, self.meter, self.at_lines = log, saver, meter, at_lines
        self.device_type, self.steps, self.epochs = device_type, steps, epochs
        self.global_batch, self.print_freq, self.save_steps = global_batch, print_freq, save_steps
        self.trace = trace
        self._begun = False

    def __enter__(self) -> "RunObserver":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Raises as Saver.finish does, on all ranks; where the run ends by another error, waits."""
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
            # All wait for rank 0, to which launchers give little time once another has ended.
            raise Stopped(on_main(lambda: self._save_and_end(state)))
        if self.saver and self.save_steps and position.step % self.save_steps == 0:
            self._save(state)

    def _save(self, state: TrainState, best: bool = False) -> None:
        self.log.catch_up()
        self.saver.save(state, best)

    def _save_and_end(self, state: TrainState) -> str:
        """The last words of a run that was asked to stop. Raises as Saver.finish does."""
        self._save(state)
        self.saver.finish()
        return self._saved(state.position)

    def save_unfinished(self, state: TrainState) -> None:
        """See engine_train.Observer; a run whose epochs are all done is saved already."""
        if self.saver and state.position.epoch < self.epochs:
            self._save(state)
            self.saver.wait()
            if not self.saver.failure:
                self.log.line(self._saved(state.position))

    def rescue(self, state: TrainState, whole: bool) -> str:
        """Save what is done of a run that ends by a fault; -> a word on what is kept.

        `whole`: the state is that of its position; else the checkpoints before have to do.
        """
        if not self.saver:
            return "nothing was saved (--save_ckpt False)"
        try:
            if whole and state.position.epoch < self.epochs:
                self._save(state)
            self.saver.wait()
        except Exception as failure:
            self.log.line(f"warning: {failure}")
        if not self.saver.folder:  # rank 0 has one, and the word
            return ""
        return f"the newest checkpoint is {self.last_saved}: the same command goes on from there"

    def finish_epoch(self, trainer: Trainer, measure: Callable[[int], dict[str, float]]) -> None:
        """Measure, log an epoch, go to the next, save: in this order, that no log line is lost.

        A run killed before the save does the epoch again and writes its line again.
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
        return (
            f"asked to stop: saved after step {position.step} of epoch {position.epoch}; "
            "the same command goes on from there"
        )


class Loss(Protocol):
    """A batch_loss that notes what was wrong with the files of its batches."""

    problems: set[str]  # "name<TAB>reason", of this rank, since they were last taken


class BadImages:
    """Files that could not be decoded: counted, named once, too many end the run."""

    def __init__(self, loss: Loss, count: int, record: Path, fresh: bool, log: NullLog) -> None:
        """Of `count` images; `record` is bad_images.txt, gone on from unless the run is `fresh`."""
        self.loss, self.count, self.record, self.log = loss, count, record, log
        self.known: dict[str, str] = on_main(lambda: self._named_before(fresh))

    def _named_before(self, fresh: bool) -> dict[str, str]:
        if fresh:
            self.record.unlink(missing_ok=True)
        if not self.record.exists():
            return {}
        lines = self.record.read_text("utf-8", errors="replace").splitlines()
        return dict(line.partition("\t")[::2] for line in lines)

    def tell(self) -> None:
        """Gather all ranks' finds (call it on all of them) and name those not named before.

        Raises BadInput when more than 5 % of the data cannot be read.
        """
        found = {p for problems in gather_objects(self.loss.problems) for p in problems}
        self.loss.problems = set()
        pairs = sorted(problem.partition("\t")[::2] for problem in found)
        new = {name: reason for name, reason in pairs if name not in self.known}
        self.known.update(new)
        for name, reason in new.items():
            self.log.line(f"warning: cannot read {name}: {reason}; another takes its place")
            self.log.append(self.record, f"{name}\t{reason}")
        if len(self.known) > MAX_BAD_SHARE * self.count:
            name, reason = next(iter(self.known.items()))
            raise BadInput(
                f"--data_path: {len(self.known)} of {self.count} images cannot be read, more than "
                f"{MAX_BAD_SHARE:.0%} (first: {name}: {reason}; all: {self.record}); "
                "remove or repair them"
            )
