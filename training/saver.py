"""Writes a run's checkpoints while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine_train import Position, TrainState
from training.checkpoint_snapshot import CheckpointSnapshot
from util.checkpoint import find_not_finite, numbered_checkpoints, save_checkpoint
from util.errors import Fault, Stopped
from util.files import remove_unfinished
from util.rundir import BEST, LAST

MAX_FAILED_SAVES = 3  # in a row
NOTHING = "none yet"


class Saver:
    """Writes a run's checkpoints on rank 0; elsewhere, `folder` is None and nothing is saved.

    Training waits only while the state is copied. A thread then writes the copy, which takes as
    much memory as a checkpoint. Saves do not overlap; `wait` blocks until the current one is on
    disk. When a save fails, a warning is logged and training continues; after several in a row the
    run is asked to stop.
    """

    def __init__(
        self,
        folder: Path | None,
        extra: dict[str, Any],
        *,
        every: int,
        keep: int,
        epochs: int,
        begun: Position,
        warn: Callable[[str], None],
        give_up: Callable[[str], None],
    ) -> None:
        """`extra` goes into each file. Every `every` epochs one is kept by number, `keep` in all.

        The state after the last of `epochs` is always numbered. Only this process may use the
        folder. `begun`: the position from which the run resumes, if it does. A thread may call
        `warn` and `give_up`.
        """
        self.folder, self.extra = folder, extra
        self.every, self.keep, self.epochs = every, keep, epochs
        self.warn, self.give_up = warn, give_up
        self.last_saved = NOTHING  # the newest checkpoint on disk
        self.failure: Fault | Stopped | None = None  # why the last requested save failed
        self._failed = 0  # failed writes in a row
        self._copy, self._thread = CheckpointSnapshot(), ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        if folder:
            remove_unfinished(folder)
            if (folder / LAST).exists() or numbered_checkpoints(folder):
                self.last_saved = in_words(begun)

    def save(self, state: TrainState, best: bool = False) -> None:
        """Save the current state; at the beginning of an epoch, perhaps under its number as well.

        `best`: as `checkpoint-best.pth` as well.
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
        """Block until the current save is on disk, or has failed."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def finish(self) -> None:
        """Like `wait`, for the last save of a run, which must not fail.

        Raises Stopped if the run can be resumed from an older checkpoint, else Fault.
        """
        self.wait()
        if self.failure:
            raise self.failure

    def _write(self, checkpoint: dict[str, Any], name: str, number: int | None, best: bool) -> None:
        try:
            if wrong := find_not_finite(checkpoint):
                self._refuse(wrong, name)
                return
            save_checkpoint(checkpoint, self.folder, number=number, keep=self.keep, best=best)
        except OSError as error:
            self._count_failure(error, best)
            return
        self.last_saved, self.failure, self._failed = name, None, 0

    def _refuse(self, wrong: str, name: str) -> None:
        """Report non-finite weights instead of saving them; the loss will end the run."""
        self.failure = Fault(
            f"the weights of {name} are not finite ({wrong}) and were not saved; last good "
            f"checkpoint: {self.last_saved}; lower --blr, set --clip_grad, or use --amp off"
        )
        self.warn(f"warning: {self.failure}")

    def _count_failure(self, error: OSError, best: bool) -> None:
        self._failed += 1
        what = f"{self.folder / LAST}: could not be written ({error.strerror}); "
        if self.last_saved == NOTHING:
            self.failure = Fault(f"{what}nothing has been saved")
        else:
            what += f"newest checkpoint: {self.last_saved}"
            self.failure = Stopped(f"{what}; the same command resumes from there")
        best_stays = f"; {BEST} may be an older one" if best else ""
        last = self._failed >= MAX_FAILED_SAVES
        then = f"{self._failed} times in a row: stopping" if last else "training continues"
        self.warn(f"warning: {what}{best_stays}; {then}")
        if last:
            self.give_up(f"{self._failed} failed saves")


def in_words(position: Position) -> str:
    """The position of a checkpoint, for messages."""
    return f"epoch {position.epoch}, step {position.step}"
