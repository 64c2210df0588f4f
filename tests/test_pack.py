"""Writing a packed store: always the same bytes, despite interruptions and full disks."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

import disks
import main_pack
from datasets import open_images, open_labelled
from datasets.packed import store_writer
from datasets.packed.pack import ToPack
from datasets.packed.store import JOURNAL, PackedImages
from layouts_affectnet import write_affectnet_csv
from runs import launched, run_here, start
from util.errors import BAD_INPUT, FAULT, RESUMABLE, BadInput

SHORT = ["--short_side", "40", "--data_set", "none"]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """60 images of noise in different shapes, two of them unreadable."""
    folder = tmp_path_factory.mktemp("data") / "faces"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(60):
        height, width = rng.integers(30, 90, 2)
        noise = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{k:02d}.png")
    (folder / "11.png").write_bytes(b"")
    (folder / "42.png").write_bytes(b"<html>quota exceeded</html>")
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    """Make stores have several parts and a journal that is written after every image."""
    monkeypatch.setattr(store_writer, "PART_BYTES", 80_000)
    monkeypatch.setattr(store_writer, "KEEP_EVERY", 0.0)


def pack(data, output, *more, workers=0):
    options = ["--data_path", data, "--output", output, "--num_workers", workers, *SHORT, *more]
    return run_here(main_pack, list(map(str, options)))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def undisturbed(faces, tmp_path, small_parts):
    """The bytes of a store written by one process without interruption."""
    assert pack(faces, tmp_path / "undisturbed") == 0
    return contents(tmp_path / "undisturbed")


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_several_processes_write_the_same_bytes_as_one(faces, tmp_path, undisturbed):
    assert sum(name.startswith("part-") for name in undisturbed) > 2
    assert pack(faces, tmp_path / "store", workers=3) == 0
    assert contents(tmp_path / "store") == undisturbed


def test_unreadable_images_are_left_out_and_listed_with_the_reason(faces, tmp_path, undisturbed):
    store = PackedImages(tmp_path / "undisturbed")
    assert store.manifest["left_out"] == [
        {"image": "11.png", "reason": "is empty (0 bytes)"},
        {"image": "42.png", "reason": "is a web page, not an image"},
    ]
    assert len(store) == 58
    assert [store.name(i) for i in (10, 11, 40, 41)] == ["10.png", "12.png", "41.png", "43.png"]
    assert "2 unreadable ones left out" in store.described()


def test_labels_of_unreadable_images_are_left_out(sets, tmp_path):
    data = shutil.copytree(sets / "rafdb", tmp_path / "rafdb")
    bad = data / "basic/Image/aligned/train_00003_aligned.jpg"
    bad.write_bytes(b"\xff\xd8broken")
    assert pack(data, tmp_path / "store", "--data_set", "auto") == 0
    own, packed = open_labelled(str(data)).splits, open_labelled(str(tmp_path / "store")).splits
    names = [own["train"].source.name(i) for i in range(56)]
    kept = [i for i, name in enumerate(names) if name != str(bad)]
    assert len(packed["train"]) == len(kept) == 55
    assert np.array_equal(packed["train"].labels, own["train"].labels[kept])
    assert np.array_equal(packed["test"].labels, own["test"].labels)
    assert packed["train"].source.name(54) == os.path.relpath(names[kept[54]], data)


def test_more_than_five_percent_unreadable_images_end_packing(faces, tmp_path, capfd):
    data = shutil.copytree(faces, tmp_path / "faces")
    for k in (1, 2):
        (data / f"{k:02d}.png").write_bytes(b"")
    assert pack(data, tmp_path / "store") == BAD_INPUT
    error = capfd.readouterr().err
    assert "4 of 60 images cannot be read, more than 5%" in error
    assert error.count("\n") == 1
    for path in data.iterdir():
        path.write_bytes(b"")
    assert pack(data, tmp_path / "other") == BAD_INPUT
    assert "none of the 32 images tried can be read" in capfd.readouterr().err


# Interrupted


def kill_at(monkeypatch, number):
    """Kill this process at the `number`-th call that advances a store; -> the count of calls."""
    count = [0]

    def dying(function):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in (
        (os, "fsync"),
        (os, "replace"),
        (os, "unlink"),
        (store_writer.Parts, "add"),
    ):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    return count


def pack_and_die(faces, output, number):
    """Pack in a process that dies at a call."""

    def work():
        kill_at(pytest.MonkeyPatch(), number)
        os._exit(pack(faces, output))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode in (-signal.SIGKILL, 0)
    return process.exitcode


def test_packing_killed_anywhere_resumes_to_the_same_bytes(faces, tmp_path, undisturbed):
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = kill_at(monkeypatch, 0)
        assert pack(faces, tmp_path / "counted") == 0
    # At the start, in the middle, and at every call near the end.
    ending = calls[0] - 18
    for number in [*range(1, 6), *range(6, ending, 31), *range(ending, calls[0] + 1)]:
        output = tmp_path / f"killed-{number}"
        assert pack_and_die(faces, output, number) == -signal.SIGKILL
        assert pack(faces, output) == 0
        assert contents(output) == undisturbed, number


def test_packing_killed_repeatedly_still_finishes(faces, tmp_path, undisturbed):
    rounds = 0
    while pack_and_die(faces, tmp_path / "store", 60):
        rounds += 1
    assert rounds > 2
    assert contents(tmp_path / "store") == undisturbed


@pytest.fixture
def unfinished(faces, tmp_path, undisturbed):
    """A store whose packing was killed in its second part or later."""
    output = tmp_path / "unfinished"
    pack_and_die(faces, output, 100)
    assert (output / "part-00001.bin").exists()
    assert (output / JOURNAL).exists()
    return output


def test_data_missing_from_the_journal_are_written_again(faces, unfinished, undisturbed):
    """As after a power cut: pixels missing from the journal, half a line, half a file."""
    last = sorted(unfinished.glob("part-*"))[-1]
    with open(last, "ab") as file:
        file.write(b"\x55" * 100_000)
    with open(unfinished / JOURNAL, "ab") as file:
        file.write(b"[[40, 4")
    (unfinished / ".index.npy.1.tmp").write_bytes(b"half")
    assert pack(faces, unfinished) == 0
    assert contents(unfinished) == undisturbed


def test_an_unfinished_store_is_refused_by_training_and_by_verify(unfinished, capfd):
    with pytest.raises(BadInput, match="is unfinished: rerun the same main_pack"):
        open_images(str(unfinished))
    assert run_here(main_pack, ["--verify", str(unfinished)]) == BAD_INPUT
    assert "is unfinished" in capfd.readouterr().err


def test_packing_resumes_with_the_same_images_and_options_only(
    faces, unfinished, undisturbed, tmp_path, capfd
):
    assert pack(faces, unfinished, "--short_side", 32) == BAD_INPUT
    assert "holds a store of short_side 40, not 32" in capfd.readouterr().err
    other = shutil.copytree(faces, tmp_path / "other")
    (other / "59.png").rename(other / "60.png")
    assert pack(other, unfinished) == BAD_INPUT
    assert "holds a store of other images" in capfd.readouterr().err
    assert pack(faces, unfinished) == 0
    assert "resuming after" in capfd.readouterr().out
    assert contents(unfinished) == undisturbed


def test_a_part_that_has_become_shorter_is_named(faces, unfinished, capfd):
    (unfinished / "part-00000.bin").write_bytes(b"short")
    assert pack(faces, unfinished) == BAD_INPUT
    assert "part-00000.bin is shorter than it was" in capfd.readouterr().err


def stopped_by(number, output):
    """Pack into `output` with two workers and send the process a signal soon."""
    options = f"--data_path synthetic:2000:8 --output {output} --num_workers 2 --short_side 64"
    process = start(launched("main_pack.py", options.split()))
    for line in process.stdout:
        if "are free" in line:
            break
    time.sleep(0.3)
    process.send_signal(number)
    return process, process.communicate(timeout=60)[0]


def test_packing_resumes_at_once_after_being_killed_or_stopped(tmp_path):
    process, said = stopped_by(signal.SIGKILL, tmp_path / "store")
    assert process.returncode == -signal.SIGKILL, said
    process, said = stopped_by(signal.SIGTERM, tmp_path / "store")
    assert process.returncode == RESUMABLE, said
    assert said.count("asked to stop") == 1
    done = int(said.split("asked to stop (SIGTERM) after ")[1].split()[0])
    assert len(parts_of(tmp_path / "store" / JOURNAL)) == done


def parts_of(journal):
    """The images recorded in a journal."""
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    return [item for entry in entries[1:] for item in entry]


def test_two_processes_cannot_pack_into_one_folder(faces, unfinished, capfd):
    with open(unfinished / JOURNAL, "r+") as journal:
        fcntl.lockf(journal, fcntl.LOCK_EX)
        second = multiprocessing.get_context("fork").Process(
            target=lambda: os._exit(pack(faces, unfinished))
        )
        second.start()
        second.join(60)
    assert second.exitcode == BAD_INPUT
    assert "another process is packing into it" in capfd.readouterr().err


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB."""
    with disks.small_disk(tmp_path / "disk", "200k") as folder:
        yield folder


