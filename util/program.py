"""How a program starts and ends: options, exit codes, one clear line instead of a traceback."""

import argparse
import errno
import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable

from util import process_failures
from util.distributed import is_distributed, leave, own_rank
from util.errors import BAD_INPUT, DONE, FAULT, RESUMABLE, BadInput, Fault, Stopped
from util.options.parser import Parser, find_output_dir, program_name
from util.rundir import note_status
from util.stop import StopRequest
from util.streams import lasting_streams
from util.wording import one_line

BEGAN = time.monotonic()  # programs import this before anything slow
STATUS = {DONE: "done", FAULT: "failed", BAD_INPUT: "bad_input", RESUMABLE: "resumable"}
# Disk errors, and readers such as `head` that stop reading: not bugs in this code.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPIPE)


def run_program(
    parser: Callable[[], Parser],
    check: Callable[[argparse.Namespace], None],
    work: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,
) -> int:
    """Parse, check, work; return the exit code and leave `status.json` in a run's --output_dir.

    Under a launcher, rank 0 reports how the run ended. The other ranks wait a moment, so that the
    launcher does not kill rank 0 before that; if rank 0 has not reported by then, one of them does.
    """
    with lasting_streams():
        code = start_and_end(parser, check, work, sys.argv[1:] if argv is None else argv)
    failed = code not in (DONE, RESUMABLE)
    if failed and (is_distributed() or multiprocessing.active_children()):
        # Other ranks may be waiting for this one in NCCL, or a data worker may hang in a system
        # call: an orderly shutdown would wait for them.
        os._exit(code)
    return code


def start_and_end(
    parser: Callable[[], Parser],
    check: Callable[[argparse.Namespace], None],
    work: Callable[[argparse.Namespace], None],
    argv: list[str],
) -> int:
    """`run_program` but for its last step, leaving other processes behind that hang."""
    code, reason, began, folder = attempt(parser, check, work, argv)
    reason = one_line(reason)
    together = code in (DONE, RESUMABLE)
    if not together:
        process_failures.kill_workers()
    if began:
        # Reference cycles would keep alive the folder's lock and DDP, which aborts at exit.
        gc.unfreeze()
        gc.collect()
    if together:
        leave()
    if code != DONE and is_reporter(code, reason):
        if parser().has_run:
            note_status(folder, STATUS[code], reason)
        word = "" if code == RESUMABLE else "error: "
        print(f"{program_name()}: {word}{reason}", file=sys.stderr, flush=True)
    return code


def is_reporter(code: int, reason: str) -> bool:
    """Whether this process reports how the run ended."""
    if not is_distributed():  # errors before that affect all processes of a machine
        time.sleep(0 if own_rank(local=True) == 0 else 2)
        return own_rank(local=True) == 0
    rank = own_rank()
    if code in (FAULT, BAD_INPUT):
        process_failures.tell_end(rank, code, reason)
    if rank == 0:
        process_failures.may_speak()  # so that no other rank does
        return True
    time.sleep(2)
    return code in (FAULT, BAD_INPUT) and process_failures.may_speak()


def attempt(
    parser: Callable[[], Parser],
    check: Callable[[argparse.Namespace], None],
    work: Callable[[argparse.Namespace], None],
    argv: list[str],
) -> tuple[int, str, bool, str]:
    """Parse, check, work -> exit code, reason, whether the work began, and its folder."""
    began, folder = False, find_output_dir(argv)
    request = StopRequest()
    request.install(at_once=True)  # until the work installs its own
    try:
        args = parser().parse(argv)
        check(args)
        began, folder = True, getattr(args, "output_dir", "") or ""
        work(args)
    except KeyboardInterrupt as signal:
        return *interrupted(str(signal)), began, folder
    except Exception as error:
        return *outcome(error), began, folder
    finally:
        request.at_once = False
    return DONE, "", began, folder


def interrupted(asked_by: str) -> tuple[int, str]:
    """The exit code and reason after a signal, whose name is '' if it was a second Ctrl-C."""
    if not asked_by:
        return FAULT, "interrupted"
    return RESUMABLE, f"asked to stop ({asked_by}); rerun the same command"


def outcome(error: Exception) -> tuple[int, str]:
    """The exit code and reason for an exception; prints the traceback of a bug."""
    error = process_failures.explain(error) or error
    for kind, code in ((BadInput, BAD_INPUT), (Stopped, RESUMABLE), (Fault, FAULT)):
        if isinstance(error, kind):
            return code, str(error)
    if not (isinstance(error, OSError) and error.errno in DISK):
        traceback.print_exception(error)
    if isinstance(error, OSError):
        return FAULT, f"{error.filename or type(error).__name__}: {error.strerror or error}"
    return FAULT, f"{type(error).__name__}: {error}"
