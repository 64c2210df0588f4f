"""Lists with labels, names that resemble expressions, and messages about lists and folders."""

import pytest
from PIL import Image

import main_finetune
import main_pack
from datasets import open_images, open_labelled
from datasets.duplicates import duplicate_warnings
from datasets.folder import FileList, ImageFiles
from datasets.listfile import read_list
from datasets.unreadable import check_readable
from finetuned import results
from layouts import save, write_folder
from runs import finetune_options, run_here
from util.errors import BAD_INPUT, DONE, BadInput

NAMES = ["happy/a.png", "sad/b c.png", "happy/d.png", "sad/e.png"]


@pytest.fixture
def images(tmp_path):
    for k, name in enumerate(NAMES):
        save(Image.new("RGB", (8, 8), (40 * k, 0, 0)), tmp_path / name)
    return tmp_path


def complaint(call, *args, **kwargs):
    with pytest.raises(BadInput) as e:
        call(*args, **kwargs)
    return str(e.value)


LISTS = {
    "spaces.txt": "happy/a.png happiness\nsad/b c.png sad\n\n# a comment\nhappy/d.png happy\n"
    "sad/e.png sad\n",
    "tabs.lst": "happy/a.png\thappy\nsad/b c.png\tsad\nhappy/d.png\thappy\nsad/e.png\tsad\n",
    "header.csv": "path,label\nhappy/a.png,Joy\nsad/b c.png,sad\nhappy/d.png,happy\n"
    "sad/e.png,sad\n",
    "more.csv": "expression;x;image_path\nhappy;1;happy/a.png\nsad;2;sad/b c.png\n"
    "happy;3;happy/d.png\nsad;4;sad/e.png\n",
    "bare.csv": "happy/a.png,happy\nsad/b c.png,sad\nhappy/d.png,happy\nsad/e.png,sad\n",
}


@pytest.mark.parametrize("file", LISTS)
def test_a_list_with_labels_is_read(file, images):
    (images / file).write_text(LISTS[file])
    data = open_labelled(str(images / file))
    assert (data.name, data.classes) == ("list", ("Happy", "Sad"))
    found = data.splits["all"]
    assert [found.source.name(i) for i in range(4)] == [str(images / name) for name in NAMES]
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert open_labelled(str(images / file), "list").digest == data.digest
    assert len(open_images(str(images / file)).source) == 4  # pre-training needs no labels


def test_a_column_of_splits_makes_splits(images):
    rows = zip(
        NAMES, ("happy", "sad") * 2, ("Training", "train", "PrivateTest", "test"), strict=True
    )
    text = "".join(",".join(row) + "\n" for row in [("file", "emotion", "Usage"), *rows])
    (images / "list.csv").write_text(text)
    data = open_labelled(str(images / "list.csv"))
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 2, "test": 2}
    alone = open_images(str(images / "list.csv"))  # pre-training does not use test images
    assert [alone.source.name(i) for i in range(2)] == [str(images / name) for name in NAMES[:2]]
    assert (len(alone.source), len(alone.notes)) == (2, 1)
    assert alone.notes[0] == "only the 2 training images of 4 in the list are used"
    (images / "list.csv").write_text(text.replace("PrivateTest", "somewhere"))
    message = complaint(open_labelled, str(images / "list.csv"))
    assert "list.csv, row 4: its split must be train, val or test" in message


def test_numbers_in_a_list_need_an_order(images):
    text = "".join(f"{name} {k % 2 + 3}\n" for k, name in enumerate(NAMES))
    (images / "list.txt").write_text(text.replace(" 4", " 0").replace(" 3", " 1"))
    assert "give --label_order" in complaint(open_labelled, str(images / "list.txt"))
    data = open_labelled(str(images / "list.txt"), label_order="sad,happy")
    assert data.classes == ("Sad", "Happy")
    assert data.splits["all"].labels.tolist() == [1, 0, 1, 0]
    assert data.options == {"label_order": "0:Sad,Happy"}
    assert "labels are numbered as in --label_order 0:Sad,Happy: 0 Sad, 1 Happy" in data.notes


