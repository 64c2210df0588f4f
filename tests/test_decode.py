"""Every image file is decoded to upright RGB bytes or raises UnreadableImage."""

import io
import os
import pickle
import struct
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL import __version__ as pillow

from datasets.decode import UnreadableImage, load_rgb
from util.wording import printable


@pytest.fixture
def save(tmp_path):
    """A function that writes an image, an array or bytes to a file; -> its path."""

    def write(name, content, **options):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            im = content if isinstance(content, Image.Image) else Image.fromarray(content)
            im.save(path, **options)
        return path

    return write


def reason_of(path):
    with pytest.raises(UnreadableImage) as e:
        load_rgb(path)
    assert e.value.path == os.fspath(path)
    assert "\n" not in str(e.value)
    assert len(e.value.reason) <= 200
    return e.value.reason


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def encoded(content, format, **options):
    buffer = io.BytesIO()
    Image.fromarray(content).save(buffer, format, **options)
    return buffer.getvalue()


def png(width, height, depth, colour, rows, *chunks):
    """A PNG written by hand, independent of what Pillow can write."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks)]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Readable files


def test_rgb_is_decoded_unchanged_and_writable(save):
    image = noise(5, 7, 3)
    out = load_rgb(save("a.png", image))
    assert out.dtype == np.uint8
    assert out.flags.writeable
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, image)


def test_jpeg_is_close_to_what_was_saved(save):
    image = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    assert abs(load_rgb(save("a.jpg", image)).astype(int) - image).max() <= 3


@pytest.mark.parametrize("quality", [40, 95])
@pytest.mark.parametrize(
    "options", [{"subsampling": k} for k in range(3)] + [{"progressive": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_decoded_exactly_as_by_pillow(save, quality, options, mode):
    path = save(
        "a.jpg", Image.fromarray(noise(37, 53, 3)).convert(mode), quality=quality, **options
    )
    out = load_rgb(path)
    assert out.flags.writeable
    assert out.flags.c_contiguous
    with Image.open(path) as image:
        np.testing.assert_array_equal(out, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("place", ["before the frame", "behind it", "behind the tables"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_exif_is_found_wherever_pillow_finds_it(place, orientation, save):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save("a.jpg", Image.fromarray(noise(16, 24, 3)), exif=exif)
    segments, rest = segments_of(path.read_bytes())
    app1 = next(segment for segment in segments if segment[1] == 0xE1)
    segments.remove(app1)
    frame = next(k for k, segment in enumerate(segments) if segment[1] == 0xC0)
    at = {"before the frame": 0, "behind it": frame + 1, "behind the tables": len(segments)}[place]
    segments.insert(at, app1)
    path.write_bytes(b"\xff\xd8" + b"".join(segments) + rest)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape[:2] == ((24, 16) if orientation == 6 else (16, 24))
    np.testing.assert_array_equal(load_rgb(path), expected)


def segments_of(data):
    """A JPEG's segments before its pixels, and the rest."""
    segments, at = [], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append(data[at:end])
        at = end
    return segments, data[at:]


def test_the_content_of_a_file_decides_not_its_ending(save):
    image = noise(4, 4, 3)
    np.testing.assert_array_equal(load_rgb(save("a.jpg", encoded(image, "PNG"))), image)


def test_bytes_and_strings_and_paths_are_accepted(save):
    path = save("a.png", noise(2, 2, 3))
    for form in (path, os.fspath(path), os.fsencode(path)):
        assert load_rgb(form).shape == (2, 2, 3)


