"""AffectNet is read as its owners ship it; errors name the file and the row."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from datasets import open_labelled
from datasets.annotation_files import csv_rows, files_exist
from datasets.fer.affectnet import DEFAULT_MARGIN, read, recognise
from datasets.labelled import describe_labelled
from datasets.labels import EXPRESSIONS
from layouts_affectnet import (
    HEADER,
    WHOLE_FACE,
    draw,
    write_affectnet_csv,
    write_affectnet_npy,
    write_affectnet_plus,
)
from util.errors import BadInput

COUNTS = {"train": (2, 3, 1, 2, 1, 1, 2, 3), "test": (1,) * 8}
WRITERS = {
    "2017 CSV lists": write_affectnet_csv,
    "npy annotations": write_affectnet_npy,
    "AffectNet+ JSON": write_affectnet_plus,
}


def complaint(root, **options):
    with pytest.raises(BadInput) as e:
        read(root, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def assert_shows(images, faces):
    """The images are these synthetic faces with their labels, in this order."""
    assert images.labels.tolist() == [label for label, _ in faces]
    for i, (_, face) in enumerate(faces):
        image = images.source.image(i)
        assert image.shape == face.shape
        assert np.abs(image.astype(int) - face).mean() < 6  # JPEG; another face differs by 30


# Whole layouts


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("nested", ["", "AffectNet"])
def test_every_layout_gives_its_faces_with_their_labels_in_order(tmp_path, kind, nested):
    WRITERS[kind](tmp_path / nested, COUNTS)
    assert [text.split(" in ")[0] for text in recognise(tmp_path)] == [kind]
    data = read(tmp_path, margin=WHOLE_FACE)
    assert (data.name, data.classes) == ("affectnet", EXPRESSIONS)
    assert data.title.startswith(f"AffectNet-8 ({kind}, ")
    assert list(data.splits) == ["train", "test"]
    for split, images in data.splits.items():
        assert tuple(images.counts(8)) == COUNTS[split]
        assert_shows(images, draw(split, COUNTS[split]))
    names = [s.source.name(i) for s in data.splits.values() for i in range(len(s))]
    assert len(set(names)) == sum(map(sum, COUNTS.values()))
    assert all(os.path.isabs(name) and os.path.isfile(name) for name in names)


@pytest.mark.parametrize("kind", WRITERS)
def test_seven_classes_leave_contempt_out(tmp_path, kind):
    WRITERS[kind](tmp_path, COUNTS)
    data = read(tmp_path, nb_classes=7, margin=WHOLE_FACE)
    assert data.classes == EXPRESSIONS[:7]
    faces = [pair for pair in draw("train", COUNTS["train"]) if pair[0] < 7]
    assert_shows(data.splits["train"], faces)
    assert any("left out 3 Contempt" in note for note in data.notes)
    assert data.published == {"train": 283_901, "test": (500,) * 7}


@pytest.mark.parametrize("kind", WRITERS)
def test_one_split_alone_is_read(tmp_path, kind):
    WRITERS[kind](tmp_path, {"test": (1, 1)})
    assert {s: len(images) for s, images in read(tmp_path).splits.items()} == {"test": 2}


@pytest.mark.parametrize(
    ("lists", "images"),
    [("file_lists", "Manually_Annotated_Images"), ("", ""), ("", "Manually_Annotated_compressed")],
)
def test_lists_and_photographs_are_found_where_people_put_them(tmp_path, lists, images):
    write_affectnet_csv(tmp_path, {"train": (1, 1), "test": (1,)}, lists, images)
    assert recognise(tmp_path) == ["2017 CSV lists"]
    data = read(tmp_path)
    assert data.splits["train"].source.name(0).startswith(f"{tmp_path / images}/")
    assert len(data.splits["test"]) == 1


def test_a_data_sets_counts_are_shown_beside_the_published_ones(tmp_path):
    write_affectnet_npy(tmp_path, COUNTS)
    lines = describe_labelled(read(tmp_path))
    assert lines[1].startswith("  train: 15 images (Neutral 2, Happy 3, ")
    assert lines[1].endswith("published: 287,651")
    assert "published: 4,000 (500, 500," in lines[2]
    assert "validation" in lines[-1]


def test_splits_can_be_pickled_and_have_different_digests(tmp_path):
    write_affectnet_npy(tmp_path, {"train": (1, 1), "test": (1, 1)})
    splits = read(tmp_path).splits
    again = pickle.loads(pickle.dumps(splits["train"]))
    np.testing.assert_array_equal(again.source.image(1), splits["train"].source.image(1))
    assert splits["train"].source.digest != splits["test"].source.digest


# 2017 lists row by row


@pytest.fixture
def listed(tmp_path):
    """Write a training list with these rows, and the images they name: black, 40 × 40 pixels."""

    def write(*rows, header=HEADER, skip=()):
        for name in {row.split(",")[0] for row in rows} - {"", *skip}:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (40, 40)).save(tmp_path / name)
        (tmp_path / "training.csv").write_text("\n".join([*([header] if header else []), *rows]))
        return tmp_path

    return write


def row(name, expression=1, box="5,6,20,10"):
    return f"{name},{box},,{expression},0,0"


def test_the_face_box_with_its_margin_is_cropped(listed):
    top = listed(row("1/a.png", box="12,16,10,20"))
    painted = np.zeros((40, 40, 3), np.uint8)
    painted[..., 0], painted[..., 1] = np.arange(40)[:, None], np.arange(40)  # row, column
    Image.fromarray(painted).save(top / "1/a.png")
    crop = read(top, margin=0.1).splits["train"].source.image(0)
    # A square of 20 × 1.2 around (17, 26).
    assert crop[0, 0].tolist() == [14, 5, 0]
    assert crop[-1, -1].tolist() == [37, 28, 0]
    wider = read(top, margin=0.5).splits["train"].source.image(0)  # extends beyond the picture
    assert (wider[0, 0].tolist(), wider[-1, -1].tolist()) == ([6, 0, 0], [39, 36, 0])


def test_the_margin_changes_title_and_digest(listed):
    top = listed(row("1/a.png"))
    default, wide = read(top), read(top, margin=0.4)
    assert f"cropped with margin {DEFAULT_MARGIN}" in default.title
    assert "cropped with margin 0.4" in wide.title
    assert default.splits["train"].digest != wide.splits["train"].digest
    assert read(top, margin=DEFAULT_MARGIN).splits["train"].digest == default.splits["train"].digest


@pytest.mark.parametrize("header", [None, HEADER, HEADER.upper(), "\ufeff" + HEADER])
def test_a_header_is_recognised_in_any_case(listed, header):
    top = listed(row("2/b.png", 3), row("1/a.JPG", 0), header=header)
    train = read(top).splits["train"]
    assert train.labels.tolist() == [3, 0]
    assert [os.path.basename(train.source.name(i)) for i in range(2)] == ["b.png", "a.JPG"]


def test_columns_are_found_by_name_in_any_order(listed):
    header = "subDirectory_filePath,Expression,face_height,face_width,face_y,face_x,x"
    train = read(listed("1/a.png,4,4,3,2,1,9", header=header)).splits["train"]
    assert train.labels.tolist() == [4]
    assert train.source.boxes.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("missing", ["expression", "face_width", "subDirectory_filePath"])
def test_missing_column_is_named(listed, missing):
    header = HEADER.replace(missing, "other")
    message = complaint(listed(row("1/a.png"), header=header))
    assert "training.csv, row 1: no column" in message
    assert missing in message


@pytest.mark.parametrize("label", ["11", "-1", "nan", "", "1.5", "inf", "Happy"])
def test_an_unknown_label_is_named_with_its_row(listed, label):
    message = complaint(listed(row("1/a.png"), row("1/b.png", label)))
    assert f"{os.sep}training.csv, row 3: its expression must be an id" in message


def test_a_label_written_as_a_float_is_read(listed):
    assert read(listed(row("1/a.png", "3.0"))).splits["train"].labels.tolist() == [3]


@pytest.mark.parametrize("bad", ["1/b.png,1,2,3", ",1,2,3,4,,1,0,0"])
def test_row_without_all_its_cells_is_named(listed, bad):
    assert "training.csv, row 3: " in complaint(listed(row("1/a.png"), bad))


def test_none_uncertain_and_no_face_are_left_out_and_counted(listed):
    rows = [row(f"1/{label}.png", label) for label in (8, 1, 9, 7, 10)]
    data = read(listed(*rows, skip={"1/8.png"}))  # an image not needed may be missing
    assert data.splits["train"].labels.tolist() == [1, 7]
    assert data.notes == ("training.csv: left out 3 None, Uncertain or No-face",)


def test_a_list_without_any_expression_is_refused(listed):
    message = complaint(listed(row("1/a.png", 8)))
    assert "training.csv has no image of any of the 8 classes" in message


@pytest.mark.parametrize(
    "box",
    ["nan,nan,nan,nan", ",,,", "1,2,0,5", "1,2,5,-3", "NULL,2,5,5", "1,2,inf,5", "1e12,2,5,5"],
)
def test_an_unusable_face_box_means_the_whole_image(listed, box):
    data = read(listed(row("1/a.png", box=box), row("1/b.png")))
    assert data.splits["train"].source.image(0).shape == (40, 40, 3)
    assert data.splits["train"].source.image(1).shape != (40, 40, 3)
    assert any("1 of 2 images have no usable face box" in note for note in data.notes)


def test_missing_images_are_left_out_and_the_first_is_named(listed):
    rows = [row(f"{i % 2}/{i}.png", i, f"{i},0,9,9") for i in range(4)]
    data = read(listed(row("1/8.png", 8), *rows, skip={"1/1.png"}))
    train = data.splits["train"]
    assert train.labels.tolist() == [0, 2, 3]
    assert [os.path.basename(train.source.name(i)) for i in range(3)] == ["0.png", "2.png", "3.png"]
    assert train.source.boxes[:, 0].tolist() == [0, 2, 3]
    note = "1 of 4 images named in training.csv are missing (first: 1/1.png)"
    assert note in data.notes


def test_most_images_missing_is_an_error(listed):
    top = listed(*(row(f"1/{i}.png") for i in range(5)), skip={"1/0.png", "1/1.png", "1/2.png"})
    message = complaint(top)
    assert "training.csv: 3 of 5 images it names are missing" in message
    assert f"{top}/1/0.png" in message


def test_if_all_images_are_missing_the_searched_folders_are_named(listed):
    top = listed(row("1/0.png"), row("1/1.png"), skip={"1/0.png", "1/1.png"})
    message = complaint(top)
    assert "none of 2 images it names exists, such as 1/0.png" in message
    assert f"{top}/Manually_Annotated_compressed/Manually_Annotated_Images" in message


# Annotation files


def annotation(root, i, content):
    """Write a file's bytes, or an array, as the expression of training image i."""
    path = root / "train_set" / "annotations" / f"{i}_exp.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    return path


