"""A limit on memory, as containers and SLURM jobs have it."""

import os
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SETTINGS = ("memory/{}/memory.limit_in_bytes", "{}/memory.max")  # versions 1 and 2 of cgroups


@contextmanager
def memory_limit(size):
    """Make a cgroup of at most `size` bytes; -> its folder, for `exhaust`."""
    folder = _limited(size)
    try:
        yield folder
    finally:
        folder.rmdir()


def _limited(size):
    for setting in SETTINGS:
        file = Path("/sys/fs/cgroup", setting.format(f"mae-sfer-test-{os.getpid()}"))
        with suppress(OSError):
            file.parent.mkdir()
            if file.exists():
                file.write_text(str(size))
                return file.parent
            file.parent.rmdir()
    pytest.skip("cannot make a cgroup with a memory limit here")


def exhaust(folder):
    """Join the cgroup and take more memory than it allows: the system kills this process."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    taken = []
    while True:
        taken.append(b"x" * 2**20)
