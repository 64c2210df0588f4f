"""Decodes image files and open images to upright RGB arrays, or gives a reason why it cannot.

Everything that Pillow decodes comes out as (H, W, 3) uint8. Everything that can go wrong is raised
as `UnreadableImage`, so that callers handle a single exception. Pillow's global settings and the
warning filters stay unchanged, because other threads share them.
"""

import os
import stat
from contextlib import suppress

import numpy as np
from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg

from datasets.filetypes import HEAD, content, reads_heif
from datasets.limits import BOMB, LimitedBytes, Refused, check_exif, check_jpeg
from datasets.reading import begin_reading, end_reading
from util.errors import BadInput
from util.files import RETRY_AFTER, retrying
from util.wording import printable

ORIENTATION = 0x0112  # EXIF tag; UNDO maps its values 2..8 to what undoes each
UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
TILE_WIDTH, TILE_HEIGHT = 322, 323

# After this many files for which retrying did not help, a process no longer retries, so that files
# that are gone do not slow down every epoch.
MOST_IN_VAIN = 100
_in_vain = 0


class UnreadableImage(Exception):
    """A file that is not a usable image: its `.path` and a short `.reason`. Can be pickled.

    `.of_disk` is true if the file system refused the read, so that the content is unknown.
    """

    def __init__(self, path: str, reason: str, of_disk: bool = False) -> None:
        super().__init__(path, reason, of_disk)  # pickle rebuilds the exception from `args`
        self.path, self.reason, self.of_disk = path, reason, of_disk

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


def load_rgb(path: str | bytes | os.PathLike) -> np.ndarray:
    """Decode the first frame of an image file -> (H, W, 3) uint8, EXIF-rotated, alpha over white.

    The array is new and writable. Whatever is wrong with the file, raises UnreadableImage and
    nothing else. Never blocks on a FIFO or a device.
    """
    of_disk = False
    begin_reading(path)
    try:
        data = _read_patiently(path)
        if size := _plain_jpeg(data):
            _check_size(*size)
            with suppress(ValueError):  # a damaged file: Pillow gives the reason below
                return decode_jpeg(data)  # the same pixels as Pillow's, but faster
        check_jpeg(data)
        kind = content(bytes(data[:HEAD]))
        if kind == "heif":
            return _to_rgb(_open_heif(data))
        if kind == "video":
            raise Refused("is a video; extract its frames and give those")
        with Image.open(LimitedBytes(data)) as im:
            _check_header(im)
            if im.format == "JPEG" and im.mode in ("RGB", "L") and _turn(im) is None:
                with suppress(ValueError):
                    return decode_jpeg(data)
            im.load()
            return _to_rgb(_upright(im))
    except Refused as e:
        reason = str(e)
    except UnidentifiedImageError:
        reason = _unidentified(data)
    except Image.DecompressionBombError:
        reason = _too_many_pixels()
    except OSError as e:  # errors of the file system have a strerror, Pillow's own do not
        of_disk = bool(e.strerror)
        reason = e.strerror or str(e) or "cannot be read"
    except Exception as e:  # plugins let SyntaxError, struct.error, MemoryError, … escape
        reason = f"cannot be decoded ({type(e).__name__})"  # its text may quote the file
    finally:
        end_reading()
    # Outside the handlers: a chained traceback would keep the half-decoded image alive.
    raise UnreadableImage(os.fsdecode(path), " ".join(reason.split())[:200], of_disk)


def rgb_of(picture: Image.Image | np.ndarray) -> np.ndarray:
    """An image that Pillow has opened, or pixels -> (H, W, 3) uint8, as `load_rgb` returns a file.

    Pixels are uint8: RGB or RGBA, (H, W, 3 or 4), or grey, (H, W). Raises BadInput for anything
    else, UnreadableImage if Pillow cannot decode the image.
    """
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2:] if picture.ndim > 1 else None
        if picture.dtype != np.uint8 or not picture.size or channels not in ((), (3,), (4,)):
            raise BadInput(
                f"a picture of shape {picture.shape} and type {picture.dtype}: give uint8 values "
                "from 0 to 255 of shape (height, width, 3), RGB"
            )
        if channels == (3,):
            return np.ascontiguousarray(picture)
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise BadInput(
            f"a picture of type {type(picture).__name__}: give a path, a PIL image or a NumPy array"
        )
    try:
        _check_header(picture)
        picture.load()
        return _to_rgb(_upright(picture))
    except Refused as e:
        reason = str(e)
    except Exception as e:  # see `load_rgb`
        reason = f"cannot be decoded ({type(e).__name__})"
    raise UnreadableImage(str(getattr(picture, "filename", "")), reason)


def _read_patiently(path: str | bytes | os.PathLike) -> bytearray:
    """Read a file's bytes, retrying after the pauses of RETRY_AFTER if the file system fails."""
    global _in_vain
    try:
        return retrying(lambda: _read(path), RETRY_AFTER if _in_vain < MOST_IN_VAIN else ())
    except OSError:
        _in_vain += 1
        raise


def _read(path: str | bytes | os.PathLike) -> bytearray:
    """Read a file's bytes. Refuses empty files and all but regular ones before opening them."""
    st = os.stat(path)
    if stat.S_ISDIR(st.st_mode):
        raise Refused("is a folder")
    if not stat.S_ISREG(st.st_mode):
        raise Refused("is not a regular file")
    if st.st_size == 0:
        raise Refused("is empty (0 bytes)")
    data = bytearray(st.st_size)
    with open(path, "rb", buffering=0) as file:
        del data[file.readinto(data) :]
    return data