@pytest.mark.parametrize("kind", ["npy annotations", "AffectNet+ JSON"])
def test_annotated_images_come_in_order_of_their_numbers(tmp_path, kind):
    WRITERS[kind](tmp_path, {"train": (12,)})
    source = read(tmp_path).splits["train"].source
    stems = [os.path.basename(source.name(i)) for i in range(12)]
    assert stems == [f"{i}.jpg" for i in range(12)]


@pytest.mark.parametrize(
    "array", [np.array("3"), np.array(3), np.array(3.0), np.array([3]), np.array(b"3")]
)
def test_expression_arrays_of_every_kind_are_read(tmp_path, array):
    write_affectnet_npy(tmp_path, {"train": (2,)})
    annotation(tmp_path, 1, array)
    assert read(tmp_path).splits["train"].labels.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.array("11"), "its expression must be an id"),
        (np.array(np.nan), "its expression must be an id"),
        (np.array([1, 2]), "2 values"),
        (b"", "not a NumPy file"),
        (b"<html>", "not a NumPy file"),
    ],
)
def test_an_expression_file_without_a_label_is_named(tmp_path, content, words):
    write_affectnet_npy(tmp_path, {"train": (2,)})
    path = annotation(tmp_path, 1, content)
    message = complaint(tmp_path)
    assert str(path) in message
    assert words in message


