"""All image files in a folder are read, whatever their ending, and other files are counted."""

import io
import os

import numpy as np
import pytest
from PIL import Image, features

from datasets import filetypes, open_images, open_labelled
from datasets.decode import UnreadableImage, load_rgb
from datasets.faces.pictures import list_pictures
from datasets.folder import list_images

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
# File endings and formats that Pillow can write.
WRITTEN = {
    **{f".{kind}": "JPEG" for kind in ("jpg", "jpeg", "jpe", "jfif", "JPG", "Jfif")},
    **{".png": "PNG", ".apng": "PNG", ".gif": "GIF", ".bmp": "BMP", ".dib": "DIB"},
    **{".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pnm": "PPM"},
    **{".tga": "TGA", ".pcx": "PCX", ".sgi": "SGI", ".im": "IM", ".dds": "DDS"},
    **{".jp2": "JPEG2000", ".avif": "AVIF"},
}
PNG, JPEG = b"\x89PNG\r\n\x1a\n" + bytes(40), b"\xff\xd8\xff\xe0" + bytes(40)
HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(40)
MP4 = b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41" + bytes(40)


def encoded(kind):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    return buffer.getvalue()


def names(files):
    return [files.relative(i) for i in range(len(files))]


@pytest.fixture
def folder(tmp_path):
    """A function that writes files with these contents; -> their folder."""

    def make(**contents):
        for name, content in contents.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / "data"

    return lambda contents: make(**contents)


@pytest.fixture
def without_heif(monkeypatch):
    """As if pillow-heif were not installed."""
    for module in ("filetypes", "decode"):
        monkeypatch.setattr(f"datasets.{module}.reads_heif", lambda: False)


@pytest.mark.parametrize("ending", WRITTEN)
def test_every_format_that_pillow_decodes_is_found_and_read(ending, folder):
    if ending == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    data = folder({f"face{ending}": encoded(WRITTEN[ending]), "more/notes.txt": b"text"})
    files = list_images(data)
    assert names(files) == [f"face{ending}"]
    assert files.skipped == {".txt": 1}
    assert load_rgb(files[0]).shape == PIXELS.shape
    assert list_pictures([str(data)]).paths == [f"{data}/face{ending}"]


def test_files_with_an_unknown_or_no_ending_are_recognised_by_their_first_bytes(folder):
    data = folder(
        {
            "0001": encoded("JPEG"),
            "b/0002": encoded("PNG"),
            "c.face": encoded("WEBP"),
            "d.face": b"not an image",
            "README": b"not an image",
            "empty": b"",
            "e.txt": encoded("PNG"),  # a file that is called a text is not read
        }
    )
    os.mkfifo(data / "pipe")  # must not block
    (data / "gone").symlink_to(data / "nowhere")
    files = list_images(data)
    assert names(files) == ["0001", "b/0002", "c.face"]
    assert files.skipped == {".face": 1, "": 4, ".txt": 1}
    assert [load_rgb(files[i]).shape for i in range(3)] == [PIXELS.shape] * 3


def test_only_some_of_many_other_files_are_opened(folder, monkeypatch):
    data = folder({"a.jpg": JPEG, **{f"{k:03}.marks": b"1 2" for k in range(300)}})
    looked, begins = [], filetypes.begins_like_image
    monkeypatch.setattr(
        "datasets.folder.begins_like_image", lambda path: looked.append(path) or begins(path)
    )
    assert list_images(data).skipped == {".marks": 300}
    assert len(looked) == filetypes.TRIED
    for k in range(150, 300):  # if some are images, wherever in the folder, every file is checked
        (data / f"{k:03}.marks").write_bytes(PNG)
    assert len(list_images(data)) == 151


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (PNG, "image"),
        (JPEG, "image"),
        (HEIC, "heif"),
        (HEIC.replace(b"ftypheic", b"ftypmif1"), "heif"),
        (HEIC.replace(b"ftypheic", b"ftypavif"), "image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "image"),
        (MP4, "video"),
        (MP4.replace(b"isom", b"qt  "), "video"),
        (b"RIFF\x10\0\0\0AVI LIST", "video"),
        (b"RIFF\x10\0\0\0WAVEfmt ", ""),
        (b"\x1aE\xdf\xa3" + bytes(40), "video"),
        (b"BMW is a car", ""),
        (b"%PDF-1.7", ""),
        (b"", ""),
    ],
)
def test_the_first_bytes_determine_the_kind_of_file(head, kind):
    assert filetypes.content(head[: filetypes.HEAD]) == kind


# HEIC and videos


@pytest.fixture
def heic(tmp_path):
    """A photograph like those of phones: HEVC, with an orientation in its EXIF data."""
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.fromarray(np.repeat(np.repeat(PIXELS[:6, :8], 8, 0), 8, 1))
    path = tmp_path / "photo.heic"
    pillow_heif.from_pillow(image).save(path, quality=95)
    return path, np.asarray(image)


def test_heic_is_read_with_pillow_heif(heic):
    path, pixels = heic
    image = load_rgb(path)
    assert image.shape == pixels.shape
    assert np.abs(image.astype(int) - pixels).mean() < 12
    assert names(list_images(path.parent)) == ["photo.heic"]


def test_without_pillow_heif_heic_files_are_counted_and_the_package_named(folder, without_heif):
    data = folder({"a.jpg": JPEG, "b.heic": HEIC, "c.HEIF": HEIC, "d.mp4": MP4})
    files = list_images(data)
    assert names(files) == ["a.jpg"]
    (line,) = filetypes.skipped_line(files.skipped)
    assert "3 files that cannot be read as images: 1 .heic, 1 .heif, 1 .mp4" in line
    assert "pip install pillow-heif" in line
    assert "extract the frames" in line
    with pytest.raises(UnreadableImage, match="pip install pillow-heif"):
        load_rgb(data / "b.heic")


def test_a_video_given_by_name_is_reported_as_a_video(folder):
    data = folder({"a.mp4": MP4, "b.jpg": MP4, "c.mkv": b"\x1aE\xdf\xa3" + bytes(40)})
    for name in ("a.mp4", "b.jpg", "c.mkv"):
        with pytest.raises(UnreadableImage, match="is a video; extract its frames"):
            load_rgb(data / name)


# Skipped files are reported


MIXED = {"a.jfif": encoded("JPEG"), "b.gif": encoded("GIF"), "c.txt": b"", "d.mp4": MP4}


def test_skipped_files_are_reported_for_images_without_labels(folder):
    images = open_images(str(folder(MIXED)))
    assert len(images.source) == 2
    (line,) = images.notes
    assert line.startswith("skipped 2 files that cannot be read as images: 1 .mp4, 1 .txt")


def test_skipped_files_are_reported_for_class_folders(folder):
    data = folder({f"{name}/{file}": c for name in ("happy", "sad") for file, c in MIXED.items()})
    labelled = open_labelled(str(data))
    assert len(labelled.splits["all"]) == 4
    assert any("skipped 4 files" in note for note in labelled.notes)


def test_nested_folders_are_counted_once(folder):
    data = folder({"a.jpg": JPEG, "sub/b.jpg": JPEG, "sub/c.txt": b""})
    listed = list_pictures([str(data / "sub"), str(data), str(data / "sub" / "b.jpg")])
    assert [os.path.relpath(path, data) for path in listed.paths] == ["sub/b.jpg", "a.jpg"]
    assert listed.skipped == {".txt": 1}
