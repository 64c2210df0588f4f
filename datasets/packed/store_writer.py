"""Pixels into flat files, so that whatever ends the work – a kill, a full disk – it can go on.

A journal says which images are safely in the parts. What lies beyond its word is cut off, and the
rest is written as it would have been: the bytes depend on the images alone.
"""

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from datasets.duplicates import digest
from datasets.packed.store import ANEW, JOURNAL, MANIFEST, file_digest, part_name, read_manifest
from util.errors import BadInput
from util.files import flush_folder

PART_BYTES = 2**30  # a part ends with the image that reaches this
KEEP_EVERY = 1.0  # seconds of work that a kill costs at most


class Parts:
    """A store's pixels while they are being written, by this process alone."""

    def __init__(self, folder: Path, plan: dict) -> None:
        """Begin in a new or empty folder, or go on where the journal ends.

        `plan` is what determines the bytes. Raises BadInput for a folder that is not to be written
        in: it holds something else, other images, or another process is at it.
        """
        self.folder = folder
        # Height, width and digest of each, or why it is left out.
        self.images: list[list[int | str] | str] = []
        self.full: list[dict] = []  # file, bytes, sha256
        self._bytes, self._file = 0, None  # of the part that is not full
        self._new: list[list[int | str] | str | dict] = []  # what the journal does not know yet
        self._kept_at = time.monotonic()
        _check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = open(folder / JOURNAL, "a+b", buffering=0)  # noqa: SIM115
        try:
            # Not flock, which the processes that decode would inherit, and keep after a kill.
            fcntl.lockf(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read_journal(plan)
            self._cut_part()
        except (BlockingIOError, PermissionError):
            self.close()
            raise _bad(folder, "another process is packing in it; wait for it") from None
        except BadInput:
            self.close()
            raise

    def _read_journal(self, plan: dict) -> None:
        """Take over what is there, or begin with the plan."""
        self._journal.seek(0)
        lines, end = self._journal.read().splitlines(keepends=True), 0
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if entry is None:
                break  # torn: what it spoke of is done again
            if number == 0:
                check_plan(self.folder, entry, plan)
            else:
                for item in entry:
                    self._count(item)
            end += len(line)
        self._journal.truncate(end)
        if not end:
            self._append(plan)
            flush_folder(self.folder)

    def _count(self, item: list[int | str] | str | dict) -> None:
        """Note an image (as in `images`) or the end of a part (what it is)."""
        if isinstance(item, dict):
            self.full.append(item)
            self._bytes = 0
            return
        self.images.append(item)
        if not isinstance(item, str):
            self._bytes += 3 * item[0] * item[1]

    def _cut_part(self) -> None:
        """Take from the part that is not full what the journal knows nothing of."""
        current = {"file": part_name(len(self.full)), "bytes": self._bytes}
        for part in [*self.full, current] if self._bytes else self.full:
            path = self.folder / part["file"]
            if not path.is_file() or path.stat().st_size < part["bytes"]:
                raise _bad(self.folder, f"{part['file']} is shorter than it was; {ANEW}")
        if self._bytes:
            self._file = open(path, "r+b")  # noqa: SIM115
            self._file.truncate(self._bytes)
            self._file.seek(self._bytes)

    def content(self, i: int) -> tuple | None:
        """What equal images share; None of one that is left out or that an older release packed."""
        item = self.images[i]
        return tuple(item) if not isinstance(item, str) and len(item) == 3 else None

    def add(self, image: np.ndarray | str) -> None:
        """The next image, (H, W, 3) uint8, or why it has to be left out."""
        if isinstance(image, str):
            self._note(image)
        else:
            if self._file is None:
                self._file = open(self.folder / part_name(len(self.full)), "wb")  # noqa: SIM115
                flush_folder(self.folder)
            self._file.write(np.ascontiguousarray(image).data)
            self._note([*image.shape[:2], digest(image).hex()])
        if self._bytes >= PART_BYTES:
            self.end_part()
        elif time.monotonic() - self._kept_at > KEEP_EVERY:
            self.keep()

    def _note(self, item: list[int | str] | str | dict) -> None:
        self._count(item)
        self._new.append(item)

    def end_part(self) -> None:
        """The part that is being written, if there is one, is full."""
        if self._file is not None:
            self._flush_part()
            self._file.close()
            self._file = None
            name = part_name(len(self.full))
            # Just written, so this reads memory.
            digest = file_digest(self.folder / name)
            self._note({"file": name, "bytes": self._bytes, "sha256": digest})
        self.keep()

    def keep(self) -> None:
        """Make what was added outlive anything: pixels first, then the journal's word for them."""
        self._flush_part()
        if self._new:
            self._append(self._new)
        self._new, self._kept_at = [], time.monotonic()

    def _flush_part(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def _append(self, value: object) -> None:
        line = json.dumps(value).encode() + b"\n"
        while line:
            line = line[self._journal.write(line) :]
        os.fsync(self._journal.fileno())

    def close(self, whole: bool = False) -> None:
        """Let others write here; a `whole` store needs no journal."""
        if whole:
            (self.folder / JOURNAL).unlink()
        for file in (self._file, self._journal):
            with suppress(OSError):  # a full disk has been told of already
                if file is not None:
                    file.close()


def _bad(folder: Path, what: str) -> BadInput:
    return BadInput(f"--output {folder}: {what}")


def _check_folder(folder: Path) -> None:
    """Raises BadInput for what is neither new, nor empty, nor a store."""
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise _bad(folder, "is, or lies in, a file; name a folder") from None
    if names and not names & {JOURNAL, MANIFEST}:
        raise _bad(folder, "holds other files; name a new folder")


def is_packed(folder: Path, plan: dict) -> bool:
    """Whether the store is there already. Raises BadInput if another one is."""
    _check_folder(folder)
    if not (folder / MANIFEST).exists():
        return False
    check_plan(folder, read_manifest(folder), plan)
    (folder / JOURNAL).unlink(missing_ok=True)  # killed just before this
    return True


def check_plan(folder: Path, found: dict, plan: dict) -> None:
    """Raises BadInput unless a store was begun for the same bytes."""
    for name, value in plan.items():
        if found.get(name) != value:
            was = "other images" if name in ("data", "count") else f"{name} {found.get(name)}"
            now = "" if name in ("data", "count") else f", not {value}"
            what = f"holds a store of {was}{now}; name another folder, or remove this one"
            raise _bad(folder, what)
