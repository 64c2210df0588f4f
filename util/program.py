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

from util import peers
from util.distributed import leave, met_others, own_rank
from util.errors import BAD_INPUT, DONE, FAULT, RESUMABLE, BadInput, Fault, Stopped
from util.options import Parser, find_output_dir
from util.rundir import note_status

BEGAN = time.monotonic()  # programs import this before anything that takes long
STATUS = {DONE: "done", FAULT: "failed", BAD_INPUT: "bad_input", RESUMABLE: "resumable"}
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # nobody's mistake in this code


def run_program(
    parser: Callable[[], Parser],
    check: Callable[[argparse.Namespace], None],
    work: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,
) -> int:
    """Parse, check, work; return the exit code and leave `status.json` in an --output_dir.

    Under a launcher rank 0 speaks; the others wait a moment, so that the launcher does not kill
    it before it has spoken, and one of them speaks if it has not.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be text
    code, reason = attempt(parser, check, work, argv)
    reason = one_line(reason)
    # Reference cycles would hold on to the folder's lock, and to DDP, which then aborts at exit.
    gc.collect()
    together = code in (DONE, RESUMABLE)
    if together:
        leave()
    if code == DONE:
        return code
    if speaks(code, reason):
        if parser().takes("--output_dir"):
            note_status(find_output_dir(argv), STATUS[code], reason)
        word = "" if code == RESUMABLE else "error: "
        print(f"{os.path.basename(sys.argv[0])}: {word}{reason}", file=sys.stderr, flush=True)
    if not together and (met_others() or multiprocessing.active_children()):
        # They may be waiting in NCCL for this process: any orderly farewell would wait with them;
        # as it would for a data worker that hangs in a call to the system.
        sys.stdout.flush()
        os._exit(code)
    return code


def one_line(reason: str) -> str:
    """A reason as one line that any terminal can take."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in reason)


def speaks(code: int, reason: str) -> bool:
    """Whether this process tells how the run ended."""
    rank = own_rank()
    if code in (FAULT, BAD_INPUT):
        peers.tell_reason(rank, reason)
    if rank == 0:
        peers.may_speak()  # so that no other does
        return True
    time.sleep(2)
    return code in (FAULT, BAD_INPUT) and met_others() and peers.may_speak()


def attempt(
    parser: Callable[[], Parser],
    check: Callable[[argparse.Namespace], None],
    work: Callable[[argparse.Namespace], None],
    argv: list[str],
) -> tuple[int, str]:
    """The exit code and the reason of `run_program`."""
    try:
        args = parser().parse(argv)
        check(args)
        work(args)
    except BadInput as error:
        return BAD_INPUT, str(error)
    except Stopped as stop:
        return RESUMABLE, str(stop)
    except Fault as fault:
        peers.kill_workers()
        return FAULT, str(fault)
    except KeyboardInterrupt:
        return FAULT, "interrupted"
    except OSError as error:
        peers.kill_workers()
        if error.errno not in DISK:
            traceback.print_exc()
        return FAULT, f"{error.filename or type(error).__name__}: {error.strerror or error}"
    except Exception as error:
        peers.kill_workers()
        lost = peers.explain(error)
        if not lost:
            traceback.print_exc()
        return FAULT, lost or f"{type(error).__name__}: {error}"
    return DONE, ""
