"""The containers of weights: torch's zip archives, its older pickles, and safetensors."""

import errno
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from util.errors import BadInput, ReadFault, out_of_memory
from util.files import OF_PATH


class Damaged(BadInput):
    """The file exists, but it is damaged."""


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises in the block into Damaged.

    A good file can fail, too: raises ReadFault if memory runs out, OSError if the disk fails.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # a damaged file can raise anything
        if out_of_memory(error) and requested(error) <= os.path.getsize(path):
            raise no_memory(path) from None
        if failure := disk_failure(error):
            raise failure from None
        raise Damaged(f"{path}: truncated or damaged ({first_line(error)})") from None


def requested(error: Exception) -> int:
    """The bytes that torch could not allocate at once; a damaged file may ask for any number."""
    number = re.search(r"allocate (\d+) bytes", str(error))
    return int(number[1]) if number else 0


def no_memory(path: Path) -> ReadFault:
    """The error for memory that runs out while a file is loaded."""
    return ReadFault(
        f"{path}: there is not enough memory to load it; the file may be good, and nothing was "
        "changed: free some memory, then run the same command again"
    )


def disk_failure(error: Exception) -> OSError | None:
    """The failure of a disk behind an exception; None if there was none."""
    for cause in (error, error.__context__):  # zipfile hides some
        # Seeking to a place that a damaged file names is an invalid argument.
        if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):
            return cause
    # Only the text remains of those of torch's direct reads and of safetensors.
    text = re.search(r"\(\): fd \d+ failed with (.+)|(.+) \(os error \d+\)$", str(error))
    return OSError(errno.EIO, text[1] or text[2]) if text else None


def check_container(path: Path, checksums: bool = True) -> str:
    """Recognise a file by its first bytes: "zip", "pickle" (torch's older formats), "safetensors".

    `checksums`: read all of it, and check a zip archive's checksums, which torch.load does not:
    otherwise a flipped byte would load as a wrong weight. Raises Damaged, BadInput for other files,
    ReadFault if memory runs out, OSError if the disk fails.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except IsADirectoryError:
        what = "is a folder; name a checkpoint in it, such as checkpoint-last.pth"
        raise BadInput(f"{path}: {what}") from None
    except OSError as error:
        if error.errno not in OF_PATH:
            raise
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    kind = recognise_container(path, head)
    if kind == "zip":
        check_archive(path, checksums)
    elif checksums:
        # A failing disk is noticed here. Later, when the file is mapped, it would kill the process.
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    return kind


def recognise_container(path: Path, head: bytes) -> str:
    """The kind of container that begins with `head`, as `check_container` returns it."""
    # A safetensors file starts with the length of its header in 8 bytes, which may look like
    # anything, followed by the header, which is JSON.
    if head[5:9] == b"\0\0\0{":
        return "safetensors"
    if not head.strip(b"\0"):
        raise Damaged(f"{path}: {'empty' if not head else 'damaged (starts with zeros)'}")
    if head.lstrip()[:1] == b"<":
        raise BadInput(f"{path}: a web page, not a checkpoint; download the file itself")
    if head[:2] == b"PK":
        return "zip"
    if path.suffix == ".safetensors":
        raise Damaged(f"{path}: damaged (no safetensors header)")
    if head[:1] != b"\x80" and head[257:262] != b"ustar":  # torch's two older formats
        raise BadInput(f"{path}: not a PyTorch checkpoint (starts with {head[:8]!r})")
    return "pickle"


def check_archive(path: Path, checksums: bool) -> None:
    """Check the members of a zip archive, and with `checksums` their bytes. Raises as above.

    torch.save stores members uncompressed, one after the other, so they cannot exceed the file.
    Others could fill the memory from a small file.
    """
    with parsing(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(m.filename.endswith("/constants.pkl") for m in members):
            raise holds_program(path)
        if packed := [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]:
            raise Damaged(
                f"{path}: damaged, or packed by another program ({packed[0]} is compressed, which "
                "torch.save never does); unpack it, then save it again with torch.save"
            )
        claimed, size = sum(m.file_size for m in members), os.path.getsize(path)
        if claimed > size:
            what = f"its members claim {claimed:,} bytes, but the file has only {size:,}"
            raise Damaged(f"{path}: damaged ({what})")
        wrong = archive.testzip() if checksums else None
    if wrong:
        raise Damaged(f"{path}: damaged (checksum of {wrong})")


def holds_program(path: Path) -> BadInput:
    """The error for a file that is more than data."""
    return BadInput(
        f"{path}: is in a format that may contain code (TorchScript, or torch's old tar), and was "
        "not loaded; save its state_dict() with torch.save"
    )


def first_line(error: Exception) -> str:
    """An exception's message as one short line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
