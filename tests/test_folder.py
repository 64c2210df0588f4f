"""Which files a `--data_path` contains, and in which order."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from datasets.decode import UnreadableImage
from datasets.folder import ImageFiles, list_images
from util.errors import BadInput


@pytest.fixture
def tree(tmp_path):
    """A function that makes empty files below `data/`; -> `data/`."""

    def make(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "data"

    (tmp_path / "data").mkdir()
    return make


def names(files):
    return [files.relative(i) for i in range(len(files))]


def complaint(*args):
    with pytest.raises(BadInput) as e:
        list_images(*args)
    message = str(e.value)
    assert message.startswith("--data_path")
    assert "\n" not in message
    return message


# Folders


def test_images_are_found_at_any_depth_in_byte_order(tree):
    data = tree("b/c/d/1.jpg", "b/10.png", "b/9.png", "Z.JPG", "a.txt", "é.WebP", "x.jpg.txt")
    files = list_images(data)
    assert names(files) == ["Z.JPG", "b/10.png", "b/9.png", "b/c/d/1.jpg", "é.WebP"]
    assert files[0] == f"{data}/Z.JPG"
    assert files[-1] == f"{data}/é.WebP"
    assert files.root == str(data)
    with pytest.raises(IndexError):
        files[5]


def test_every_image_ending_is_listed_in_any_case(tree):
    kinds = ["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "JPG", "TiFF"]
    assert len(list_images(tree(*(f"a.{k}" for k in kinds)))) == len(kinds)


def test_order_does_not_depend_on_the_file_system(tree, monkeypatch):
    data = tree(*(f"{f}/{i}.jpg" for f in "cab" for i in range(5)))
    (data / "x").symlink_to(data.parent / "out")
    (data / "w").symlink_to(data.parent / "out")
    (data.parent / "out").mkdir()
    (data.parent / "out" / "1.jpg").touch()
    forward, scandir = list_images(data), os.scandir

    class Backward(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", lambda p: Backward(list(scandir(p))[::-1]))
    backward = list_images(data)
    assert names(backward) == names(forward)
    assert backward.digest == forward.digest
    assert "w/1.jpg" in names(forward)


def test_train_folder_is_used_if_it_holds_images(tree):
    files = list_images(tree("train/a/1.jpg", "test/2.jpg", "3.jpg"))
    assert names(files) == ["a/1.jpg"]


def test_train_folder_without_images_is_not_used(tree):
    assert names(list_images(tree("train/readme.txt", "test/2.jpg"))) == ["test/2.jpg"]


def test_hidden_folders_and_those_of_archivers_and_network_disks_are_skipped(tree):
    data = tree("1.jpg", ".2.jpg", "._1.jpg", ".cache/3.jpg", "__MACOSX/4.jpg", "a/.b/5.jpg")
    aside = ["@eaDir", "#recycle", "$RECYCLE.BIN", ".@__thumb", "lost+found", "a/@eaDir/1.jpg"]
    tree(*(f"{name}/6.jpg" for name in aside))
    assert names(list_images(data)) == ["1.jpg"]


def test_linked_folders_are_followed_but_not_loops(tree, tmp_path):
    data = tree("a/1.jpg")
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "2.jpg").touch()
    (tmp_path / "beside.jpg").touch()
    (data / "link").symlink_to(tmp_path / "out")
    (data / "again").symlink_to(data / "a")
    (data / "a" / "self").symlink_to(data)
    (data / "a" / "up").symlink_to(tmp_path)
    (data / "ouroboros").symlink_to(data / "ouroboros")
    (tmp_path / "out" / "back").symlink_to(data)
    assert names(list_images(data)) == ["a/1.jpg", "link/deep/2.jpg"]


def test_linked_images_are_listed_without_a_check(tree):
    data = tree("1.jpg")
    (data / "2.jpg").symlink_to(data / "gone")
    os.mkfifo(data / "3.jpg")
    files = ImageFiles(list_images(data))
    assert names(files.files) == ["1.jpg", "2.jpg", "3.jpg"]
    for i in range(3):
        with pytest.raises(UnreadableImage):
            files.image(i)


def test_names_that_are_not_valid_text_are_kept(tree, tmp_path):
    data = tree("1.jpg")
    odd = [b"\xff\xfe.jpg", b"new\nline.jpg", b" .jpg", "ü☃.jpg".encode()]
    for name in odd:
        Image.new("RGB", (2, 1), (9, 9, 9)).save(tmp_path / "x.png")
        os.replace(tmp_path / "x.png", os.path.join(os.fsencode(data), name))
    files = list_images(data)
    assert [os.fsencode(n) for n in names(files)] == sorted([*odd, b"1.jpg"])
    sizes = [ImageFiles(files).image(i).shape for i in range(5) if names(files)[i] != "1.jpg"]
    assert sizes == [(1, 2, 3)] * 4


def test_digest_depends_on_names_and_order_only(tree, tmp_path):
    data = tree("a/1.jpg", "b.jpg")
    digest = list_images(data).digest
    os.rename(data, tmp_path / "elsewhere")
    assert list_images(tmp_path / "elsewhere").digest == digest
    (tmp_path / "elsewhere" / "c.jpg").touch()
    assert list_images(tmp_path / "elsewhere").digest != digest
    for order in ("x.jpg\ny.jpg\n", "y.jpg\nx.jpg\n"):
        (tmp_path / "x.jpg").touch()
        (tmp_path / "list.txt").write_text(order)
        digest, before = list_images(tmp_path / "list.txt").digest, digest
        assert digest != before


def test_image_files_are_a_source_of_arrays(tree):
    data = tree()
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    Image.fromarray(image).save(data / "a.png")
    files = list_images(data)
    source = pickle.loads(pickle.dumps(ImageFiles(files)))  # as a spawned worker receives it
    assert len(source) == 1
    assert source.name(0) == f"{data}/a.png"
    assert source.digest == files.digest
    np.testing.assert_array_equal(source.image(0), image)


# Lists


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_list_keeps_its_order_and_skips_blanks_and_comments(tree, newline):
    data = tree("b.jpg", "a, b.jpg")
    lines = ["# faces", "", "b.jpg", "  ", f"{data}/a, b.jpg", "b.jpg"]
    (data / "list.txt").write_bytes(newline.join(lines).encode())
    files = list_images(data / "list.txt")
    assert names(files) == ["b.jpg", f"{data}/a, b.jpg", "b.jpg"]
    assert [files[i] for i in range(2)] == [f"{data}/b.jpg", f"{data}/a, b.jpg"]


@pytest.mark.parametrize("bom", ["utf-8-sig", "utf-16"])
def test_list_from_a_spreadsheet_is_read(tree, bom):
    data = tree("é.jpg")
    (data / "list.txt").write_bytes("é.jpg\n".encode(bom))
    assert names(list_images(data / "list.txt")) == ["é.jpg"]


def test_names_in_a_list_that_are_not_valid_text_are_kept(tree):
    data = tree("a.jpg")
    (data / "list.txt").write_bytes(b"a.jpg\n\xff.jpg\n")
    assert os.fsencode(list_images(data / "list.txt")[1]) == os.fsencode(data) + b"/\xff.jpg"


@pytest.mark.parametrize(
    "text",
    [
        "label,Path\n3,a.jpg\n4,b/c.jpg\n",
        "subDirectory_filePath,face_x,expression\na.jpg,1,2\n\nb/c.jpg,1,2\n",
        "a.jpg,1\nb/c.jpg,2\n",
        "name,label\na.jpg,1\nb/c.jpg,2\n",
        'id;image\r\n1;"a.jpg"\r\n2;b/c.jpg\r\n',
        "image_path\na.jpg\nb/c.jpg\n",
    ],
)
def test_the_column_of_paths_in_a_csv_is_found(tree, text):
    data = tree("a.jpg")
    (data / "list.csv").write_bytes(text.encode())
    assert names(list_images(data / "list.csv")) == ["a.jpg", "b/c.jpg"]


def test_quotes_in_a_csv_are_parsed(tree):
    data = tree("a, b.jpg", "new\nline.jpg", 'say "x".jpg')
    (data / "l.csv").write_text('file,y\n"a, b.jpg",1\n"new\nline.jpg",2\n"say ""x"".jpg",3\n')
    files = list_images(data / "l.csv")
    assert names(files) == ["a, b.jpg", "new\nline.jpg", 'say "x".jpg']
    assert all(os.path.exists(files[i]) for i in range(3))


# Errors


def test_for_a_missing_path_the_nearest_parent_is_named(tree):
    data = tree("a/1.jpg")
    message = complaint(data / "a" / "b" / "c")
    assert f"{data}/a/b/c" in message
    assert f"{data}/a does, but has no b" in message


def test_a_dangling_link_an_empty_path_and_a_fifo_are_refused(tree):
    data = tree()
    (data / "link").symlink_to(data / "gone")
    os.mkfifo(data / "fifo")
    assert f"link to {data}/gone" in complaint(data / "link")
    assert "neither" in complaint(data / "fifo")
    assert "empty" in complaint("")


def test_for_a_folder_without_images_its_other_files_are_named(tree):
    others = ["1.npy", "2.npy", "3.npy", "a/1.json", "a/2.json", "x.csv", "x.csv.gz", "y.gz"]
    message = complaint(tree(*others, "README"))
    assert "9 other files" in message
    assert "mostly 3 .npy, 2 .gz, 2 .json;" in message
    assert "jpg, jpeg, png" in message


def test_an_empty_folder_is_refused(tree):
    assert "no images" in complaint(tree())


@pytest.mark.parametrize("locked", ["", "/sub"])
def test_unreadable_folder_is_named(tree, monkeypatch, locked):
    data, scandir = tree("1.jpg", "sub/2.jpg"), os.scandir

    def refuse(path):  # without mode bits, as root may read everything
        if path.rstrip(b"/") == os.fsencode(f"{data}{locked}"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"cannot read {data}{locked}" in complaint(data).replace("/ (", " (")


def test_a_list_without_entries_is_refused(tree):
    data = tree()
    for name, text in [("a.txt", "\n# none\n"), ("b.csv", "path,label\n"), ("c.txt", "")]:
        (data / name).write_text(text)
        assert "without entries" in complaint(data / name)


def test_for_a_list_of_missing_files_the_first_is_named(tree):
    data = tree("a/1.jpg")
    (data / "list.txt").write_text("x/1.jpg\nx/2.jpg\n")
    message = complaint(data / "list.txt")
    assert "none of its 2 entries" in message
    assert f"the first, in row 1, was looked for in {data}; paths are relative to" in message
    (data / "list.txt").write_text("x/1.jpg\na/1.jpg\n")
    assert len(list_images(data / "list.txt")) == 2


def test_an_image_or_binary_file_is_refused_as_a_list(tree):
    data = tree("1.JPG")
    (data / "archive.zip").write_bytes(b"PK\3\4\0\0\0")
    assert "single image" in complaint(data / "1.JPG")
    assert "binary file" in complaint(data / "archive.zip")
