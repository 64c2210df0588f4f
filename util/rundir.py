"""The folder of a run: who works in it, what was started, how it ended."""

import fcntl
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
from util.files import write_json

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "matplotlib", "tensorboard")


class RunDir:
    """`output_dir`, locked for this process while it lives. Only rank 0 makes one.

    The lock is the operating system's: it is gone with its holder, however that ended, so it is
    never stale.
    """

    def __init__(self, path: str) -> None:
        """Make the folder and lock it. Raises BadInput when it cannot be used or is in use."""
        self.path = Path(path)
        self._lock = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "figures").mkdir(exist_ok=True)
            self._take_lock()
        except (FileExistsError, NotADirectoryError):
            raise BadInput(f"--output_dir {path}: is, or lies in, a file; name another") from None
        except OSError as error:
            raise BadInput(f"--output_dir {path}: cannot be written ({error.strerror})") from None

    def _take_lock(self) -> None:
        file = open(self.path / ".lock", "a+")  # noqa: SIM115 – held open as long as we live
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        # Data workers outlive a killed run for some seconds, and must not hold its lock meanwhile.
        held = weakref.ref(file)  # for a lock is given up, too, when its RunDir is gone
        os.register_at_fork(after_in_child=lambda: (lock := held()) and lock.close())

    def release(self) -> None:
        """Let others use the folder; done by the operating system at the end at the latest."""
        self._lock.close()

    def clear_status(self) -> None:
        """A run that has begun has not ended yet."""
        (self.path / "status.json").unlink(missing_ok=True)

    def write_status(self, status: str, reason: str = "") -> None:
        """`status.json`: done, bad_input, resumable or failed, and why."""
        write_json(self.path / "status.json", {"status": status, "reason": reason})


def note_status(path: str, status: str, reason: str) -> None:
    """Write the status of a run that has no RunDir (any more), unless another run holds it."""
    if not path or not os.path.isdir(path):
        return
    try:
        folder = RunDir(path)
        folder.write_status(status, reason)
        folder.release()
    except (BadInput, OSError):
        pass  # somebody else's folder, or one that cannot be written: the message is printed


def provenance() -> dict[str, object]:
    """What made this run: the command, the versions, the commit of this code if it has one."""
    return {
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "versions": {"python": platform.python_version(), **installed_versions()},
        "git_commit": git_commit(Path(__file__).resolve().parent.parent),
        "host": socket.gethostname(),
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter to a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path) -> str | None:
    """The commit of the code in `folder`, marked when files differ from it; None without git."""
    git = ["git", "-C", str(folder)]
    try:
        top = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "HEAD"], **_QUIET
        ).stdout.split()
        # A copy of this code inside somebody's own repository has no commit of its own.
        if len(top) != 2 or Path(top[0]).resolve() != folder:
            return None
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **_QUIET).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return top[1] + (" with changes" if changed else "")


_QUIET = {"capture_output": True, "text": True, "timeout": 10, "check": True}


def read_json(path: Path) -> dict:
    """A JSON object from a file; {} when it is missing or torn."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