def test_labels_may_be_whole_numbers_with_a_decimal_point(images):
    text = "path,label\n" + "".join(f"{name},{k % 2}.0\n" for k, name in enumerate(NAMES))
    (images / "list.csv").write_text(text)  # as pandas writes a column with a missing label
    assert "give --label_order" in complaint(open_labelled, str(images / "list.csv"))
    data = open_labelled(str(images / "list.csv"), label_order="sad,happy")
    assert data.splits["all"].labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("happy/a.png\nsad/e.png\n", "a list of images without labels; write `path label` lines"),
        ("happy/a.png happy\nsad/e.png\n", "row 2: has no label"),
        (
            "happy/a.png happy\nhappy/d.png happy\n",
            "only one class, happy; a classifier needs at least two",
        ),
        ("x/a.png happy\nx/b.png sad\n", "none of its 2 entries exists"),
    ],
)
def test_a_list_that_cannot_be_trained_on_is_refused_with_the_reason(text, words, images):
    (images / "list.txt").write_text(text)
    assert words in complaint(open_labelled, str(images / "list.txt"))


def test_missing_files_of_a_list_are_counted(images):
    rows = [f"{name} {name.split('/')[0]}\n" for name in (*NAMES, "happy/gone.png")]
    (images / "list.txt").write_text("".join(rows))
    data = open_labelled(str(images / "list.txt"))
    assert "1 of 5 images named in list.txt are missing (first: happy/gone.png)" in data.notes
    assert len(data.splits["all"]) == 4


@pytest.mark.parametrize(
    "text",
    [
        "label,path_to_image\n3,happy/a.png\n4,sad/e.png\n",
        "label,photo\nhappy,happy/a.png\nsad,sad/e.png\n",
        ",pth,label\n0,happy/a.png,happy\n1,sad/e.png,sad\n",
    ],
)
@pytest.mark.parametrize("call", [open_images, open_labelled])
def test_for_unknown_columns_the_known_ones_are_named(call, text, images):
    (images / "list.csv").write_text(text)
    message = complaint(call, str(images / "list.csv"))
    assert "list.csv: its header names no column of paths; name it one of path, file" in message


def test_a_list_with_labels_can_be_trained_on_and_tested_with_another(images, tmp_path):
    (images / "train.txt").write_text(LISTS["spaces.txt"])
    (images / "test.csv").write_text(LISTS["header.csv"])
    data = f"--data_path {images / 'train.txt'} --eval_data_path {images / 'test.csv'}"
    options = finetune_options(tmp_path / "run", "vit", f"{data} --batch_size 2 --epochs 1")
    assert run_here(main_finetune, options) == DONE
    result = results(tmp_path / "run")
    assert (result["n"], result["data"], result["split"]) == (4, "list test.csv", "all")
    assert "list test.csv has no test split: testing on all of its images" in result["report"]


def test_a_list_with_labels_is_packed_with_them(images, tmp_path):
    (images / "list.txt").write_text(LISTS["spaces.txt"])
    argv = ["--data_path", images / "list.txt", "--output", tmp_path / "store", "--num_workers", 0]
    assert run_here(main_pack, list(map(str, argv))) == DONE
    data = open_labelled(str(tmp_path / "store"))
    assert (data.name, data.classes) == ("list", ("Happy", "Sad"))


def test_a_list_of_paths_with_spaces_is_not_read_as_labels(images):
    (images / "list.txt").write_text("sad/b c.png\nhappy/a.png\n")
    listed = read_list(str(images / "list.txt"))
    assert (listed.names, listed.labels) == (["sad/b c.png", "happy/a.png"], [])


# Names


def test_folders_that_are_not_expressions_are_noted_with_the_nearest_name(tmp_path):
    names = ["happiness", "sadness", "Suprise", "other"]
    data = open_labelled(str(write_folder(tmp_path, 1, names, drawn=False)))
    assert data.classes == tuple(sorted(names))
    assert data.notes == (
        "Suprise (did you mean Surprise?), other are not known expressions, "
        "so all class folders keep their own names",
    )


def test_folders_are_not_noted_if_none_is_an_expression(tmp_path):
    assert open_labelled(str(write_folder(tmp_path, 1, ["cat", "dog"], drawn=False))).notes == ()