def test_images_without_annotations_and_the_reverse_are_counted(tmp_path):
    write_affectnet_npy(tmp_path, {"train": (3, 3)})
    folder = tmp_path / "train_set"
    (folder / "annotations" / "1_exp.npy").unlink()
    (folder / "images" / "0.jpg").unlink()
    (folder / "images" / "5.jpg").unlink()
    (folder / "images" / "._2.jpg").touch()  # what macOS leaves
    data = read(tmp_path)
    assert len(data.splits["train"]) == 3
    assert data.notes == (
        "train_set: 1 of 4 images have no annotations/<id>_exp.npy (first: 1.jpg)",
        "train_set: 2 of 5 annotations have no image (first: 0_exp.npy)",
    )


@pytest.mark.parametrize(("gone", "words"), [("images", "no image"), ("annotations", "_exp.npy")])
def test_split_without_images_or_annotations_is_an_error(tmp_path, gone, words):
    write_affectnet_npy(tmp_path, {"train": (2,), "test": (2,)})
    os.rename(tmp_path / "val_set" / gone, tmp_path / "val_set" / "elsewhere")
    message = complaint(tmp_path)
    assert f"{tmp_path}/val_set: 2 of 2" in message
    assert words in message


@pytest.mark.parametrize("key", ["Human-Label", "human-label", "HUMAN_LABEL", "Human Label"])
def test_the_json_key_is_found_in_any_spelling(tmp_path, key):
    write_affectnet_plus(tmp_path, {"train": (0, 0, 0, 2)}, keys=(key,))
    assert read(tmp_path / "human_annotated").splits["train"].labels.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "no Human-Label"),
        ('{"label": 1}', "no Human-Label"),
        ('{"human-label": "12"}', "its expression must be an id"),
        ('{"human-label": null}', "its expression must be an id"),
    ],
)
def test_json_without_a_label_is_named(tmp_path, text, words):
    write_affectnet_plus(tmp_path, {"train": (2,)})
    path = tmp_path / "human_annotated" / "train_set" / "annotations" / "1.json"
    path.write_text(text)
    message = complaint(tmp_path)
    assert str(path) in message
    assert words in message


