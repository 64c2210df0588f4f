"""Decides which files are images: by extension or, if that is unknown, by the first bytes.

Everything that Pillow decodes is read. HEIC photographs need the package pillow-heif. All other
files are skipped and counted: see `skipped_line`.
"""

import importlib.util
import os
import stat
from collections.abc import Mapping
from functools import cache


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What Pillow opens, except PostScript and formats that it only identifies (GRIB, HDF5, WMF, …).
IMAGE_ENDINGS = _listed(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .webp .tif .tiff .gif .avif .avifs "
    ".jp2 .j2k .j2c .jpc .jpf .jpx .ppm .pgm .pbm .pnm .pfm .tga .icb .vda .vst .psd .qoi "
    ".ico .icns .cur .dds .pcx .dcx .sgi .rgb .rgba .bw .ras .xbm .xpm .im .msp .pcd .pxr "
    ".blp .ftc .ftu .fli .flc .fit .fits"
)
HEIF_ENDINGS = _listed(".heic .heif .hif .heics .heifs")
VIDEO_ENDINGS = _listed(".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv .flv .3gp .mts .m2ts .ogv")
# Data sets can have hundreds of thousands of these beside the images: they are never opened.
OTHER_ENDINGS = _listed(
    ".txt .csv .tsv .json .jsonl .xml .yaml .yml .npy .npz .mat .pts .pkl .pickle .lnd .bin .db "
    ".md .html .htm .pdf .doc .docx .xls .xlsx .py .ipynb .m .sh .log .ini .cfg .zip .tar .gz .tgz "
    ".7z .rar .h5 .hdf5 .pt .pth .safetensors .onnx .lmdb .mdb .wav .mp3 .eps .ps .svg"
)
# Folders that hold no data, in lower case: metadata of archives and file managers, thumbnails on
# network disks (Synology's; QNAP's name begins with a dot), deleted files.
ASIDE = _listed("__macosx @eadir #recycle $recycle.bin lost+found")
TRIED = 100  # files of an unknown extension to open; if none is an image, all are skipped
HEAD = 32  # bytes at the start of a file that show its type

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")


def ending(name: str) -> str:
    """The extension of a name in lower case: `.jpg` for `a/B.JPG`; "" if there is none."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether the extension of a name is that of an image."""
    return ending(name) in image_endings()


def is_hidden(name: str) -> bool:
    """Whether a file or folder name is not part of the data: `.cache`, `__MACOSX`, `@eaDir`, …"""
    return name.startswith(".") or name.lower() in ASIDE


def image_endings() -> frozenset[str]:
    """The extensions of images that are read; HEIC's are if pillow-heif is installed."""
    return IMAGE_ENDINGS | HEIF_ENDINGS if reads_heif() else IMAGE_ENDINGS


@cache
def reads_heif() -> bool:
    """Whether pillow-heif is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def content(head: bytes) -> str:
    """The type of a file by its first HEAD bytes: "image", "heif", "video", or "" for all else."""
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS:
        # The general brands can stand for any codec; the compatible brands show which one it is.
        general = brand in (b"mif1", b"msf1")
        return "image" if general and any(b in head[16:] for b in AVIF_BRANDS) else "heif"
    if brand in AVIF_BRANDS:
        return "image"
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"8BPS", b"qoif")
    starts += (b"\0\0\0\x0cjP  \r\n", b"\xff\x4f\xff\x51")  # JPEG 2000
    bitmap = head[:2] == b"BM" and head[6:10] == b"\0\0\0\0"
    if head.startswith(starts) or bitmap or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "image"
    videos = (b"\x1aE\xdf\xa3", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"FLV", b"OggS")
    if brand or head.startswith(videos) or (head[:4] == b"RIFF" and head[8:12] == b"AVI "):
        return "video"
    return ""


def begins_like_image(path: str | bytes) -> bool:
    """Whether a file of unknown extension begins like a readable image. Never blocks on a FIFO."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb", buffering=0) as file:
            kind = content(file.read(HEAD))
    except OSError:
        return False
    return kind == "image" or (kind == "heif" and reads_heif())


def skipped_line(skipped: Mapping[str, int]) -> list[str]:
    """The note that counts, by extension, the files that are not images; [] if there are none."""
    if not skipped:
        return []
    most = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    kinds = [f"{n:,} {_named(kind)}" for kind, n in most[:5]]
    more = ", …" if len(most) > 5 else ""
    count, hints = sum(skipped.values()), []
    if any(kind in HEIF_ENDINGS for kind in skipped):
        hints.append("HEIC needs pip install pillow-heif")
    if any(kind in VIDEO_ENDINGS for kind in skipped):
        hints.append("extract the frames of videos first")
    files = f"{count:,} file{'s' * (count > 1)} that cannot be read as images"
    return [f"skipped {files}: {', '.join(kinds)}{more}{''.join(f'; {hint}' for hint in hints)}"]


def _named(kind: str) -> str:
    printed = kind if kind.isprintable() else repr(kind)
    return printed or "without an extension"
