"""Small image files that would take long, or much memory, to decode."""

import io
import struct
import zlib

from PIL import Image


def encoded(size, format, **options):
    buffer = io.BytesIO()
    Image.new("L", (size, size)).save(buffer, format, **options)
    return buffer.getvalue()


def jpeg_of_scans(side, scans, before=b""):
    """A progressive JPEG with this many scans more than the first; `before`: a segment."""

    def segment(marker, content):
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    def codes(table, symbol):  # a Huffman table with one code, 0
        return segment(0xC4, bytes([table, 1, *[0] * 15, symbol]))

    blocks = (-(-side // 8)) ** 2
    head = segment(0xDB, bytes([0, *[1] * 64])) + before
    head += segment(0xC2, struct.pack(">BHHB3B", 8, side, side, 1, 1, 0x11, 0))
    first = codes(0x00, 0) + segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(-(-blocks // 8))
    # Each code 0 skips 16,384 blocks or, with 14 bits that are 1, nearly twice as many.
    runs = "".join("0" + "1" * 14 for _ in range(-(-blocks // 2**14)))
    runs += "1" * (-len(runs) % 8)
    content = int(runs, 2).to_bytes(len(runs) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = segment(0xDA, bytes([1, 1, 0x00, 1, 63, 0])) + content
    return b"\xff\xd8" + head + first + codes(0x10, 0xE0) + scan * scans + b"\xff\xd9"


def gif_of_comments(count):
    """A GIF with this many comments, which Pillow joins one by one."""
    data = encoded(8, "GIF")
    colours = 13 + (3 << (data[10] % 8 + 1) if data[10] & 0x80 else 0)
    return data[:colours] + b"!\xfe\1x\0" * count + data[colours:]


def tiff(entries, rest=b""):
    """A TIFF of tag, type, count and value, or -1 for the position of `rest`."""
    end = 8 + 2 + 12 * len(entries) + 4
    table = b"".join(
        struct.pack("<HHII", *entry[:3], end if entry[3] < 0 else entry[3]) for entry in entries
    )
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + rest


def tiff_of_entries(count, size):
    """A TIFF in which this many entries refer to the same `size` bytes."""
    shape = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    shape += [(273, 4, 1, -1), (277, 3, 1, 1), (278, 4, 1, 8), (279, 4, 1, 64)]
    return tiff(shape + [(1000 + k, 7, size, -1) for k in range(count)], bytes(size))


def tiff_of_a_tile(side):
    """A TIFF of 8 × 8 pixels in one tile of side × side."""
    content = zlib.compress(bytes(side * side))
    shape = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)]
    shape += [(277, 3, 1, 1), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, -1)]
    return tiff([*shape, (325, 4, 1, len(content))], content)


def jpeg_of_exif(count, size):
    """A JPEG whose EXIF data are such a TIFF, in as many segments as it takes."""
    data, exif = encoded(8, "JPEG"), tiff_of_entries(count, size)
    parts = [b"Exif\0\0" + exif[k : k + 65000] for k in range(0, len(exif), 65000)]
    segments = [b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts]
    return data[:2] + b"".join(segments) + data[2:]


def png_of_exif(count, size):
    """A PNG with such EXIF data after its pixels."""
    data, exif = encoded(8, "PNG"), tiff_of_entries(count, size)
    end = data.index(b"IEND") - 4
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    return data[:end] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + data[end:]