def test_a_margin_without_effect_is_reported(tmp_path):
    write_affectnet_npy(tmp_path, {"train": (1,)})
    notes = open_labelled(str(tmp_path), face_margin=0.2).notes
    assert any("--face_margin 0.2 has no effect" in note for note in notes)


# Which layout it is


def test_two_layouts_under_one_folder_are_both_named(tmp_path):
    write_affectnet_csv(tmp_path / "old", {"train": (1,)})
    write_affectnet_npy(tmp_path, {"train": (1,)})
    assert recognise(tmp_path) == ["npy annotations", "2017 CSV lists in old/"]
    assert "npy annotations; 2017 CSV lists in old/; give" in complaint(tmp_path)
    assert read(tmp_path / "old").title.startswith("AffectNet-8 (2017")


def test_for_images_without_lists_the_missing_files_and_folders_are_named(tmp_path):
    write_affectnet_csv(tmp_path, {"train": (1,)}, images="Manually_Annotated_Images")
    (tmp_path / "Manually_Annotated_file_lists" / "training.csv").unlink()
    for place in (tmp_path, tmp_path / "Manually_Annotated_Images"):
        assert recognise(place) == []
        message = complaint(place)
        assert "neither training.csv nor validation.csv" in message
        assert f"{place}/Manually_Annotated_file_lists, {place}/file_lists, {place};" in message


@pytest.mark.parametrize("writer", [write_affectnet_npy, write_affectnet_plus], ids=["npy", "plus"])
def test_for_images_without_annotations_the_missing_files_are_named(tmp_path, writer):
    writer(tmp_path, {"train": (1,)})
    (folder,) = tmp_path.rglob("annotations")
    for path in folder.iterdir():
        path.unlink()
    assert recognise(tmp_path) == []
    assert f"no annotations <id>_exp.npy or <id>.json in {folder}" in complaint(tmp_path)


def test_one_split_of_a_release_asks_for_the_folder_above(tmp_path):
    write_affectnet_npy(tmp_path, {"train": (1,)})
    assert f"give the folder above it, {tmp_path}" in complaint(tmp_path / "train_set")


def test_other_folders_are_not_recognised_as_affectnet(tmp_path):
    (tmp_path / "training.csv").write_text("left_eye_x,left_eye_y,Image\n1,2,3\n")
    (tmp_path / "train_set" / "annotations").mkdir(parents=True)
    (tmp_path / "train_set" / "annotations" / "1.xml").touch()
    assert recognise(tmp_path) == []
    assert "nothing of AffectNet here" in complaint(tmp_path)
    assert "is not a folder" in complaint(tmp_path / "missing")


