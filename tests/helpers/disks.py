"""Small and read-only disks for tests."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest


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
