"""Images that cannot be decoded: each is reported once, and too many end the run."""

from pathlib import Path
from typing import Protocol

from util.distributed import gather_objects, on_main
from util.errors import BadInput
from util.log import NullLog

MAX_BAD_SHARE = 0.05


class Loss(Protocol):
    """A batch_loss that records what is wrong with the files of its batches."""

    problems: set[str]  # "name<TAB>reason" on this rank, since last collected


class BadImages:
    """Counts the images that cannot be decoded, reports each once, and fails on too many."""

    def __init__(self, loss: Loss, count: int, record: Path, fresh: bool, log: NullLog) -> None:
        """`count`: images in all; `record`: bad_images.txt, continued unless the run is `fresh`."""
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
        """Collect what all ranks have found, and report what is new. Call it on all ranks.

        Raises BadInput if more than 5 % of the images cannot be read.
        """
        found = {p for problems in gather_objects(self.loss.problems) for p in problems}
        self.loss.problems = set()
        pairs = sorted(problem.partition("\t")[::2] for problem in found)
        new = {name: reason for name, reason in pairs if name not in self.known}
        self.known.update(new)
        for name, reason in new.items():
            self.log.line(f"warning: cannot read {name}: {reason}; another image replaces it")
            self.log.append(self.record, f"{name}\t{reason}")
        if len(self.known) > MAX_BAD_SHARE * self.count:
            name, reason = next(iter(self.known.items()))
            raise BadInput(
                f"--data_path: {len(self.known)} of {self.count} images cannot be read, more than "
                f"{MAX_BAD_SHARE:.0%} (first: {name}: {reason}; all: {self.record}); "
                "remove or repair them"
            )
