"""The folder of a run: its lock, what was started, how it ended."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import weakref
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from util.errors import BadInput
from util.files import lock, unusable, write_json

# The checkpoints of a run, besides the numbered ones.
BEST, LAST = "checkpoint-best.pth", "checkpoint-last.pth"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "matplotlib", "tensorboard")


class RunDir:
    """`output_dir`, locked for this process as long as it lives. Only rank 0 creates one.

    The lock is the operating system's, which releases it when its holder ends in any way: it is
    never stale. A file system without locks causes a warning.
    """

    def __init__(self, path: str) -> None:
        """Create and lock the folder. Raises BadInput if it cannot be used or is in use."""
        self.path = Path(path)
        self._lock = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "figures").mkdir(exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise BadInput(f"--output_dir {path}: {unusable(error)}") from None

    def _take_lock(self) -> None:
        file = open(self.path / ".lock", "a+")  # noqa: SIM115 – held open as long as we live
        try:
            lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise BadInput(
                f"--output_dir {self.path}: {holder} is training in it; wait for that run, "
                "stop it, or name another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file
        # Data workers outlive a killed run by some seconds and must not hold its lock.
        held = weakref.ref(file)  # weak: the lock must also end with its RunDir
        os.register_at_fork(after_in_child=lambda: (lock := held()) and lock.close())

    def release(self) -> None:
        """Release the lock; at the latest, the operating system does so when the process ends."""
        self._lock.close()

    def clear_status(self) -> None:
        """Delete `status.json`: a run that has started has not ended yet."""
        (self.path / "status.json").unlink(missing_ok=True)

    def write_status(self, status: str, reason: str = "") -> None:
        """Write `status.json`: done, bad_input, resumable or failed, and the reason."""
        write_json(self.path / "status.json", {"status": status, "reason": reason})


def note_status(path: str, status: str, reason: str) -> None:
    """Write the status of a run without a RunDir (any more), unless another run holds the lock."""
    if not path or not os.path.isdir(path):
        return
    try:
        folder = RunDir(path)
        folder.write_status(status, reason)
        folder.release()
    except (BadInput, OSError):
        pass  # another run's folder, or one that cannot be written; the reason is printed anyway


def provenance() -> dict[str, object]:
    """What produced a run: command, versions, and the commit of this code if it has one."""
    return {
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "versions": {"python": platform.python_version(), **installed_versions()},
        "git_commit": git_commit(Path(__file__).resolve().parent.parent),
        "host": socket.gethostname(),
    }


def installed_versions() -> dict[str, str]:
    """The versions of the packages that affect results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path) -> str | None:
    """The commit of the code in `folder`, marked if files differ from it; None without git."""
    git = ["git", "-C", str(folder)]
    try:
        top = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "HEAD"], **_QUIET
        ).stdout.split()
        # A copy of this code inside another repository has no commit of its own.
        if len(top) != 2 or Path(top[0]).resolve() != folder:
            return None
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **_QUIET).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return top[1] + (" with changes" if changed else "")


_QUIET = {"capture_output": True, "text": True, "timeout": 10, "check": True}


def read_json(path: Path) -> dict:
    """A JSON object from a file; {} if it is missing or truncated."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
