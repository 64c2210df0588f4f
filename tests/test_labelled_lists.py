"""Labelled lists, names that are nearly expressions, and what lists and folders are told."""

import pytest
from finetuned import results
from layouts import save, write_folder
from PIL import Image
from runs import finetune_options, run_here

import main_finetune
import main_pack
from datasets import open_images, open_labelled
from datasets.listfile import read_list
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
    alone = open_images(str(images / "list.csv"))  # pre-training keeps away from test images
    assert [alone.source.name(i) for i in range(2)] == [str(images / name) for name in NAMES[:2]]
    assert (len(alone.source), len(alone.notes)) == (2, 1)
    assert alone.notes[0] == "only the 2 training images of 4 in the list are used"
    (images / "list.csv").write_text(text.replace("PrivateTest", "somewhere"))
    message = complaint(open_labelled, str(images / "list.csv"))
    assert "happy/d.png is of the split 'somewhere'; splits are train, val and test" in message


def test_numbers_in_a_list_need_an_order(images):
    text = "".join(f"{name} {k % 2 + 3}\n" for k, name in enumerate(NAMES))
    (images / "list.txt").write_text(text.replace(" 4", " 0").replace(" 3", " 1"))
    assert "give --label_order" in complaint(open_labelled, str(images / "list.txt"))
    data = open_labelled(str(images / "list.txt"), label_order="sad,happy")
    assert data.classes == ("Sad", "Happy")
    assert data.splits["all"].labels.tolist() == [1, 0, 1, 0]
    assert data.options == {"label_order": "0:Sad,Happy"}
    assert "labels are numbered by --label_order 0:Sad,Happy: 0 Sad, 1 Happy" in data.notes


def test_whole_numbers_may_be_written_with_a_point(images):
    text = "path,label\n" + "".join(f"{name},{k % 2}.0\n" for k, name in enumerate(NAMES))
    (images / "list.csv").write_text(text)  # as pandas saves a column in which a label was missing
    assert "give --label_order" in complaint(open_labelled, str(images / "list.csv"))
    data = open_labelled(str(images / "list.csv"), label_order="sad,happy")
    assert data.splits["all"].labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("happy/a.png\nsad/e.png\n", "a list of images without labels; write `path label` lines"),
        ("happy/a.png happy\nsad/e.png\n", "sad/e.png has no label"),
        ("happy/a.png happy\nhappy/d.png happy\n", "only one class, happy; a classifier needs two"),
        ("x/a.png happy\nx/b.png sad\n", "none of its first 2 entries exists"),
    ],
)
def test_a_list_that_cannot_be_trained_on_says_why(text, words, images):
    (images / "list.txt").write_text(text)
    assert words in complaint(open_labelled, str(images / "list.txt"))


def test_missing_files_of_a_list_are_counted(images):
    rows = [f"{name} {name.split('/')[0]}\n" for name in (*NAMES, "happy/gone.png")]
    (images / "list.txt").write_text("".join(rows))
    data = open_labelled(str(images / "list.txt"))
    assert "1 of 5 images named in list.txt are missing (first: happy/gone.png)" in data.notes
    assert len(data.splits["all"]) == 4


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("label,path_to_image\n3,happy/a.png\n4,sad/e.png\n", "label, path_to_image"),
        (",pth,label\n0,happy/a.png,happy\n1,sad/e.png,sad\n", "'', pth, label"),
    ],
)
@pytest.mark.parametrize("call", [open_images, open_labelled])
def test_unknown_columns_are_answered_with_the_known_ones(call, text, columns, images):
    (images / "list.csv").write_text(text)
    message = complaint(call, str(images / "list.csv"))
    assert f"no column of paths among {columns}; name it one of path, file, filename" in message


def test_a_list_with_labels_can_be_trained_on_and_tested_with_another(images, tmp_path):
    (images / "train.txt").write_text(LISTS["spaces.txt"])
    (images / "test.csv").write_text(LISTS["header.csv"])
    data = f"--data_path {images / 'train.txt'} --eval_data_path {images / 'test.csv'}"
    options = finetune_options(tmp_path / "run", "vit", f"{data} --batch_size 2 --epochs 1")
    assert run_here(main_finetune, options) == DONE
    result = results(tmp_path / "run")
    assert (result["n"], result["data"], result["split"]) == (4, "list test.csv", "all")
    assert "list test.csv has no test split: all of its images are tested on" in result["report"]


def test_a_list_with_labels_is_packed_with_them(images, tmp_path):
    (images / "list.txt").write_text(LISTS["spaces.txt"])
    argv = ["--data_path", images / "list.txt", "--output", tmp_path / "store", "--num_workers", 0]
    assert run_here(main_pack, list(map(str, argv))) == DONE
    data = open_labelled(str(tmp_path / "store"))
    assert (data.name, data.classes) == ("list", ("Happy", "Sad"))


def test_a_text_of_paths_with_blanks_is_no_list_of_labels(images):
    (images / "list.txt").write_text("sad/b c.png\nhappy/a.png\n")
    listed = read_list(str(images / "list.txt"))
    assert (listed.names, listed.labels) == (["sad/b c.png", "happy/a.png"], [])


# Names


def test_one_folder_that_is_no_expression_is_named_with_the_nearest(tmp_path):
    names = ["happiness", "sadness", "Suprise", "other"]
    data = open_labelled(str(write_folder(tmp_path, 1, names, drawn=False)))
    assert data.classes == tuple(sorted(names))
    assert data.notes == (
        "Suprise (did you mean Surprise?), other are not known expressions, "
        "so all class folders keep their own names",
    )


def test_folders_that_are_no_expressions_at_all_are_nothing_to_speak_of(tmp_path):
    assert open_labelled(str(write_folder(tmp_path, 1, ["cat", "dog"], drawn=False))).notes == ()


def test_one_class_is_refused_before_anything_is_built(tmp_path, capfd):
    write_folder(tmp_path / "data", {"train": 2, "test": 1}, ["happy"], drawn=False)
    options = f"--data_path {tmp_path / 'data'} --data_set folder"
    assert run_here(main_finetune, finetune_options(tmp_path / "out", "vit", options)) == BAD_INPUT
    assert "only one class, happy; a classifier needs two at least" in capfd.readouterr().err