def test_one_class_is_refused_before_anything_is_built(tmp_path, capfd):
    write_folder(tmp_path / "data", {"train": 2, "test": 1}, ["happy"], drawn=False)
    options = f"--data_path {tmp_path / 'data'} --data_set folder"
    assert run_here(main_finetune, finetune_options(tmp_path / "out", "vit", options)) == BAD_INPUT
    assert "only one class, happy; a classifier needs at least two" in capfd.readouterr().err


# Rows and columns: those left out are counted, and ambiguous ones refused


@pytest.fixture
def faces(tmp_path):
    """Six images of each of two classes; -> a function that writes a list beside them."""
    for k, name in enumerate(FACES):
        save(Image.new("RGB", (8, 8), (20 * k, 0, 0)), tmp_path / name)

    def write(text, name="list.csv"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


FACES = [f"{word}/{k}.jpg" for word in ("happy", "sad") for k in range(6)]


def rows(*more, header="path,label", names=FACES):
    """A CSV of the faces: path, label and the values of each `more(k)` for the k-th."""
    lines = [",".join([n, n.split("/")[0], *(m(k) for m in more)]) for k, n in enumerate(names)]
    return "\n".join([header, *lines]) + "\n"


def third_test(k):
    return "test" if k % 3 == 2 else "train"


def test_a_split_whose_images_are_all_missing_is_refused(faces):
    text = rows(third_test, header="path,label,split")
    for k in (2, 5, 8, 11):
        text = text.replace(FACES[k], f"gone/{k}.jpg")
    message = complaint(open_labelled, faces(text))
    assert "list.csv: 4 of 4 test images it names are missing; the first was looked for" in message
    text = rows(third_test, header="path,label,split").replace(FACES[2], "gone/2.jpg")
    (note,) = open_labelled(faces(text)).notes
    assert note == "1 of 4 test images named in list.csv are missing (first: gone/2.jpg)"


@pytest.mark.parametrize("column", ["set", "fold", "partition", "phase"])
def test_a_column_of_splits_is_recognised_by_its_cells(column, faces):
    path = faces(rows(lambda k: str(k), third_test, header=f"path,label,id,{column}"))
    data = open_labelled(path)
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 8, "test": 4}
    assert data.notes == ("columns not used: id",)
    images = open_images(path)
    assert len(images.source) == 8
    told = ["columns not used: id", "only the 8 training images of 12 in the list are used"]
    assert images.notes == told


def test_a_column_with_cells_that_are_not_splits_is_reported_as_not_used(faces):
    path = faces(rows(lambda k: str(k % 5), header="path,label,fold"))
    assert [*open_labelled(path).splits] == ["all"]
    assert "columns not used: fold" in open_labelled(path).notes
    assert open_images(path).notes == ["columns not used: fold"]


def test_three_columns_without_a_header_are_path_label_and_split(faces):
    data = open_labelled(faces(rows(third_test).split("\n", 1)[1]))
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 8, "test": 4}
    assert data.classes == ("Happy", "Sad")


@pytest.mark.parametrize("call", [open_images, open_labelled])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label,path\nhappy,happy/0.jpg\n\nsad\n", "row 4 has no path in its column 'path'"),
        ("path,label\nhappy/0.jpg,happy\n,sad\n", "row 3 has no path in its column 'path'"),
        ("happy/0.jpg,happy\n ,sad\n", "row 2 has no path in its first column; fill it in"),
        (",happy\nhappy/0.jpg,happy\n", "row 1 has no path in its first column"),
    ],
)
def test_a_row_without_a_path_is_named(call, text, words, faces):
    assert words in complaint(call, faces(text))


def test_blank_rows_and_comments_are_ignored(faces):
    text = rows().replace("sad/0.jpg", "\n,\n # more,\nsad/0.jpg")
    assert len(open_labelled(faces(text)).splits["all"]) == 12


def test_paths_may_be_in_a_first_column_without_a_name(faces):
    assert len(open_labelled(faces(rows(header=",label"))).splits["all"]) == 12


def test_repeated_rows_count_once(faces):
    text = rows() + "sad/1.jpg,Sadness\n./happy/0.jpg,happy\n"
    data = open_labelled(faces(text))
    assert len(data.splits["all"]) == 12
    told = "2 rows of list.csv repeat an earlier row and are left out (first: row 14)"
    assert told in data.notes


