"""Small files that would decode for minutes or take gigabytes are unreadable, within seconds."""

import io
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

import bombs
from datasets import limits
from datasets.decode import UnreadableImage, load_rgb
from datasets.limits import MOST_SCANS
from odd_images import encoded, noise

COMMENT = b"\xff\xfe\0\6\xff\xd9\xff\xd9"  # holds what ends a JPEG elsewhere
THUMBNAIL = b"\xff\xe1\0\x0eExif\0\0\xff\xd8\xff\xda\xff\xd9"
BOMBS = {
    "scans": (lambda: bombs.jpeg_of_scans(3000, 6000), "is a JPEG of 6,001 scans"),
    "scans behind a comment": (lambda: bombs.jpeg_of_scans(3000, 6000, COMMENT), "6,001 scans"),
    "scans behind EXIF data": (lambda: bombs.jpeg_of_scans(3000, 6000, THUMBNAIL), "6,001 scans"),
    "JPEG's EXIF entries": (lambda: bombs.jpeg_of_exif(4000, 500_000), "bytes of EXIF data"),
    "PNG's EXIF entries": (lambda: bombs.png_of_exif(4000, 500_000), "bytes of EXIF data"),
    "TIFF entries": (lambda: bombs.tiff_of_entries(4000, 500_000), "the same bytes again"),
    "TIFF tile": (lambda: bombs.tiff_of_a_tile(20_000), "more than 89,478,485 pixels"),
    "GIF comments": (lambda: bombs.gif_of_comments(600_000), "takes more than 0.5 s to read"),
}


@pytest.fixture
def save(tmp_path):
    def write(content):
        (tmp_path / "a.jpg").write_bytes(content)
        return tmp_path / "a.jpg"

    return write


def refused(path):
    with pytest.raises(UnreadableImage) as error:
        load_rgb(path)
    return error.value.reason


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_unreadable_within_seconds(name, save, monkeypatch):
    make, reason = BOMBS[name]
    # What has another reason must be refused for that, also on a slow or busy processor.
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.5 if "0.5 s" in reason else 8)
    content = make()
    assert len(content) < 4e6
    path, began = save(content), time.thread_time()
    assert reason in refused(path)
    assert "a decompression bomb?" in refused(path)
    assert time.thread_time() - began < 10


def test_reading_is_limited_in_threads_too(save, monkeypatch):
    """As on the web page, where there are no signals."""
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.2)
    path, reasons = save(bombs.gif_of_comments(300_000)), []
    thread = threading.Thread(target=lambda: reasons.append(refused(path)))
    thread.start()
    thread.join()
    assert "takes more than 0.2 s" in reasons[0]


def test_the_time_limit_does_not_count_while_a_process_is_stopped(save, monkeypatch):
    """Nor while others use the processor: only time spent on this file."""
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.2)
    check = limits.LimitedBytes._check

    def slowly(self):
        time.sleep(0.25)
        check(self)

    monkeypatch.setattr(limits.LimitedBytes, "_check", slowly)
    assert load_rgb(save(encoded(noise(300, 300, 3), "TIFF"))).shape == (300, 300, 3)


@pytest.mark.parametrize("before", [b"", COMMENT, THUMBNAIL])
def test_a_jpeg_of_many_scans_is_read_up_to_the_limit(before, save):
    content = bombs.jpeg_of_scans(64, MOST_SCANS - 1, before)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(load_rgb(save(content)), expected)
    assert refused(save(bombs.jpeg_of_scans(64, MOST_SCANS, before))).startswith("is a JPEG of 101")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0MM\0*\0\0\0\x08" + bytes(6)])
def test_what_follows_a_jpeg_does_not_count(progressive, exif, save):
    """Phones append a video, whose bytes look like anything."""
    photo = encoded(noise(64, 64, 3), progressive=progressive, exif=exif)
    plain = load_rgb(save(photo))
    np.testing.assert_array_equal(load_rgb(save(photo + b"\xff\xda" * 10**6)), plain)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_many_frames_the_first_is_read(format, save):
    frames = [Image.new("RGB", (8, 8), (k % 256, 255 - k % 256, k // 256)) for k in range(300)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], lossless=True)
    began = time.thread_time()
    np.testing.assert_array_equal(load_rgb(save(buffer.getvalue())), np.asarray(frames[0]))
    assert time.thread_time() - began < 0.5


def test_other_files_are_read_as_often_as_it_takes(save):
    """A PNG of 20,000 pieces: a limit on the number of reads would refuse it."""
    image = noise(64, 64, 3)
    data = encoded(image, "PNG")
    at = data.index(b"IDAT") - 4
    empty = bytes(4) + b"teSt" + zlib.crc32(b"teSt").to_bytes(4, "big")
    np.testing.assert_array_equal(load_rgb(save(data[:at] + empty * 20_000 + data[at:])), image)
