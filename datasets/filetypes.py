"""Which files hold images: by their ending, else by how they begin.

Everything that Pillow decodes is read. HEIC photographs need the package pillow-heif. What is
neither known nor begins like an image is skipped, and counted: see `skipped_line`.
"""

import importlib.util
import os
import stat
from collections.abc import Mapping
from functools import cache


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What Pillow opens, but for formats that it only identifies (GRIB, HDF5, WMF, …) and PostScript.
IMAGE_ENDINGS = _listed(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .webp .tif .tiff .gif .avif .avifs "
    ".jp2 .j2k .j2c .jpc .jpf .jpx .ppm .pgm .pbm .pnm .pfm .tga .icb .vda .vst .psd .qoi "
    ".ico .icns .cur .dds .pcx .dcx .sgi .rgb .rgba .bw .ras .xbm .xpm .im .msp .pcd .pxr "
    ".blp .ftc .ftu .fli .flc .fit .fits"
)
HEIF_ENDINGS = _listed(".heic .heif .hif .heics .heifs")
VIDEO_ENDINGS = _listed(".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv .flv .3gp .mts .m2ts .ogv")
# What lies beside images in data sets by the hundred thousand, and need not be opened to know it.
OTHER_ENDINGS = _listed(
    ".txt .csv .tsv .json .jsonl .xml .yaml .yml .npy .npz .mat .pts .pkl .pickle .lnd .bin .db "
    ".md .html .htm .pdf .doc .docx .xls .xlsx .py .ipynb .m .sh .log .ini .cfg .zip .tar .gz .tgz "
    ".7z .rar .h5 .hdf5 .pt .pth .safetensors .onnx .lmdb .mdb .wav .mp3 .eps .ps .svg"
)
# Folders beside images that hold no data: archives' and file managers' notes, thumbnails of network
# disks (Synology's, QNAP's begins with a point), what was deleted. In any case.
ASIDE = _listed("__macosx @eadir #recycle $recycle.bin lost+found")
TRIED = 100  # files of one unknown ending to look into; none of them an image, the rest are not
HEAD = 32  # bytes

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")


def ending(name: str) -> str:
    """`.jpg` of `a/B.JPG`; "" where there is none."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether a name is an image's by its ending."""
    return ending(name) in image_endings()


def is_hidden(name: str) -> bool:
    """Whether a name in a folder is none of the data: `.cache`, `__MACOSX`, `@eaDir`, …"""
    return name.startswith(".") or name.lower() in ASIDE


def image_endings() -> frozenset[str]:
    """Those that are read; HEIC's where pillow-heif is installed."""
    return IMAGE_ENDINGS | HEIF_ENDINGS if reads_heif() else IMAGE_ENDINGS


@cache
def reads_heif() -> bool:
    """Whether pillow-heif is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def content(head: bytes) -> str:
    """What a file is by its first HEAD bytes: "image", "heif", "video", or "" for anything else."""
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS:
        # The general brands stand for any codec; which one it is, the compatible brands tell.
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
    """Whether a file of unknown ending holds an image that can be read. Never blocks on a FIFO."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb", buffering=0) as file:
            kind = content(file.read(HEAD))
    except OSError:
        return False
    return kind == "image" or (kind == "heif" and reads_heif())


def skipped_line(skipped: Mapping[str, int]) -> list[str]:
    """The line that counts, by ending, the files that are not read as images; [] without any."""
    if not skipped:
        return []
    most = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    kinds = [f"{n:,} {_named(kind)}" for kind, n in most[:5]]
    more = ", …" if len(most) > 5 else ""
    count, hints = sum(skipped.values()), []
    if any(kind in HEIF_ENDINGS for kind in skipped):
        hints.append("HEIC needs pip install pillow-heif")
    if any(kind in VIDEO_ENDINGS for kind in skipped):
        hints.append("of videos, extract the frames first")
    files = f"{count:,} file{'s' * (count > 1)} that cannot be read as images"
    return [f"skipped {files}: {', '.join(kinds)}{more}{''.join(f'; {hint}' for hint in hints)}"]


def _named(kind: str) -> str:
    printed = kind if kind.isprintable() else repr(kind)
    return printed or "without an ending"
