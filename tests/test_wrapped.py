"""If all images below a folder are used, labelled data sets and splits in it are reported."""

import os

import pytest
from PIL import Image

import main_pack
from datasets import open_images, wrapped
from layouts import save, write_fer2013, write_folder, write_rafdb
from runs import run_here

FACE = Image.new("RGB", (8, 8))
USED = "all images below data are used, its test images included"


@pytest.fixture
def data(tmp_path):
    save(FACE, tmp_path / "data" / "loose.png")
    return tmp_path / "data"


@pytest.mark.parametrize("place", ["RAF-DB", "downloads/RAF-DB"])
def test_a_data_set_in_an_outer_folder_is_named(data, place):
    write_rafdb(data / place, 2, 1, drawn=False)
    images = open_images(str(data))
    assert len(images.source) == 22
    told = f"warning: {place} holds RAF-DB: {USED}; give {data / place}"
    assert images.notes[0] == told


def test_packing_names_a_data_set_in_an_outer_folder(data, tmp_path, capfd):
    write_rafdb(data / "RAF-DB", 2, 1, drawn=False)
    argv = ["--data_path", data, "--output", tmp_path / "store", "--num_workers", 0]
    assert run_here(main_pack, list(map(str, argv))) == 0
    assert f"warning: RAF-DB holds RAF-DB: {USED}; give {data}/RAF-DB" in capfd.readouterr().out


def test_split_folders_in_an_outer_folder_are_named(data):
    write_folder(data / "faces", {"Training": 1, "Testing": 1}, ["happy", "sad"], drawn=False)
    told = f"warning: faces holds the splits Testing and Training: {USED}; give {data}/faces"
    assert open_images(str(data)).notes == [told]


def test_a_missing_training_split_is_reported(data):
    write_folder(data, {"val": 1, "Testing": 1}, ["happy", "sad"], drawn=False)
    told = (
        "warning: data has no training split: all its images are used, including those in "
        "Testing, val"
    )
    assert open_images(str(data)).notes == [told]


def test_pixels_in_a_csv_are_reported_as_not_used(data):
    write_fer2013(data / "FER2013", 1, 1, 1)
    notes = open_images(str(data)).notes
    told = "warning: FER2013 holds FER2013, whose images in fer2013.csv are not used; "
    assert notes[0] == f"{told}give {data}/FER2013"


def test_two_data_sets_in_the_folder_itself_are_named(data):
    write_rafdb(data, 2, 1, drawn=False)
    write_fer2013(data, 1, 1, 1)
    told = "warning: data holds RAF-DB and FER2013: all images below it are used, test images "
    assert open_images(str(data)).notes[0].startswith(told)


def test_folders_without_data_sets_give_no_note(data):
    for name in ("happy/a.png", "sad/deep/b.png", "train2/c.png", "1/2/3/d.png"):
        save(FACE, data / name)
    write_folder(data / "more", 1, drawn=False)
    assert open_images(str(data)).notes == []


def test_not_all_of_many_folders_are_searched(data, monkeypatch):
    for k in range(1000):
        (data / f"{k:04}").mkdir()
    looked, first = [], wrapped.first_entries
    monkeypatch.setattr(wrapped, "first_entries", lambda f, n: looked.append(f) or first(f, n))
    assert open_images(str(data)).notes == []
    assert [os.path.basename(folder) for folder in looked] == ["data"]
