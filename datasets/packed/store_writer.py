"""Writes pixels to flat files, such that packing can resume after a kill or a full disk.

A journal records which images are safely in the parts. On resuming, all that the journal does not
cover is truncated and written again. The result is identical, because its bytes depend on the
images alone.
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
from util.files import flush_folder, lock
from util.wording import changed_images

PART_BYTES = 2**30  # a part ends with the image that reaches this size
KEEP_EVERY = 1.0  # seconds of work that a kill can cost at most


class Parts:
    """A store's pixels while they are being written, by this process alone."""

    def __init__(self, folder: Path, plan: dict) -> None:
        """Start in a new or empty folder, or resume where the journal ends.

        `plan` is everything that determines the bytes. Raises BadInput for a folder that must not
        be written to: it holds other files or other images, or another process is packing into it.
        """
        self.folder = folder
        # Height, width and digest of each image, or the reason why it is left out.
        self.images: list[list[int | str] | str] = []
        self.full: list[dict] = []  # file, bytes, sha256 of each finished part
        self._bytes, self._file = 0, None  # of the unfinished part
        self._new: list[list[int | str] | str | dict] = []  # items that are not in the journal yet
        self._kept_at = time.monotonic()
        _check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = open(folder / JOURNAL, "a+b", buffering=0)  # noqa: SIM115
        try:
            # Not flock: decoding processes inherit that lock, and hold it if this one is killed.
            lock(self._journal, fcntl.lockf)
            self._read_journal(plan)
            self._cut_part()
        except (BlockingIOError, PermissionError):
            self.close()
            raise _bad(folder, "another process is packing into it; wait for it to end") from None
        except BadInput:
            self.close()
            raise

    def _read_journal(self, plan: dict) -> None:
        """Read what the journal records, or begin it with the plan."""
        self._journal.seek(0)
        lines, end = self._journal.read().splitlines(keepends=True), 0
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if entry is None:
                break  # an incomplete line: its images are packed again
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
        """Count an image (an item of `images`) or a finished part (an item of `full`)."""
        if isinstance(item, dict):
            self.full.append(item)
            self._bytes = 0
            return
        self.images.append(item)
        if not isinstance(item, str):
            self._bytes += 3 * item[0] * item[1]

    def _cut_part(self) -> None:
        """Truncate the unfinished part to what the journal has. Raises BadInput for lost bytes."""
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
        """A value that equal images share; None if left out, or packed by an older release."""
        item = self.images[i]
        return tuple(item) if not isinstance(item, str) and len(item) == 3 else None

    def add(self, image: np.ndarray | str) -> None:
        """Add the next image, (H, W, 3) uint8, or the reason why it is left out."""
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
        """Finish the part that is being written, if there is one."""
        if self._file is not None:
            self._flush_part()
            self._file.close()
            self._file = None
            name = part_name(len(self.full))
            # It was just written, so this reads from memory.
            digest = file_digest(self.folder / name)
            self._note({"file": name, "bytes": self._bytes, "sha256": digest})
        self.keep()

    def keep(self) -> None:
        """Make what was added durable: first the pixels, then the journal entries for them."""
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
        """Release the folder; a `whole` store needs no journal, so that is removed."""
        if whole:
            (self.folder / JOURNAL).unlink()
        for file in (self._file, self._journal):
            with suppress(OSError):  # a full disk has already been reported
                if file is not None:
                    file.close()


def _bad(folder: Path, what: str) -> BadInput:
    return BadInput(f"--output {folder}: {what}")


def _check_folder(folder: Path) -> None:
    """Raise BadInput for a folder that is neither new, nor empty, nor a store."""
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise _bad(folder, "is a file or in one; name a folder") from None
    if names and not names & {JOURNAL, MANIFEST}:
        raise _bad(folder, "holds other files; name a new folder")


def is_packed(folder: Path, plan: dict) -> bool:
    """Whether the store is already finished. Raises BadInput if the folder holds another one."""
    _check_folder(folder)
    if not (folder / MANIFEST).exists():
        return False
    check_plan(folder, read_manifest(folder), plan)
    (folder / JOURNAL).unlink(missing_ok=True)  # left if packing was killed just before this
    return True


def check_plan(folder: Path, found: dict, plan: dict) -> None:
    """Raise BadInput unless the store was begun with the same plan."""
    for name, value in plan.items():
        if found.get(name) != value:
            what = f"{name} {found.get(name)}, not {value}"
            if name in ("data", "count"):
                counts = (f"{part.get('count')} images" for part in (found, plan))
                what = f"other images ({changed_images(*counts)})"
            raise _bad(folder, f"holds a store of {what}; name another folder, or remove this one")