def test_an_image_with_two_labels_is_named_with_both_rows(faces):
    message = complaint(open_labelled, faces(rows() + "sad/1.jpg,happy\n"))
    assert "list.csv, row 14: another label than in row 9 for the same image; keep one" in message


def test_an_image_in_two_splits_is_reported_as_a_duplicate_only(faces):
    text = rows(third_test, header="path,label,split") + "sad/0.jpg,sad,test\n"
    data = open_labelled(faces(text))
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 8, "test": 5}
    assert data.notes == ()
    assert "1 of 5 images of test are in train" in duplicate_warnings(data.splits)[0]


def test_a_list_without_a_training_split_is_used_whole_with_a_warning(faces):
    images = open_images(faces(rows(lambda k: ["val", "test"][k % 2], header="path,label,split")))
    assert len(images.source) == 12
    assert images.notes == ["warning: list.csv has no training split: all its images are used"]


BOXED = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression"


def test_for_affectnets_csv_as_a_list_the_unused_boxes_are_noted(faces):
    lines = [f"{name},1,2,3,4,1;2,{k % 2}" for k, name in enumerate(FACES)]
    path = faces("\n".join([BOXED, *lines]))
    told = "columns not used: face_x, face_y, face_width, face_height, facial_landmarks; to "
    told += "crop faces by their boxes, give AffectNet's folder instead"
    assert told in open_labelled(path, label_order="happy,sad").notes
    assert open_images(path).notes == [told]
    message = complaint(open_images, faces("\n".join([BOXED, "1/a.jpg,1,2,3,4,,0"])))
    assert "for AffectNet's own lists, give the folder of the data set" in message


@pytest.mark.parametrize("call", [open_images, open_labelled])
def test_entries_from_all_parts_of_a_list_are_checked(call, faces):
    gone = "".join(f"gone/{k}.jpg {['happy', 'sad'][k % 2]}\n" for k in range(150))
    there = "".join(f"{name} {name.split('/')[0]}\n" for name in FACES)
    if call is open_images:
        assert len(call(faces(gone + there, "list.txt")).source) == 162
    else:
        message = complaint(call, faces(gone + there, "list.txt"))
        assert "list.txt: 150 of 162 images it names are missing" in message
    message = complaint(call, faces(gone, "list.txt"))
    assert "none of 100 of its 150 entries exists; the first, in row 1, was looked" in message


@pytest.mark.parametrize(
    ("separator", "header"),
    [(",", ""), (";", ""), ("\t", ""), (",", "img,class\n"), (" ", "image label\n")],
)
def test_a_text_list_may_have_any_separator_and_a_header(separator, header, faces):
    lines = [f"{name}{separator}{name.split('/')[0]}" for name in FACES]
    data = open_labelled(faces(header + "\n".join(lines), "list.txt"))
    assert data.classes == ("Happy", "Sad")
    assert len(data.splits["all"]) == 12


def test_paths_from_windows_are_found_and_noted(faces):
    path = faces(rows().replace("/", "\\"))
    data = open_labelled(path)
    assert len(data.splits["all"]) == 12
    assert data.notes == ("paths are read with / instead of \\",)
    assert open_images(path).notes == ["paths are read with / instead of \\"]


@pytest.mark.parametrize("line", ["{label} {name}", "{name} {label} train"])
def test_for_lines_in_another_order_the_format_is_explained(line, faces):
    text = "".join(line.format(label=n.split("/")[0], name=n) + "\n" for n in FACES)
    message = complaint(open_labelled, faces(text, "list.txt"))
    assert message.endswith("; a line is read as `path label`, the path first")


@pytest.mark.parametrize("call", [open_images, open_labelled])
def test_for_a_csv_of_pixels_the_error_asks_for_its_folder(call, faces):
    text = "emotion,pixels,Usage\n0,1 2 3,Training\n"
    path = faces(text, "fer2013.csv")
    assert complaint(call, path).endswith(f"{path}: holds pixels: give its folder")
    message = complaint(call, faces(text, "icml.csv"))
    assert message.endswith("give its folder, with the file renamed to fer2013.csv")


def test_an_empty_source_is_refused_in_one_line(faces, tmp_path):
    source = ImageFiles(FileList.of(str(tmp_path), []))
    assert complaint(check_readable, source) == "--data_path: holds no images"
