"""Writing a run's checkpoints while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine_train import Position, TrainState
from training.checkpoint_snapshot import HostCopy
from util.checkpoint import BEST, LAST, find_not_finite, numbered_checkpoints, save_checkpoint
from util.errors import Fault, Stopped
from util.files import remove_unfinished

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
        *,
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
