"""Faulty data: files that are not images, that vanish or change, and disks that fail."""

import os
import re
import threading
import time

import pytest
from PIL import Image

import main_finetune
import main_pack
from datasets import decode, open_images
from datasets.decode import UnreadableImage, load_rgb
from datasets.packed.store import PackedImages
from odd_images import GOOD, UNREADABLE, encoded, noise, write_faces, write_odd
from runs import assert_same_run, command, finish, load, pretrain, run_here, same, status
from util.errors import BAD_INPUT, DONE, FAULT

READABLE = GOOD + 6
# After an exception, torch takes seconds to end a run's workers.
WORKERS = [0, pytest.param(1, marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return write_odd(tmp_path_factory.mktemp("odd") / "faces")


def bad_images(folder):
    """bad_images.txt: the reason by the file's name."""
    path = folder / "bad_images.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return {os.path.basename(name): reason for name, reason in (li.split("\t") for li in lines)}


def assert_all_told(found):
    assert found.keys() == UNREADABLE.keys()
    for name, words in UNREADABLE.items():
        assert words in found[name]


def test_a_run_on_odd_files_succeeds_and_names_the_unreadable_ones(odd, tmp_path):
    """In a separate process, because waiting for a FIFO would hang it."""
    out = tmp_path / "out"
    said = finish(command(out, more=f"--data_path {odd} --num_workers 2 --epochs 1"))
    assert_all_told(bad_images(out))
    assert status(out) == "done"
    assert f"{READABLE + len(UNREADABLE)} images of" in said
    for name in UNREADABLE:
        assert said.count(f"cannot read {odd / name}: ") == 1
    page = (out / "report.html").read_text()
    assert f"Unreadable images: {len(UNREADABLE)}" in page
    memory = max(
        float(line.split("mem ")[1].split()[0]) for line in said.splitlines() if "mem " in line
    )
    assert memory < 4, "GB; the bomb's pixels would be 1.2 GB a time"


def test_a_list_of_odd_files_is_read_like_their_folder(odd, tmp_path):
    names = [*UNREADABLE, "folder.jpg", *(f"good{k:03d}.png" for k in range(GOOD))]
    (odd / "list.txt").write_text("\n".join(names))
    source, found = open_images(odd / "list.txt").source, {}
    for i in range(len(source)):
        try:
            source.image(i)
        except UnreadableImage as error:
            found[os.path.basename(source.name(i))] = error.reason
    assert found.pop("folder.jpg") == "is a folder"
    assert_all_told(found)


def test_packing_leaves_out_unreadable_files_and_records_why(odd, tmp_path):
    store = tmp_path / "store"
    options = ["--data_path", odd, "--output", store, "--num_workers", 2, "--data_set", "none"]
    assert run_here(main_pack, list(map(str, options))) == DONE
    images = PackedImages(store)
    left_out = {item["image"]: item["reason"] for item in images.manifest["left_out"]}
    assert_all_told(left_out)
    assert len(images) == READABLE


def test_fine_tuning_replaces_unreadable_images_and_does_not_test_on_them(tmp_path):
    data = tmp_path / "data"
    for split, count in (("train", 30), ("test", 3)):
        for name in ("happy", "sad"):
            write_faces(data / split / name, count)
    os.mkfifo(data / "train" / "sad" / "fifo.jpg")
    os.mkfifo(data / "test" / "sad" / "fifo.jpg")
    (data / "test" / "happy" / "page.jpg").write_bytes(b"<html>")
    out = tmp_path / "out"
    options = (
        f"--model convnextv2_atto --input_size 32 --batch_size 4 --epochs 1 --data_path {data}"
    )
    more = f"--num_workers 1 --warmup_epochs 0 --output_dir {out}"
    assert run_here(main_finetune, f"{options} {more}".split()) == DONE
    assert bad_images(out) == {"fifo.jpg": "is not a regular file"}
    text = (out / "eval.json").read_text()
    assert '"unreadable": 2' in text
    assert '"n": 6' in text


# Faults during a run: a thread causes them once the first epoch is in log.txt.


class Meanwhile(threading.Thread):
    def __init__(self, out, action):
        super().__init__(daemon=True)
        self.out, self.action, self.done = out, action, False

    def run(self):
        while not (self.out / "log.txt").exists():
            time.sleep(0.005)
        self.action()
        self.done = True


def pretrain_meanwhile(out, data, action=lambda: None, epochs=4):
    """A small run, with `action` after its first epoch; -> its exit code."""
    thread = Meanwhile(out, action)
    thread.start()
    more = f"--data_path {data} --epochs {epochs} --print_freq 2 --num_workers 1"
    code = pretrain(out, more)
    thread.join(10)
    assert thread.done
    return code


@pytest.fixture
def faces(tmp_path):
    return write_faces(tmp_path / "faces", 64)


def test_files_that_vanish_or_break_during_training_are_reported_and_replaced(faces, tmp_path):
    def spoil():
        (faces / "good003.png").unlink()
        whole = (faces / "good004.png").read_bytes()
        (faces / "good004.png").write_bytes(whole[: len(whole) // 2])
        Image.new("RGB", (90, 20), "red").save(
            faces / "good005.png"
        )  # another image, but a good one

    out = tmp_path / "out"
    assert pretrain_meanwhile(out, faces, spoil) == DONE
    found = bad_images(out)
    assert found.keys() == {"good003.png", "good004.png"}
    assert found["good003.png"] == "No such file or directory"
    assert "truncated" in found["good004.png"]


def test_a_short_disk_outage_changes_nothing(faces, tmp_path):
    def stumble():
        os.rename(faces, tmp_path / "away")
        time.sleep(0.3)
        os.rename(tmp_path / "away", faces)

    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    assert pretrain_meanwhile(out, faces, stumble) == DONE
    assert bad_images(out) == {}
    assert pretrain_meanwhile(undisturbed, faces) == DONE
    a, b = load(out), load(undisturbed)
    assert same(a["model"], b["model"])


@pytest.mark.parametrize("workers", WORKERS)
def test_a_lasting_disk_outage_is_a_fault_and_the_same_command_resumes(
    faces, tmp_path, monkeypatch, capfd, workers
):
    monkeypatch.setattr(decode, "RETRY_AFTER", (0.01,))
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    options = f"--data_path {faces} --epochs 4 --num_workers {workers}"
    thread = Meanwhile(out, lambda: os.rename(faces, tmp_path / "away"))
    thread.start()
    assert pretrain(out, options) == FAULT
    thread.join(10)
    [line] = capfd.readouterr().err.strip().splitlines()
    assert "20 files in a row" in line
    assert str(faces) in line
    assert re.search(r"newest checkpoint: epoch \d, step \d+; the same command resumes", line)
    assert status(out) == "failed"
    os.rename(tmp_path / "away", faces)
    assert pretrain(out, options) == DONE
    assert pretrain(undisturbed, options) == DONE
    assert_same_run(out, undisturbed)


def test_a_file_that_reappears_is_read_and_waiting_for_others_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_in_vain", 0)
    monkeypatch.setattr(decode, "MOST_IN_VAIN", 1)
    path, away = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(noise(8, 9, 3)).save(away)
    threading.Timer(0.25, os.rename, (away, path)).start()
    assert load_rgb(path).shape == (8, 9, 3)
    waited = []
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(UnreadableImage, match="No such file"):
            load_rgb(tmp_path / "never.png")
        waited.append(time.monotonic() - began)
    assert sum(decode.RETRY_AFTER) < waited[0] < 5
    assert waited[1] < 0.05


def test_healthy_reading_never_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("slept"))
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    (tmp_path / "a.jpg").write_bytes(encoded(noise(8, 8, 3)))
    load_rgb(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImage):
        load_rgb(tmp_path / "page.jpg")


def test_a_missing_or_truncated_part_of_a_store_is_unreadable(faces, tmp_path):
    """Tested before any pixel is read, as the system keeps the bytes of parts mapped already."""
    store = tmp_path / "store"
    pack = ["--data_path", faces, "--output", store, "--data_set", "none", "--num_workers", 0]
    assert run_here(main_pack, list(map(str, pack))) == DONE
    images, part = PackedImages(store), store / "part-00000.bin"
    size = part.stat().st_size
    part.unlink()
    with pytest.raises(UnreadableImage, match="No such file") as error:
        images.image(0)
    assert error.value.of_disk
    part.write_bytes(bytes(size - 1))
    with pytest.raises(UnreadableImage, match="bytes instead of"):
        images.image(0)


@pytest.mark.parametrize("workers", WORKERS)
def test_mostly_unreadable_images_are_bad_input_in_one_line(faces, tmp_path, capfd, workers):
    for k in range(1, 64):
        (faces / f"good{k:03d}.png").write_bytes(b"<html>")
    more = f"--data_path {faces} --num_workers {workers}"
    assert pretrain(tmp_path / "out", more) == BAD_INPUT
    [line] = capfd.readouterr().err.strip().splitlines()
    assert "20 files in a row are not images" in line
    assert "is a web page" in line
