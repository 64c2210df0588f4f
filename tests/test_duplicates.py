"""Images that are in two splits, byte for byte, are found and reported by every program."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import main_finetune
import main_pack
import main_pretrain
import main_visualize
from datasets import duplicates as module
from datasets import open_labelled
from datasets.duplicates import duplicate_warnings
from datasets.labelled import FaceFiles, LabelledImages
from datasets.packed.store_writer import Parts
from finetuned import evaluate, results
from layouts import write_fer2013, write_folder, write_rafdb
from runs import FAMILIES, SMALL, finetune_options, run_here


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """RAF-DB whose test images 2 and 5 are training images under other names."""
    root = write_rafdb(tmp_path_factory.mktemp("leaky"), 4, 2)
    aligned = root / "basic" / "Image" / "aligned"
    for test, train in ((2, 9), (5, 12)):
        source = aligned / f"train_{train:05d}_aligned.jpg"
        shutil.copy(source, aligned / f"test_{test:05d}_aligned.jpg")
    return root


def lines(root):
    return duplicate_warnings(open_labelled(str(root)).splits)


def test_equal_files_are_counted_and_the_first_is_named(leaky):
    (line,) = lines(leaky)
    assert line.startswith("warning: 2 of 14 images of test are in train, too, byte for byte")
    assert "test_00002_aligned.jpg equals " in line
    assert line.endswith("train_00009_aligned.jpg)")


def test_clean_data_sets_give_no_line(tmp_path):
    assert lines(write_rafdb(tmp_path, 2, 1)) == []


def test_files_of_equal_size_are_distinguished_by_content(tmp_path):
    write_folder(tmp_path, {"train": 2, "test": 1}, ["happy", "sad"], drawn=False)
    for k, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        noise = np.random.default_rng(k).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(noise).save(path.with_suffix(".bmp"))  # all of the same size
        path.unlink()
    assert len({path.stat().st_size for path in tmp_path.rglob("*.bmp")}) == 1
    assert lines(tmp_path) == []


def test_only_files_of_equal_size_are_read(leaky, tmp_path, monkeypatch):
    write_folder(tmp_path, {"train": 6, "test": 1}, ["happy", "sad"], drawn=False)
    for k, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        path.write_bytes(bytes(100 + k))
    read = []
    monkeypatch.setattr(module, "_hash", lambda place: read.append(place) or b"x")
    assert lines(tmp_path) == []
    assert read == []


def test_three_splits_are_compared_pair_by_pair(tmp_path):
    write_folder(tmp_path, {"train": 2, "val": 2, "test": 2}, ["happy", "sad"], drawn=False)
    first = next((tmp_path / "train" / "happy").iterdir())
    for split in ("val", "test"):
        shutil.copy(first, tmp_path / split / "sad" / "again.png")
    told = lines(tmp_path)
    assert [line.split(" images of ")[1].split(",")[0] for line in told] == [
        "val are in train",
        "test are in train",
        "test are in val",
    ]


def test_rows_of_a_table_are_compared_by_their_pixels(tmp_path):
    path = write_fer2013(tmp_path, 1, 1, 1) / "fer2013.csv"
    rows = path.read_text().splitlines()
    rows[-1] = ",".join([rows[-1].split(",")[0], rows[1].split(",")[1], "PrivateTest"])
    path.write_text("\n".join(rows))
    (line,) = lines(tmp_path)
    assert "1 of 7 images of test are in train" in line
    assert f"fer2013.csv:{len(rows)} equals fer2013.csv:2" in line


def test_missing_and_odd_files_are_skipped(tmp_path):
    write_folder(tmp_path, {"train": 1, "test": 1}, ["happy", "sad"], drawn=False)
    data = open_labelled(str(tmp_path))
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    os.mkfifo(tmp_path / "train" / "happy" / "0000.png")  # must not block
    assert duplicate_warnings(data.splits) == []


def test_for_many_files_packing_is_recommended_instead(leaky, monkeypatch):
    monkeypatch.setattr(module, "MOST_FILES", 20)
    (line,) = lines(leaky)
    assert "not checked for images that are in two splits: more than 20 files" in line
    assert line.endswith("; main_pack.py finds them")


def test_photographs_are_compared_regardless_of_face_boxes(leaky):
    data = open_labelled(str(leaky))
    files = data.splits["train"].source.files
    splits = {}
    for k, split in enumerate(("train", "test")):
        boxes = np.full((len(files), 4), 10 + k)
        splits[split] = LabelledImages(FaceFiles(files, boxes, 0.1), np.zeros(len(files)))
    (line,) = duplicate_warnings(splits)
    assert "28 of 28 images of test are in train" in line


# Every program


TOLD = "warning: 2 of 14 images of test are in train, too, byte for byte"


def test_training_and_evaluation_report_and_record_duplicates(leaky, finetune, tmp_path, capfd):
    options = finetune_options(tmp_path / "run", "vit", f"--data_path {leaky}")
    assert run_here(main_finetune, options) == 0
    assert TOLD in capfd.readouterr().out
    assert any(TOLD in line for line in results(tmp_path / "run")["report"])
    checkpoint = tmp_path / "run" / "checkpoint-best.pth"
    result = evaluate(checkpoint, tmp_path / "eval", f"--data_path {leaky}")
    assert TOLD in capfd.readouterr().out
    assert any(TOLD in line for line in result["report"])
    options = f"--knn --finetune {checkpoint} --data_path {leaky} --num_workers 0"
    assert run_here(main_finetune, f"{options} --output_dir {tmp_path / 'knn'}".split()) == 0
    assert TOLD in capfd.readouterr().out
    argv = ["--checkpoint", checkpoint, "--data_path", leaky, "--figures", "confusion"]
    argv += ["--num_workers", 0, "--output_dir", tmp_path / "figures"]
    assert run_here(main_visualize, list(map(str, argv))) == 0
    assert TOLD in capfd.readouterr().out


def test_a_probe_during_pre_training_reports_duplicates(leaky, tmp_path, capfd):
    options = f"{SMALL} {FAMILIES['mae']} --num_workers 0 --epochs 1 --output_dir {tmp_path}"
    options += f" --data_path {leaky} --probe_data_path {leaky}"
    assert run_here(main_pretrain, options.split()) == 0
    said = capfd.readouterr().out
    assert TOLD in said
    assert "only the training images are used, not test" in said


def test_packing_finds_duplicates_among_any_number_of_files_and_records_them(
    leaky, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(module, "MOST_FILES", 20)
    argv = ["--data_path", leaky, "--output", tmp_path / "store", "--num_workers", 0]
    assert run_here(main_pack, list(map(str, argv))) == 0
    assert TOLD in capfd.readouterr().out
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    (line,) = manifest["duplicates"]
    assert line.startswith(TOLD)
    assert any(TOLD in note for note in open_labelled(str(tmp_path / "store")).notes)


def test_an_interrupted_packing_still_finds_duplicates(leaky, tmp_path, capfd):
    argv = ["--data_path", leaky, "--output", tmp_path / "store", "--num_workers", 0]
    argv = list(map(str, argv))
    with pytest.MonkeyPatch.context() as stopped:
        add, count = Parts.add, []

        def end_after_some(parts, image):
            if len(count) == 20:
                raise KeyboardInterrupt
            count.append(1)
            add(parts, image)
            parts.keep()

        stopped.setattr(Parts, "add", end_after_some)
        assert run_here(main_pack, argv) == 1
    assert run_here(main_pack, argv) == 0
    assert TOLD in capfd.readouterr().out
