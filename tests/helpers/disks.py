"""Small and read-only disks, and little shared memory, for tests."""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import traceback
from contextlib import contextmanager

import pytest
import torch

from util.process_failures import kill_workers

SKIPPED = 77


@contextmanager
def small_disk(folder, size):
    """Mount a disk of `size` (as mount spells it) at `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder, options):
    """Change a mounted disk: `size=2m`, `ro`, `rw`."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@contextmanager
def portable_disk(folder, kind):
    """Mount a disk of 400 MB as USB sticks have (`vfat`, `exfat`) at `folder`.

    By the kernel, or for exFAT by its driver for FUSE.
    """
    tools = [f"mkfs.{kind}", "losetup"]
    if os.geteuid() or not all(map(shutil.which, tools)):
        pytest.skip(f"needs root and {' and '.join(tools)}")
    folder.mkdir()
    image = folder.with_suffix(".img")
    image.touch()
    os.truncate(image, 400 * 2**20)
    subprocess.run([f"mkfs.{kind}", image], check=True, capture_output=True)
    attach = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True)
    if attach.returncode:
        pytest.skip("cannot attach an image as a disk here")
    device = attach.stdout.strip()
    try:
        drivers = [["mount", "-t", kind], [f"mount.{kind}-fuse"]]
        for mount in [driver for driver in drivers if shutil.which(driver[0])]:
            if subprocess.run([*mount, device, folder], capture_output=True).returncode == 0:
                break
        else:
            pytest.skip(f"cannot mount {kind} here")
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def shrink_shared_memory(options):
    """Give this process and its children a /dev/shm of their own; `options`: `size=4m` and such."""
    new_mounts = 0x20000  # CLONE_NEWNS
    assert ctypes.CDLL(None).unshare(new_mounts) == 0
    for mount in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", options, "tmpfs", "/dev/shm"]):
        subprocess.run(["mount", *mount], check=True, capture_output=True)


def with_shared_memory(options, act, *given):
    """Call `act(*given)` in a process with such a /dev/shm; -> its exit code."""

    def work():
        code = SKIPPED
        try:
            shrink_shared_memory(options)
            torch.set_num_threads(1)  # more threads hang in a forked process
            code = 1
            act(*given)
            code = 0
        except Exception:
            traceback.print_exc()
        kill_workers()  # they would be waited for
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    process.kill()
    process.join()
    if process.exitcode == SKIPPED:
        pytest.skip("cannot mount another /dev/shm here")
    return process.exitcode
