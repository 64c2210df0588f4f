"""A folder of faces with every kind of odd file that real folders hold beside good images."""

import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

import bombs

GOOD = 190  # so many that a run tolerates the unreadable ones

# Each of these is left out, for a reason that contains the words.
UNREADABLE = {
    "bomb.png": "decompression bomb",
    "dangling.jpg": "No such file",
    "device.jpg": "not a regular file",
    "fifo.jpg": "not a regular file",
    "half.jpg": "truncated",
    "page.jpg": "web page",
    "program.jpg": "PostScript",
    "scans.jpg": "JPEG of 6,001 scans",
    "zeros.jpg": "only zero bytes",
    "zero_bytes.jpg": "0 bytes",
}


def encoded(pixels, format="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def write_faces(folder, count=GOOD, side=40):
    """Write good images, each of one colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.new("RGB", (side, side), (k, 255 - k, 99)).save(folder / f"good{k:03d}.png")
    return folder


def write_odd(folder):
    """Write good images, odd but readable ones, and those of UNREADABLE."""
    write_faces(folder)
    (folder / "folder.jpg").mkdir()  # searched like any folder
    readable = {
        "one_pixel.jpg": encoded(noise(1, 1, 3)),
        "thin.jpg": encoded(noise(1, 4000, 3)),
        "deep.png": encoded(noise(30, 30).astype(np.uint16) * 257, "PNG"),
        "float.tif": encoded(noise(30, 30).astype(np.float32) / 255, "TIFF"),
        "folder.jpg/inside.jpg": encoded(noise(30, 30, 3)),
    }
    unreadable = {
        "bomb.png": bomb(),
        "half.jpg": encoded(noise(64, 64, 3))[:2000],
        "page.jpg": b"<!DOCTYPE html><title>Quota exceeded</title>",
        "program.jpg": encoded(noise(4, 4, 3), "EPS"),
        "scans.jpg": bombs.jpeg_of_scans(3000, 6000),
        "zeros.jpg": bytes(3000),
        "zero_bytes.jpg": b"",
    }
    for name, content in (readable | unreadable).items():
        (folder / name).write_bytes(content)
    with open(os.fsencode(folder) + b"/no_text_\xe9.jpg", "wb") as file:
        file.write(encoded(noise(20, 20, 3)))
    os.mkfifo(folder / "fifo.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "dangling.jpg").symlink_to(folder / "gone.jpg")
    return folder


def bomb(side=20_000):
    """A PNG of 49 kB that decodes to 400 million pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (1 + side // 8)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
