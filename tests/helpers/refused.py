"""Lets the kernel refuse to lock files, as it does on some file systems."""

import ctypes
import platform
import struct

NUMBERS = {"x86_64": (73, 72), "aarch64": (32, 25)}  # of flock and fcntl
F_SETLK, F_SETLKW = 6, 7
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2  # of prctl
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of the kernel's filter language
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
NUMBER, ARGUMENT = 0, 24  # where the call's number and its second argument are


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def refuse_locks(error: int) -> None:
    """Let flock, and fcntl with a lock, fail with `error` in this process and its children."""
    flock, fcntl = NUMBERS[platform.machine()]
    steps = [  # operation, steps to skip if true, if false, operand
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_EQUAL, 4, 0, flock),
        (JUMP_IF_EQUAL, 0, 4, fcntl),
        (LOAD, 0, 0, ARGUMENT),
        (JUMP_IF_EQUAL, 1, 0, F_SETLK),
        (JUMP_IF_EQUAL, 0, 1, F_SETLKW),
        (RETURN, 0, 0, REFUSE | error),
        (RETURN, 0, 0, ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    call = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in (
        (NO_NEW_PRIVILEGES, 1, 0, 0, 0),
        (SET_SECCOMP, FILTER, ctypes.byref(Program(len(steps), code)), 0, 0),
    ):
        if call(*arguments):
            raise OSError(ctypes.get_errno(), "seccomp")