def test_a_full_disk_gives_one_error_line_and_packing_can_resume(
    faces, small_disk, undisturbed, monkeypatch, capfd
):
    with monkeypatch.context() as patch:
        patch.setattr(ToPack, "estimated_bytes", lambda self: 1000)
        assert pack(faces, small_disk / "store") == FAULT
    error = capfd.readouterr().err
    assert "cannot be written (No space left on device)" in error
    assert "fix it, then rerun the same command to resume" in error
    assert error.count("\n") == 1
    disks.remount(small_disk, "size=2m")
    assert pack(faces, small_disk / "store") == 0
    assert "resuming after" in capfd.readouterr().out
    assert contents(small_disk / "store") == undisturbed


def test_too_small_a_disk_is_refused_before_anything_is_written(faces, small_disk, capfd):
    assert pack(faces, small_disk / "store") == BAD_INPUT
    captured = capfd.readouterr()
    assert "kB more are needed" in captured.err or "MB more are needed" in captured.err
    assert "are free" in captured.out
    assert not (small_disk / "store").exists()


def test_the_estimated_size_is_about_right(faces, tmp_path, undisturbed):
    data = ToPack([open_images(str(faces)).source], 40)
    size = sum(len(data) for name, data in undisturbed.items() if name.startswith("part-"))
    assert data.estimated_bytes() == pytest.approx(size, rel=0.1)


