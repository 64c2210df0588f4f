"""Images that are added, removed or renamed between two starts; folders and lists of any size."""

import os
import shutil
import time
import tracemalloc

import pytest
import torch

import main_finetune
import main_pack
from datasets import open_images
from datasets.folder import list_images
from layouts import write_folder
from odd_images import write_faces
from runs import finetune_options, load, log, pretrain, run_here
from util.errors import BAD_INPUT


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """12 faces, and a pre-training on them that was stopped in the middle of its second epoch."""
    root = tmp_path_factory.mktemp("begun")
    write_faces(root / "faces", 12)
    more = f"--data_path {root / 'faces'} --batch_size 4 --save_steps 2 --epochs 2"
    assert pretrain(root / "run", more) == 0
    saved = load(root / "run")
    torch.save(saved | {"epoch": 0, "step": 2}, root / "run" / "checkpoint-last.pth")
    (root / "run" / "checkpoint-1.pth").unlink()
    return root


@pytest.fixture
def resume(begun, tmp_path):
    """Change the faces, and start that training again."""
    shutil.copytree(begun, tmp_path / "it")
    faces, run = tmp_path / "it" / "faces", tmp_path / "it" / "run"

    def start(change, more=""):
        change(faces)
        return pretrain(run, f"--data_path {faces} --batch_size 4 --epochs 2 {more}")

    return start


def add(faces):
    shutil.copy(faces / "good000.png", faces / "good999.png")


def remove(faces):
    (faces / "good003.png").unlink()


@pytest.mark.parametrize(
    ("change", "told"),
    [(add, "12 images before, 13 images now"), (remove, "12 images before, 11 images now")],
)
def test_changed_images_are_counted_and_the_run_is_refused(resume, change, told, capfd):
    assert resume(change) == BAD_INPUT
    (line,) = capfd.readouterr().err.splitlines()
    assert f"from a run with other images ({told}); use the same images, another" in line
    assert "--override_resume to resume anyway" in line


def test_a_renamed_image_is_seen_although_the_time_of_its_folder_is_restored(tmp_path, capfd):
    faces = write_faces(tmp_path / "faces", 8)
    os.utime(faces, (1, 1))
    more = f"--data_path {faces} --epochs 1"
    assert pretrain(tmp_path / "run", more) == 0
    (faces / "good003.png").rename(faces / "good999.png")
    os.utime(faces, (1, 1))
    assert pretrain(tmp_path / "run", more) == BAD_INPUT
    told = "8 images as before, but with other names or labels, or in another order"
    assert f"from a run with other images ({told})" in capfd.readouterr().err


def test_with_other_images_the_epoch_starts_over_if_asked(resume, tmp_path, capfd):
    assert resume(remove, "--override_resume") == 0
    said = capfd.readouterr().out
    assert "continuing with changed images: 12 images before, 11 images now" in said
    assert "at epoch 1, step 0" in said
    assert [record["epoch"] for record in log(tmp_path / "it" / "run")] == [0, 1]


def test_images_that_an_older_release_did_not_count(begun, resume, tmp_path, capfd):
    path = tmp_path / "it" / "run" / "checkpoint-last.pth"
    saved = load(path.parent)
    del saved["run"]["images"]
    torch.save(saved, path)
    assert resume(add) == BAD_INPUT
    assert "from a run with other images (13 images now);" in capfd.readouterr().err
    assert resume(lambda faces: (faces / "good999.png").unlink()) == 0


def test_an_added_training_image_is_counted_in_fine_tuning(tmp_path, capfd):
    data = write_folder(tmp_path / "data", {"train": 2, "test": 1}, ["happy", "sad"], drawn=False)
    options = finetune_options(tmp_path / "run", "vit", f"--data_path {data} --epochs 1")
    assert run_here(main_finetune, options) == 0
    first = next((data / "train" / "happy").iterdir())
    shutil.copy(first, first.with_name(f"another{first.suffix}"))
    assert run_here(main_finetune, options) == BAD_INPUT
    told = "4 train and 2 test images before, 5 train and 2 test images now"
    assert f"from a run with other images ({told})" in capfd.readouterr().err


def test_an_added_image_is_counted_in_packing(begun, tmp_path, capfd):
    faces = shutil.copytree(begun / "faces", tmp_path / "faces")
    options = [f"--data_path={faces}", f"--output={tmp_path / 'store'}", "--num_workers=0"]
    assert run_here(main_pack, options) == 0
    add(faces)
    assert run_here(main_pack, options) == BAD_INPUT
    told = "holds a store of other images (12 images before, 13 images now); name another folder"
    assert told in capfd.readouterr().err


# Size


@pytest.mark.parametrize("folders", [1, 8])
@pytest.mark.parametrize("count", [4_000, pytest.param(270_000, marks=pytest.mark.long)])
def test_a_large_folder_is_listed_in_seconds(count, folders, tmp_path):
    for k in range(folders):
        (tmp_path / f"{k}").mkdir()
        for n in range(count // folders):
            os.close(os.open(tmp_path / f"{k}" / f"{n:06d}.jpg", os.O_CREAT))
    began = time.monotonic()
    assert len(list_images(tmp_path)) == count
    assert time.monotonic() - began < 2 + count / 30_000


@pytest.mark.parametrize("rows", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_a_long_list_is_read_with_little_memory(rows, tmp_path):
    """At most 1 kB per row, most of it for a moment only."""
    write_faces(tmp_path, 1)
    with open(tmp_path / "list.csv", "w") as file:
        file.write("path,label,split\n")
        file.writelines(
            f"good000.png,{n % 7},{'test' * (n % 10 == 0) or 'train'}\n" for n in range(rows)
        )
    began = time.monotonic()
    tracemalloc.start()
    try:
        assert len(open_images(tmp_path / "list.csv").source) == rows * 9 // 10
        assert tracemalloc.get_traced_memory()[1] < 10**6 + 1000 * rows
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 2 + rows / 10_000
