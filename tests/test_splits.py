"""Names of split folders, and folders of splits or data sets that are not classes."""

import pytest
from PIL import Image

from datasets import open_images, open_labelled
from datasets.split_names import split_called
from layouts import save, write_folder
from util.errors import BadInput

FACE = Image.new("RGB", (8, 8))
WORDS = {
    "train": "train Train TRAIN training Training train_set trainset Train-Set train_images "
    "1_train TrainData train_split training_data",
    "val": "val valid Valid validation Validation val_set valid_set validation_set VAL dev "
    "PublicTest public_test val_images",
    "test": "test Test testing Testing test_set testset TestImages PrivateTest private_test "
    "eval evaluation test_data",
    None: "happy train2 trains tester Testament valet aval devil evaluator trained 3 RAF-DB set",
}


@pytest.mark.parametrize(
    ("name", "split"), [(name, split) for split, words in WORDS.items() for name in words.split()]
)
def test_a_split_is_recognised_by_any_usual_name_in_any_case(name, split):
    assert split_called(name) == split


@pytest.mark.parametrize(
    ("called", "splits"),
    [
        (["Training", "Testing"], ["train", "test"]),
        (["Train", "Validation", "Test"], ["train", "val", "test"]),
        (["Training", "PublicTest", "PrivateTest"], ["train", "val", "test"]),
        (["train_set", "val_set"], ["train", "test"]),
    ],
)
def test_class_folders_in_splits_of_any_name_are_read_as_splits(called, splits, tmp_path):
    write_folder(tmp_path, dict.fromkeys(called, 2), ["happy", "sad"], drawn=False)
    data = open_labelled(str(tmp_path))
    assert [*data.splits] == splits
    assert data.classes == ("Happy", "Sad")


@pytest.mark.parametrize("called", ["train", "Training", "train_set"])
def test_pre_training_leaves_out_test_images_and_notes_it(called, tmp_path):
    for name in (f"{called}/a.png", f"{called}/b.png", "Testing/c.png", "old/d.png", "loose.png"):
        save(FACE, tmp_path / name)
    images = open_images(str(tmp_path))
    found = [images.source.name(i).split("/")[-1] for i in range(len(images.source))]
    assert found == ["a.png", "b.png"]
    told = f"only the images in {called} are used; not used: Testing, old, 1 image"
    assert images.notes == [told]


def test_images_without_splits_give_no_note(tmp_path):
    save(FACE, tmp_path / "a.png")
    assert open_images(str(tmp_path)).notes == []


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["RAF-DB/a.png", "AffectNet/b.png"], "look like data sets"),
        (["fer2013plus/a.png", "happy/b.png"], "look like data sets"),
        (["happy/train/a.png", "sad/test/b.png"], "put the splits above the classes"),
        (
            ["one/happy/a.png", "one/sad/a.png", "two/happy/b.png", "two/sad/b.png"],
            "one, two each hold class folders",
        ),
    ],
)
def test_folders_of_data_sets_or_splits_are_refused_as_classes(names, words, tmp_path):
    for name in names:
        save(FACE, tmp_path / name)
    with pytest.raises(BadInput, match=words):
        open_labelled(str(tmp_path), "folder")


def test_folders_of_persons_below_classes_are_neither_splits_nor_classes(tmp_path):
    for name in ("happy/001/a.png", "happy/002/a.png", "sad/001/a.png", "sad/002/b.png"):
        save(FACE, tmp_path / name)
    data = open_labelled(str(tmp_path))
    assert data.classes == ("Happy", "Sad")
    assert len(data.splits["all"]) == 4