# Output folders


def test_files_and_folders_with_other_content_are_refused_as_output(faces, tmp_path, capfd):
    (tmp_path / "file").write_text("precious")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert pack(faces, output) == BAD_INPUT
        assert f"--output {output}: is a file or in one" in capfd.readouterr().err
    assert pack(faces, tmp_path) == BAD_INPUT
    assert f"--output {tmp_path}: holds other files" in capfd.readouterr().err
    assert pack(faces, faces) == BAD_INPUT
    assert (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert pack(faces, tmp_path / "empty") == 0


def test_label_options_are_refused_for_images_without_labels(faces, tmp_path, capfd):
    assert pack(faces, tmp_path / "store", "--label_rule", "argmax") == BAD_INPUT
    assert "--label_rule: these images are packed without labels" in capfd.readouterr().err


def test_a_finished_store_is_not_changed(faces, tmp_path, undisturbed, capfd):
    store = tmp_path / "undisturbed"
    (store / JOURNAL).write_text("")  # as if killed after the manifest was written
    assert pack(faces, store) == 0
    assert "is already packed" in capfd.readouterr().out
    assert pack(faces, store, "--short_side", 20) == BAD_INPUT
    assert "short_side 40, not 20" in capfd.readouterr().err
    assert contents(store) == undisturbed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--data_path is missing"),
        (["--data_path", "synthetic"], "--output is missing"),
        (["--verify"], "--verify: name the store"),
        (["--verify", "/nowhere/at/all"], "--verify /nowhere/at/all: is not a packed store"),
        (["--data_path", "/nowhere/at/all", "--output", "x"], "--data_path /nowhere"),
        (["--data_path", "synthetic", "--output", "x", "--short_side", "-1"], "--short_side"),
        (["--data_path", "synthetic", "--output", "x", "--short_side", "9"], "--short_side"),
        (["--data_path", "synthetic", "--output", "x", "--data_set", "y"], "--data_set y"),
    ],
)
def test_wrong_options_are_named(options, expected, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output_dir").mkdir()  # of a training run: must not be written to
    assert run_here(main_pack, options) == BAD_INPUT
    error = capfd.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert not list((tmp_path / "output_dir").iterdir())


def test_a_store_read_with_seven_classes_reports_what_it_leaves_out(tmp_path):
    counts = {"train": (1, 1, 1, 1, 1, 1, 1, 3), "test": (1,) * 7 + (2,)}
    write_affectnet_csv(tmp_path / "set", counts)
    argv = ["--data_path", tmp_path / "set", "--output", tmp_path / "store", "--num_workers", 0]
    assert run_here(main_pack, list(map(str, argv))) == 0
    notes = open_labelled(str(tmp_path / "store"), nb_classes=7).notes
    told = "train: left out 3 Contempt; the lines above are about all 8 classes"
    assert notes[-2:] == (told, "test: left out 2 Contempt")