def test_recognising_a_layout_does_not_list_its_images(tmp_path, monkeypatch):
    write_affectnet_npy(tmp_path, {"train": (1,)})
    for i in range(300):
        (tmp_path / "train_set" / "annotations" / f"{i}_lnd.npy").touch()
        (tmp_path / "train_set" / "images" / f"{i}.jpg").touch()
    seen, scandir = [], os.scandir

    class Counted:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return (seen.append(e.path) or e for e in self.entries)

        def __exit__(self, *_):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Counted)
    monkeypatch.setattr(os, "listdir", lambda path: pytest.fail(f"lists {path}"))
    recognise(tmp_path)
    assert 0 < len(seen) <= 210


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nb_classes": 5}, "--nb_classes 5: AffectNet has 7 or 8"),
        ({"margin": -0.5}, "--face_margin -0.5"),
        ({"margin": float("nan")}, "--face_margin nan"),
    ],
)
def test_an_invalid_option_is_named(tmp_path, options, words):
    assert words in complaint(tmp_path, **options)


# Reading annotation files


def test_each_folder_is_listed_once_to_check_which_files_exist(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    (tmp_path / "2.jpg").touch()
    seen, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: seen.append(path) or listdir(path))
    names = ["a/1.jpg", "a/2.jpg", "2.jpg", "b/1.jpg", "2.jpg/1.jpg", "a/1.jpg"]
    assert files_exist(tmp_path, names).tolist() == [True, False, True, False, False, True]
    assert len(seen) == 4


def test_csv_rows_are_numbered_by_their_lines(tmp_path):
    (tmp_path / "l.csv").write_bytes(b'\xef\xbb\xbfa,b\r\n\r\n"x\ny",\xff\r\n,\r\n1,2')
    rows = list(csv_rows(tmp_path / "l.csv"))
    assert rows == [(1, ["a", "b"]), (4, ["x\ny", "\udcff"]), (6, ["1", "2"])]


def test_an_unreadable_csv_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"training\.csv cannot be read"):
        list(csv_rows(tmp_path / "training.csv"))


# Everything that is left out is counted


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Training.csv", "Manually_Annotated_file_lists"),
        ("TRAINING.CSV", "manually_annotated_File_Lists"),
    ],
)
def test_lists_are_found_in_any_case(tmp_path, name, folder):
    write_affectnet_csv(tmp_path, {"train": (2, 1), "test": (1,)})
    lists = tmp_path / "Manually_Annotated_file_lists"
    (lists / "training.csv").rename(lists / name)
    lists.rename(tmp_path / folder)
    assert {s: len(images) for s, images in read(tmp_path).splits.items()} == {
        "train": 3,
        "test": 1,
    }


def test_repeated_rows_count_once(listed):
    same, other = row("1/a.png", 1), row("1/a.png", 1, "9,9,9,9")  # another face of it
    data = read(listed(same, row("1/b.png", 2), same, other, same))
    assert data.splits["train"].labels.tolist() == [1, 2, 1]
    told = "2 rows of training.csv repeat an earlier row and are left out (first: row 4)"
    assert data.notes == (told,)


def test_rows_that_give_a_face_another_label_are_kept_and_counted(listed):
    rows = [row("1/a.png", label) for label in (1, 2, 1, 2)]
    data = read(listed(*rows))
    assert data.splits["train"].labels.tolist() == [1, 2]
    assert data.notes == (
        "2 rows of training.csv repeat an earlier row and are left out (first: row 4)",
        "1 rows of training.csv label a face differently from an earlier row and are kept "
        "(first: row 3, unlike row 2)",
    )


def test_of_two_images_with_one_number_the_first_is_read_and_the_other_counted(tmp_path):
    write_affectnet_npy(tmp_path, {"train": (3,)})
    images = tmp_path / "train_set" / "images"
    Image.new("RGB", (4, 4)).save(images / "1.png")
    data = read(tmp_path)
    assert data.splits["train"].source.name(1) == str(images / "1.jpg")
    told = "train_set: 1 files have the name of another one except for the extension "
    assert data.notes == (f"{told}and are left out (first: 1.png)",)