def test_names_that_are_not_valid_text_are_accepted(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\n.png"
    with open(path, "wb") as file:
        file.write(encoded(noise(2, 3, 3), "PNG"))
    assert load_rgb(os.fsdecode(path)).shape == (2, 3, 3)
    with open(path, "wb"):
        pass
    with pytest.raises(UnreadableImage) as e:
        load_rgb(path)
    str(e.value).encode("ascii")  # printable on any terminal
    assert "\n" not in str(e.value)
    assert printable("plain.jpg") == "plain.jpg"


def test_grey_becomes_three_equal_channels(save):
    grey = noise(3, 4)
    np.testing.assert_array_equal(load_rgb(save("a.png", grey)), np.stack([grey] * 3, -1))


def test_one_bit_is_black_and_white(save):
    im = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert load_rgb(save("a.png", im))[..., 0].tolist() == [[0, 255], [255, 0]]


def test_alpha_is_composited_over_white(save):
    rgba = np.array([[(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 51)]], np.uint8)
    expected = [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]]
    assert load_rgb(save("a.png", rgba)).tolist() == expected
    grey = Image.fromarray(np.array([[(9, 255), (9, 0)]], np.uint8), "LA")
    assert load_rgb(save("b.png", grey)).tolist() == [[[9, 9, 9], [255, 255, 255]]]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_transparent_palette_entries_are_white(save, transparency):
    im = Image.new("P", (2, 1))
    im.putpalette([10, 20, 30, 40, 50, 60])
    im.putdata([0, 1])
    plain = load_rgb(save("a.png", im))
    assert plain.tolist() == [[[10, 20, 30], [40, 50, 60]]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = load_rgb(save("b.png", im, transparency=transparency))
    assert out.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_transparent_colour_key_is_white(save):
    rows = b"\0" + bytes([10, 20, 30, 40, 50, 60])
    key = (b"tRNS", struct.pack(">HHH", 40, 50, 60))
    out = load_rgb(save("a.png", png(2, 1, 8, 2, rows, key)))
    assert out.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_cmyk_jpeg_is_not_inverted(save):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    out = load_rgb(save("a.jpg", cmyk, quality=95))
    assert abs(out.astype(int) - (255, 0, 0)).max() <= 4


old = pytest.mark.skipif(int(pillow.split(".")[0]) < 13, reason="a fault of Pillow before 13")


@pytest.mark.parametrize("mode", [pytest.param("YCbCr", marks=old), "LAB"])
def test_other_colour_spaces_are_converted(save, mode):
    inside = {"YCbCr": (76, 85, 255), "LAB": (136, 209, 198)}[mode]  # pure red in each
    out = load_rgb(save("a.tif", Image.new(mode, (2, 2), inside)))
    assert abs(out.astype(int) - (255, 0, 0)).max() <= 6


def test_hsv_is_converted(save, monkeypatch):
    """Uses a fake reader that returns HSV, as Pillow writes no format that keeps it."""
    path = save("a.png", noise(1, 1, 3))
    im = Image.new("HSV", (1, 1), (85, 255, 255))
    monkeypatch.setattr(Image, "open", lambda file: im)
    assert load_rgb(path).tolist() == [[[0, 255, 0]]]


DEEP = np.array([[0, 257 * 100, 257 * 200, 65535]])
BYTES = [0, 100, 200, 255]


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.png", "<u2"), ("a.tif", "<u2"), ("a.tif", ">u2"), ("a.pgm", "<u2")]
)
def test_sixteen_bit_grey_is_scaled_not_clipped(save, name, dtype):
    out = load_rgb(save(name, DEEP.astype(dtype)))
    assert out.shape == (1, 4, 3)
    assert out[0].tolist() == [[v] * 3 for v in BYTES]


def test_sixteen_bit_grey_is_rounded_to_nearest(save):
    out = load_rgb(save("a.png", np.array([[128, 129, 65406, 65407]], np.uint16)))
    assert out[0, :, 0].tolist() == [0, 1, 254, 255]


def test_sixteen_bit_colour_is_scaled(save):
    rows = b"\0" + struct.pack(">6H", 0, 257 * 100, 65535, 257 * 200, 257, 0)
    out = load_rgb(save("a.png", png(2, 1, 16, 2, rows)))
    assert out.tolist() == [[[0, 100, 255], [200, 1, 0]]]


@pytest.mark.parametrize("factor", [1, 257, (2**31 - 1) / 255])
def test_thirty_two_bit_integers_are_scaled_by_the_range_they_need(save, factor):
    image = np.array([[int(v * factor) for v in BYTES]], np.int32)
    assert load_rgb(save("a.tif", image))[0, :, 0].tolist() == BYTES


@pytest.mark.parametrize("factor", [1 / 255, 1, 257])
def test_floats_are_scaled_by_the_range_they_need(save, factor):
    image = np.array([[v * factor for v in BYTES]], np.float32)
    assert load_rgb(save("a.tif", image))[0, :, 0].tolist() == BYTES


def test_float_nan_is_black_and_infinity_the_end_of_the_range(save):
    image = np.array([[np.nan, 0.5, np.inf, -np.inf]], np.float32)
    assert load_rgb(save("a.tif", image))[0, :, 0].tolist() == [0, 128, 255, 0]
    hollow = np.full((1, 2), np.nan, np.float32)
    assert load_rgb(save("b.tif", hollow))[0, :, 0].tolist() == [0, 0]


@pytest.mark.parametrize("format", ["gif", "webp", "tif", "png"])
def test_animation_gives_its_first_frame(save, format):
    frames = [Image.new("RGB", (4, 4), c) for c in [(255, 0, 0), (0, 0, 255), (0, 255, 0)]]
    path = save(f"a.{format}", frames[0], save_all=True, append_images=frames[1:])
    assert abs(load_rgb(path).astype(int) - (255, 0, 0)).max() <= 3


