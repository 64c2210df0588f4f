"""How a program begins and ends: options, exit codes, one clear line instead of a traceback."""

import argparse
import errno
import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from util import process_failures
from util.distributed import leave, met_others, own_rank
from util.errors import BAD_INPUT, DONE, FAULT, RESUMABLE, BadInput, Fault, Stopped
from util.options.parser import Parser, find_output_dir
from util.rundir import note_status
from util.wording import one_line

BEGAN = time.monotonic()  # programs import this before anything that takes long
STATUS = {DONE: "done", FAULT: "failed", BAD_INPUT: "bad_input", RESUMABLE: "resumable"}
# Of disks, and of readers as `head` that have seen enough: no mistakes in this code.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPIPE)


def run_program(
    parser: Callable[[], Parser],
    check: Callable[[argparse.Namespace], None],
    work: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,
) -> int:
    """Parse, check, work; return the exit code and leave `status.json` in a run's --output_dir.

    Under a launcher rank 0 speaks; the others wait a moment, so that the launcher does not kill
    it before it has spoken, and one of them speaks if it has not.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be text
    code, reason, began, folder = attempt(parser, check, work, argv)
    reason = one_line(reason)
    together = code in (DONE, RESUMABLE)
    if not together:
        process_failures.kill_workers()
    if began:
        # Reference cycles would hold on to the folder's lock, and to DDP, which aborts at exit.
        gc.unfreeze()
        gc.collect()
    if together:
        leave()
    if code != DONE and speaks(code, reason):
        if parser().has_run:
            note_status(folder, STATUS[code], reason)
        word = "" if code == RESUMABLE else "error: "
        with suppress(OSError):
            print(f"{os.path.basename(sys.argv[0])}: {word}{reason}", file=sys.stderr, flush=True)
    flush_output()
    if not together and (met_others() or multiprocessing.active_children()):
        # They may be waiting in NCCL for this process: any orderly farewell would wait with them;
        # as it would for a data worker that hangs in a call to the system.
        os._exit(code)
    return code


def flush_output() -> None:
    """Let what standard output cannot take, as on a full disk, not decide the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def speaks(code: int, reason: str) -> bool:
    """Whether this process tells how the run ended."""
    if not met_others():  # what goes wrong before goes wrong for all of a machine
        time.sleep(0 if own_rank(local=True) == 0 else 2)
        return own_rank(local=True) == 0
    rank = own_rank()
    if code in (FAULT, BAD_INPUT):
        process_failures.tell_end(rank, code, reason)
    if rank == 0:
        process_failures.may_speak()  # so that no other does
        return True
    time.sleep(2)
    return code in (FAULT, BAD_INPUT) and process_failures.may_speak()


def attempt(
    parser: Callable[[], Parser],
    check: Callable[[argparse.Namespace], None],
    work: Callable[[argparse.Namespace], None],
    argv: list[str],
) -> tuple[int, str, bool, str]:
    """The exit code and the reason of `run_program`, whether the work began, and its folder."""
    began, folder = False, find_output_dir(argv)
    try:
        args = parser().parse(argv)
        check(args)
        began, folder = True, getattr(args, "output_dir", "") or ""
        work(args)
    except KeyboardInterrupt:
        return FAULT, "interrupted", began, folder
    except Exception as error:
        return *told(error), began, folder
    return DONE, "", began, folder


def told(error: Exception) -> tuple[int, str]:
    """The exit code and the reason that an exception stands for; a traceback where it is a bug."""
    error = process_failures.explain(error) or error
    for kind, code in ((BadInput, BAD_INPUT), (Stopped, RESUMABLE), (Fault, FAULT)):
        if isinstance(error, kind):
            return code, str(error)
    if not (isinstance(error, OSError) and error.errno in DISK):
        traceback.print_exception(error)
    if isinstance(error, OSError):
        return FAULT, f"{error.filename or type(error).__name__}: {error.strerror or error}"
    return FAULT, f"{type(error).__name__}: {error}"