def _plain_jpeg(data: bytearray) -> tuple[int, int] | None:
    """Width and height of an 8-bit colour or grey JPEG without EXIF data; None for all other files.

    Pillow finds these, too, but that takes a tenth as long as the rest of reading. Like Pillow,
    this looks at all segments before the pixels, as EXIF data may follow the frame header.
    Raises Refused for too many scans.
    """
    size, frame, at = None, 0, 2 if data.startswith(b"\xff\xd8") else len(data)
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xC0, 0xC1, 0xC2):  # frame header: bit depth, height, width, channels
            if data[at + 4] != 8 or data[at + 9] not in (1, 3):
                return None
            height, width = (int.from_bytes(data[at + k : at + k + 2], "big") for k in (5, 7))
            size, frame = (width, height), at
        elif marker == 0xE1:  # EXIF data: the image may have to be rotated
            return None
        elif marker == 0xDA:  # start of the pixels
            if data[frame + 1] == 0xC2 or data[at + 4] != data[frame + 9]:  # not a single scan
                check_jpeg(data)
            return size
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _open_heif(data: bytearray) -> Image.Image:
    """Decode a HEIC photograph, upright. Pillow has no plugin for it, so pillow-heif is called."""
    if not reads_heif():
        raise Refused("is a HEIC image: pip install pillow-heif to read it")
    from pillow_heif import open_heif

    heif = open_heif(bytes(data))
    _check_size(*heif.size)
    return heif.to_pillow()


def _check_header(im: Image.Image) -> None:
    """Refuse an image whose header shows no pixels, too many, or a program to be executed."""
    _check_size(*im.size)
    tags = getattr(im, "tag_v2", {})
    if TILE_WIDTH in tags:  # each tile is decoded whole, however small the image
        _check_size(tags[TILE_WIDTH], tags.get(TILE_HEIGHT, 1))
    if im.format == "EPS":  # Pillow would run Ghostscript on it
        raise Refused("is a PostScript program, not an image")


def _check_size(width: int, height: int) -> None:
    """Refuse an image without pixels, or with too many."""
    if width <= 0 or height <= 0:
        raise Refused(f"has no pixels ({width} × {height})")
    # Pillow itself only warns between the limit and twice the limit.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise Refused(_too_many_pixels())


def _too_many_pixels() -> str:
    return f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels {BOMB}"


def _unidentified(data: bytearray) -> str:
    """The reason for a file that no plugin recognises; often a web page.

    Quotes no part of it: a list from elsewhere may name any file of this machine.
    """
    head = bytes(data[:512])
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "is a web page, not an image"
    if not head.strip(b"\0"):
        return "holds only zero bytes"
    return "is not an image, or a damaged one"


def _upright(im: Image.Image) -> Image.Image:
    """Undo the camera's rotation; for TIFFs, Pillow has already done so while loading.

    Does not use `ImageOps.exif_transpose`, which also rewrites the EXIF data (and fails if these
    are damaged elsewhere) and copies images that need no rotation.
    """
    method = _turn(im)
    return im if method is None else im.transpose(method)


def _turn(im: Image.Image) -> Image.Transpose | None:
    """The transpose that undoes the rotation given in the EXIF data; None if there is none."""
    check_exif(len(im.info.get("exif") or im.info.get("Raw profile type exif") or b""))
    try:
        return UNDO.get(im.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block does not mean that the pixels are bad
        return None


def _to_rgb(im: Image.Image) -> np.ndarray:
    """Convert a loaded image of any mode -> (H, W, 3) uint8."""
    if im.mode in SIXTEEN_BIT or im.mode in ("I", "F"):
        grey = _grey_to_bytes(im)
        return np.repeat(grey[..., None], 3, axis=2)
    if im.mode == "La":  # premultiplied alpha; Pillow only converts it to LA
        im = im.convert("LA")
    if im.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in im.info:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    # `np.array` of an RGB image costs no more than a read-only `asarray`; `convert` would copy.
    return np.array(im if im.mode == "RGB" else im.convert("RGB"))


def _grey_to_bytes(im: Image.Image) -> np.ndarray:
    """Scale a grey image of more than 8 bits -> (H, W) uint8; Pillow itself would clip it."""
    tags = getattr(im, "tag_v2", {})
    bits, white_is_zero = tags.get(BITS_PER_SAMPLE), tags.get(PHOTOMETRIC) == 0
    values = np.asarray(im)
    if im.mode == "F":
        values = _from_unknown_range(values)
    elif im.mode == "I" and bits == (32,):
        if tags.get(SAMPLE_FORMAT, (1,)) == (1,):  # Pillow's "I" is signed, these values are not
            values = values.view(np.uint32)
        values = _from_unknown_range(values)
    elif bits == (12,):
        values = values * (255 / 4095)
    else:
        values = values / 257
    grey = np.rint(values).clip(0, 255).astype(np.uint8)
    return 255 - grey if white_is_zero else grey


def _from_unknown_range(values: np.ndarray) -> np.ndarray:
    """Scale (H, W) floats or 32-bit integers to 0..255, from the smallest usual range they fit.

    That is [0, 1] (floats only), 8 bits, 16 bits or 32 bits (integers only). NaN becomes 0,
    infinities become the ends of the range.
    """
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        top = values.max(where=finite, initial=0)
        values = np.nan_to_num(values.astype(np.float64), nan=0, posinf=1e300, neginf=0)
        if top <= 1.001:  # conversions overshoot 1 by a rounding error
            return values * 255
        return values if top <= 255 else values / 257
    top = values.max()
    if top <= 255:
        return values
    return values / (257 if top <= 65535 else np.iinfo(values.dtype).max / 255)
