"""Limits on the work that one image file can cause: small ones can be made to decode for hours.

They are far above what usual files need. `decode.py` itself limits the number of pixels.
"""

import io
import re
import time
from collections.abc import Iterator

MOST_SCANS = 100  # passes over the pixels of a JPEG, as in libtiff; encoders write about ten
MOST_EXIF = 2**17  # bytes; an entry has 12, and Pillow may copy all of them for each
MOST_SECONDS = 30.0  # of CPU time, so that a busy machine refuses no more than an idle one
BOMB = "(a decompression bomb?)"

# JPEG markers are FF and one of these. Among pixels, FF is followed by 00, or by D0 to D7.
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
SEQUENTIAL, END, SCAN, APP1 = (b"\xc0", b"\xc1"), b"\xd9", b"\xda", b"\xe1"


class Refused(Exception):
    """A file that is not decoded; the text becomes the reason of UnreadableImage."""


class LimitedBytes(io.BytesIO):
    """A file's bytes, which stop Pillow when it has read for too long, or copied too much of them.

    Its decoders, in C, take time in proportion to the pixels. But its parsers, in Python, read in
    small pieces, and for some the time grows with the square of the file's size.
    """

    def __init__(self, data: bytearray) -> None:
        super().__init__(data)
        self._until = time.thread_time() + MOST_SECONDS
        self._left = 10 * len(data) + 2**28  # bytes
        self._reads = 0

    def read(self, size: int | None = -1) -> bytes:
        """See io.BytesIO. Raises Refused."""
        return self._counted(io.BytesIO.read(self, size))

    def readline(self, size: int | None = -1) -> bytes:
        """See io.BytesIO. Raises Refused."""
        return self._counted(io.BytesIO.readline(self, size))

    def _counted(self, found: bytes) -> bytes:
        self._left -= len(found)
        self._reads += 1
        if len(found) >= 2**16 or self._reads % 256 == 0:  # seldom, for speed
            self._check()
        return found

    def _check(self) -> None:
        if self._left < 0:
            raise Refused(f"refers to the same bytes again and again {BOMB}")
        if time.thread_time() > self._until:
            raise Refused(f"takes more than {MOST_SECONDS:g} s to read {BOMB}")


def check_jpeg(data: bytearray) -> None:
    """Refuse a JPEG with too many scans or too much EXIF data; other files pass."""
    scans, exif, channels = 0, 0, b""
    for marker, at in _segments(data):
        if marker in SEQUENTIAL:
            channels = data[at + 7 : at + 8]
        elif marker == APP1 and data[at + 2 : at + 6] == b"Exif":
            exif += _length(data, at)
        elif marker == SCAN:
            # Nearly all files end the loop here: one scan has everything, or there are few.
            whole = channels and data[at + 2 : at + 3] == channels
            if not scans and (whole or data.count(b"\xff\xda") <= MOST_SCANS):
                break
            scans += 1
        elif marker == END:  # other data may follow, such as a phone's video
            break
    check_exif(exif)
    if scans > MOST_SCANS:
        raise Refused(f"is a JPEG of {scans:,} scans {BOMB}")


def check_exif(size: int) -> None:
    """Refuse more bytes of EXIF data than any camera writes: a JPEG segment has 65,535."""
    if size > MOST_EXIF:
        raise Refused(f"has {size:,} bytes of EXIF data {BOMB}")


def _segments(data: bytearray) -> Iterator[tuple[bytes, int]]:
    """(marker, position of its length) of each segment of a JPEG; nothing for other files."""
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while found := MARKER.search(data, at):
        at = found.end()
        yield found[1], at
        at += _length(data, at)


def _length(data: bytearray, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")
