"""The ways in which a run can end, and their exit codes.

0 done · 1 fault · 2 bad usage or input · 75 saved and resumable (`EX_TEMPFAIL`).
"""

DONE, FAULT, BAD_INPUT, RESUMABLE = 0, 1, 2, 75


class BadInput(ValueError):
    """The user gave something that cannot work; the message names it and says what to do."""


class Fault(Exception):
    """The run cannot continue, and no option was wrong (for example: the loss stays non-finite)."""


class Lost(Exception):
    """What this process needs is gone or hangs: another rank, a data worker, its images' disk."""


class Stopped(Exception):
    """The run was asked to stop; everything is saved, and the same command resumes it."""


class ReadFault(Fault):
    """A file could not be read: memory ran out, or the disk failed. The file may be good."""


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the CPU or a GPU; torch raises a RuntimeError then."""
    texts = ("allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
