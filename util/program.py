"""How a program begins and ends: options, exit codes, one clear line instead of a traceback."""

import argparse
import errno
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable

from util.distributed import leave, met_others
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

    Under a launcher only rank 0 speaks; the others wait a moment, so that the launcher does not
    kill it before it has spoken.
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
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(2)
    else:
        if parser().takes("--output_dir"):
            note_status(find_output_dir(argv), STATUS[code], reason)
        word = "" if code == RESUMABLE else "error: "
        print(f"{os.path.basename(sys.argv[0])}: {word}{reason}", file=sys.stderr, flush=True)
    if not together and met_others():
        # They may be waiting in NCCL for this process: any orderly farewell would wait with them.
        sys.stdout.flush()
        os._exit(code)
    return code


def one_line(reason: str) -> str:
    """A reason as one line any terminal can take; of a data worker's traceback what it ends with.

    torch makes those up of "Caught BadInput in DataLoader worker process 0.", the traceback and
    the exception itself.
    """
    if reason.startswith("Caught ") and "Traceback" in reason:
        reason = reason.strip().splitlines()[-1].partition(": ")[2]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in reason)


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
        return FAULT, str(fault)
    except KeyboardInterrupt:
        return FAULT, "interrupted"
    except OSError as error:
        if error.errno not in DISK:
            traceback.print_exc()
        return FAULT, f"{error.filename or type(error).__name__}: {error.strerror or error}"
    except Exception as error:
        traceback.print_exc()
        return FAULT, f"{type(error).__name__}: {error}"
    return DONE, ""