def as_camera_stored(upright, orientation):
    """The (H, W) array a camera stores under an EXIF orientation (EXIF 2.3, tag 0x0112).

    Orientation says which edge of the scene the stored first row and first column show.
    """
    row, column = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    if "right" in (row, column):
        upright = upright[:, ::-1]
    if "bottom" in (row, column):
        upright = upright[::-1]
    return upright.T if row in ("left", "right") else upright


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("name", "dtype"), [("a.png", "u1"), ("a.tif", "u1"), ("b.png", "u2")])
def test_all_eight_exif_orientations_are_undone(save, orientation, name, dtype):
    upright = np.arange(6).reshape(2, 3) * 10
    scale = 257 if dtype == "u2" else 1
    stored = np.ascontiguousarray(as_camera_stored(upright * scale, orientation)).astype(dtype)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert load_rgb(save(name, stored, exif=exif))[..., 0].tolist() == upright.tolist()


def test_rotated_jpeg_is_turned(save):
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored first column is the scene's top
    out = load_rgb(save("a.jpg", wide, exif=exif))
    assert out.shape == (32, 16, 3)
    assert out[:12].min() > 240
    assert out[20:].max() < 15


def test_an_image_with_damaged_exif_is_still_read(save):
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"):
        assert load_rgb(save("a.jpg", noise(8, 8, 3), exif=exif)).shape == (8, 8, 3)


# Unreadable files


def test_empty_file_is_unreadable(save):
    assert "empty" in reason_of(save("a.jpg", b""))


def test_file_of_zero_bytes_is_unreadable(save):
    assert "zero bytes" in reason_of(save("a.jpg", bytes(5000)))


def test_web_page_named_jpg_is_unreadable(save):
    page = b"\n<!DOCTYPE html><html>Quota exceeded</html>"
    assert "web page" in reason_of(save("a.jpg", page))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_truncated_file_is_unreadable(save, format, part):
    data = encoded(noise(64, 64, 3), format)
    reason_of(save("a.jpg", data[: int(len(data) * part)]))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "ICO"])
def test_flipped_bytes_give_an_image_or_unreadable(save, format):
    data, rng = encoded(noise(32, 32, 3), format), np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            damaged = bytearray(data)
            for at in rng.integers(0, min(len(data), 300), 3):
                damaged[at] = rng.integers(256)
            try:
                out = load_rgb(save("a.bin", bytes(damaged)))
            except UnreadableImage:
                continue
            assert out.dtype == np.uint8
            assert out.shape[2] == 3


def test_decompression_bomb_is_unreadable(save):
    bomb = png(30000, 30000, 1, 0, b"")
    assert "bomb" in reason_of(save("a.png", bomb))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_where_pillow_only_warns(save, monkeypatch):
    path = save("a.png", noise(10, 15, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 149)
    assert "more than 149 pixels" in reason_of(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    assert load_rgb(path).shape == (10, 15, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_rgb(path).shape == (10, 15, 3)


def test_image_without_pixels_is_unreadable(save):
    reason_of(save("a.png", png(0, 4, 8, 2, b"\0")))


def test_postscript_is_never_run(save):
    eps = encoded(noise(4, 4, 3), "EPS")
    assert "PostScript" in reason_of(save("a.jpg", eps))


def test_fifo_never_blocks(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    reasons = []
    thread = threading.Thread(
        target=lambda: reasons.append(reason_of(tmp_path / "a.jpg")), daemon=True
    )
    thread.start()
    thread.join(5)
    assert reasons == ["is not a regular file"]


def test_folder_and_dangling_link_and_vanished_file_are_unreadable(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert reason_of(tmp_path / "folder.jpg") == "is a folder"
    assert reason_of(tmp_path / "link.jpg") == "No such file or directory"
    assert reason_of(tmp_path / "gone.jpg") == "No such file or directory"
    assert "symbolic links" in reason_of(tmp_path / "loop.jpg")


@pytest.mark.parametrize(
    "error",
    [SyntaxError("x"), ValueError(), struct.error("x"), zlib.error("x"), MemoryError(), OSError()],
)
def test_any_error_in_a_pillow_plugin_means_unreadable(save, monkeypatch, error):
    path = save("a.png", noise(2, 2, 3))

    def fail(self):
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert reason_of(path)


def test_an_interrupt_is_not_swallowed(save, monkeypatch):
    path = save("a.png", noise(2, 2, 3))

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_rgb(path)


def test_unreadable_image_can_be_pickled():
    e = pickle.loads(pickle.dumps(UnreadableImage("/a/b.jpg", "is empty")))
    assert (e.path, e.reason, str(e)) == ("/a/b.jpg", "is empty", "/a/b.jpg: is empty")


def test_nothing_global_is_changed_and_no_file_stays_open(save):
    from PIL import ImageFile

    good = save("a.jpg", noise(8, 8, 3))
    bad = save("b.jpg", good.read_bytes()[:400])
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    opened = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for _ in range(3):
        load_rgb(good)
        reason_of(bad)
    after = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    assert after == before
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == opened
