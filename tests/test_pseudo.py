"""Pseudo-labels: training on a classifier's predictions for unlabelled images."""

import csv

import numpy as np
import pytest

import main_finetune
import main_predict
from datasets.folder import ImageFiles, list_images
from datasets.labelled import Concatenated, LabelledImages
from datasets.pseudo import read_pseudo_labels, with_pseudo_labels
from engine_train import Trainer
from exported import export
from finetuned import RAF_NAMES, assert_close, config, evaluate, measured, results
from layouts import picture, save
from runs import assert_same_run, finetune_options, load, log, run_here, stop_in_mid_epoch
from util.errors import BAD_INPUT, DONE, RESUMABLE, BadInput

CLASSES = ("Happy", "Sad", "Fear")
HEADER = "path,face,left,top,width,height,score,label,status,p_sadness,p_fear,p_Anger,p_Happy"


def faces(folder, count=4):
    """Images 0.png, 1.png, … of different expressions."""
    for k in range(count):
        save(picture(("Happy", "Sad", "Fear")[k % 3], k, "train", 32, True), folder / f"{k}.png")
    return folder


def written(folder, *rows, header=HEADER):
    path = folder / "pseudo.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_probabilities_are_matched_to_classes_by_name(tmp_path):
    faces(tmp_path / "more")
    path = written(
        tmp_path,
        "./more/2.png,0,0,0,9,9,1,Happy,ok,0.1,0.2,0.3,0.4",
        "more/3.png,0,0,0,9,9,1,Anger,ok,0.1,0.2,0.4,0.3",
        "more/0.png,,,,,,,,unreadable,,,,",
        "more/1.png,0,0,0,9,9,1.000000,sadness,ok,0.5,0.0,0.0,0.5",
    )
    images, lines = read_pseudo_labels(path, CLASSES)
    expected = [[0.4 / 0.7, 0.1 / 0.7, 0.2 / 0.7], [0.5, 0.5, 0]]
    np.testing.assert_allclose(images.targets, expected, rtol=1e-6)
    assert images.labels.tolist() == [0, 0]
    assert [images.source.name(i) for i in range(2)] == [
        str(tmp_path / "more" / name) for name in ("2.png", "1.png")
    ]
    assert lines == [
        f"--pseudo_labels {path}: 2 images (Happy 2, Sad 0, Fear 0), mean confidence 54 %",
        f"--pseudo_labels {path}: 1 rows without probabilities are left out",
        f"--pseudo_labels {path}: 1 images of other classes are left out",
    ]


def test_paths_are_relative_to_the_file_or_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    faces(tmp_path / "more", 2)
    rows = [f"more/{k}.png,0,0,0,9,9,1,Sad,ok,1,0,0,0" for k in range(2)]
    path = written(tmp_path / "lists", *rows)
    with pytest.raises(BadInput, match="missing"):
        read_pseudo_labels(path, CLASSES)
    monkeypatch.chdir(tmp_path)
    images, _ = read_pseudo_labels(path, CLASSES)
    assert images.source.name(1) == str(tmp_path / "more" / "1.png")
    faces(tmp_path / "lists" / "more", 2)
    images, _ = read_pseudo_labels(path, CLASSES)
    assert images.source.name(1) == str(tmp_path / "lists" / "more" / "1.png")


GOOD = "more/0.png,0,0,0,9,9,1,Sad,ok,1,0,0,0"


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("file,p_Happy", [GOOD], "no column `path`"),
        ("path,p_Happy,p_Anger", ["more/0.png,0.5,0.5"], "no column p_Sad, p_Fear"),
        (HEADER, [], "no row with probabilities"),
        (HEADER, ["more/0.png,0,0,0,9,9,1,A,ok,0,0,1,0"], "of these classes; .* other classes"),
        (HEADER, [GOOD, "./" + GOOD], "several faces in one picture"),
        (
            HEADER,
            ["more/0.png,0,0,0,9,9,0.1,Sad,ok,1,0,0,0"],
            "row 2: a face detected in a picture",
        ),
        (
            HEADER,
            [GOOD, "more/1.png,0,0,0,9,9,1,Sad,ok,1,0,0,x"],
            "row 3: p_Happy must be a prob",
        ),
        (HEADER, ["more/0.png,0,0,0,9,9,1,Sad,ok,-1,0,0,2"], "row 2: p_sadness must be a prob"),
        (HEADER, ["more/0.png,0,0,0,9,9,1,Sad,ok,0.5,,0,0.5"], "row 2: p_fear must be a prob"),
        (HEADER, ["more/0.png,0,0,0,9,9,1,Sad,ok,nan,0,0,1"], "p_sadness must be a prob"),
        (HEADER, ["more/0.png,0,0,0,9,9,1,Sad,ok,0,0,0,0"], "all probabilities are 0"),
        (
            HEADER,
            ["gone/0.png,0,0,0,9,9,1,Sad,ok,1,0,0,0"],
            "1 of 1 images it names are missing; .*/gone/0.png: paths are relative to",
        ),
        ("p_Happy,p_Sad,p_Fear,path", ["1,0,0"], "row 2: has no path"),
    ],
)
def test_invalid_files_are_refused(header, rows, message, tmp_path):
    faces(tmp_path / "more")
    path = written(tmp_path, *rows, header=header)
    with pytest.raises(BadInput, match=message) as caught:
        read_pseudo_labels(path, CLASSES)
    assert str(caught.value).startswith(f"--pseudo_labels {path}")


def test_a_missing_file_is_named():
    with pytest.raises(BadInput, match=r"--pseudo_labels none\.csv"):
        read_pseudo_labels("none.csv", CLASSES)


def test_votes_are_kept_beside_pseudo_labels(tmp_path):
    files = ImageFiles(list_images(faces(tmp_path / "more", 2)))
    votes = LabelledImages(files, [0, 1], [[0.6, 0.4, 0], [0, 0.7, 0.3]])
    more, _ = read_pseudo_labels(written(tmp_path, GOOD), CLASSES)
    np.testing.assert_allclose(
        with_pseudo_labels(votes, more).targets, [[0.6, 0.4, 0], [0, 0.7, 0.3], [0, 1, 0]]
    )


def test_joined_images_keep_their_order_and_their_targets(tmp_path):
    first = list_images(faces(tmp_path / "a", 2))
    known = LabelledImages(ImageFiles(first), [2, 1])
    faces(tmp_path / "more", 3)
    rows = [f"more/{k}.png,0,0,0,9,9,1,Sad,ok,0.25,0,0,0.75" for k in (2, 0, 1)]
    more, _ = read_pseudo_labels(written(tmp_path, *rows), CLASSES)
    both = with_pseudo_labels(known, more)
    assert isinstance(both.source, Concatenated)
    names = [both.source.name(i).removeprefix(f"{tmp_path}/") for i in range(len(both))]
    assert names == ["a/0.png", "a/1.png", "more/2.png", "more/0.png", "more/1.png"]
    for i, source, k in ((1, known.source, 1), (2, more.source, 0), (4, more.source, 2)):
        np.testing.assert_array_equal(both.source.image(i), source.image(k))
    np.testing.assert_array_equal(both.targets[:2], [[0, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(both.targets[2:], [[0.75, 0.25, 0]] * 3)
    assert both.labels.tolist() == [2, 1, 0, 0, 0]
    others = [f"more/{k}.png,0,0,0,9,9,1,Sad,ok,0.3,0,0,0.7" for k in (2, 0, 1)]
    less, _ = read_pseudo_labels(written(tmp_path, *others), CLASSES)
    assert len({both.digest, known.digest, with_pseudo_labels(known, less).digest}) == 3


@pytest.fixture(scope="module")
def answered(finetune, tmp_path_factory):
    """A fine-tuned run, and its predictions for images without labels."""
    folder, run = tmp_path_factory.mktemp("answered"), finetune()
    faces(folder / "more", 10)
    argv = ["--checkpoint", run / "checkpoint-last.pth", "--detector", "none", folder / "more"]
    assert run_here(main_predict, [*map(str, argv), "--output", str(folder / "more.csv")]) == DONE
    return run, folder / "more.csv"


def options(sets, run, folder, more):
    source = f"--data_path {sets / 'rafdb'} --finetune {run / 'checkpoint-last.pth'}"
    return finetune_options(folder, "vit", f"{source} {more}")


def test_a_run_learns_from_pseudo_labels_and_reports_it(sets, answered, tmp_path, capfd):
    run, path = answered
    argv = options(sets, run, tmp_path / "run", f"--pseudo_labels {path}")
    assert run_here(main_finetune, argv) == DONE
    said = capfd.readouterr().out
    assert f"--pseudo_labels {path}: 10 images (" in said
    known = config(run)["data"]["count"]
    assert f"{known + 10} images of {sets / 'rafdb'} and {path}, " in said
    told = config(tmp_path / "run")["data"]
    assert (told["count"], told["pseudo_labelled"]) == (known + 10, 10)
    result = results(tmp_path / "run")
    assert result["train_images"] == known + 10
    assert result["pseudo_labels"] == f"10 of {known + 10} training images, {path}"
    assert "pseudo_labels" not in results(run)
    assert load(tmp_path / "run")["classes"] == list(RAF_NAMES)
    assert all(np.isfinite(line["train_loss"]) for line in log(tmp_path / "run"))

    best = tmp_path / "run" / "checkpoint-best.pth"
    again = evaluate(
        best, tmp_path / "eval", f"--data_path {sets / 'rafdb'} --pseudo_labels {path}"
    )
    assert "--pseudo_labels has no effect" in capfd.readouterr().out
    assert_close(measured(again), measured(result))
    assert export(best, "safetensors", tmp_path / "exported") == DONE
    card = (tmp_path / "exported" / "README.md").read_text().replace("\\", "")
    assert "also trained on the pseudo-labels of more.csv" in card


def test_a_run_resumes_exactly_but_only_with_the_same_pseudo_labels(
    sets, answered, tmp_path, capfd
):
    run, path = answered
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    more = f"--pseudo_labels {path} --epochs 2 --warmup_epochs 0"
    assert run_here(main_finetune, options(sets, run, whole, more)) == DONE
    argv = options(sets, run, halves, more)
    usual = stop_in_mid_epoch()
    try:
        assert run_here(main_finetune, argv) == RESUMABLE
    finally:
        Trainer._step = usual
    assert run_here(main_finetune, argv) == DONE
    assert_same_run(halves, whole)
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    other = tmp_path / "other.csv"
    with open(other, "w", newline="") as file:
        csv.writer(file).writerows(rows[:-1])
    (tmp_path / "more").symlink_to(path.parent / "more")
    changed = options(sets, run, halves, f"--pseudo_labels {other} --epochs 3 --warmup_epochs 0")
    assert run_here(main_finetune, changed) == BAD_INPUT
    assert "66 train and 21 test images before, 65 train and 21 test" in capfd.readouterr().err


def test_test_images_among_the_pseudo_labelled_are_reported(sets, answered, tmp_path, capfd):
    run, path = answered
    with open(run / "predictions.csv", newline="") as file:
        test = next(csv.DictReader(file))["path"]
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    rows[1][0] = test
    leaking = tmp_path / "leaking.csv"
    with open(leaking, "w", newline="") as file:
        csv.writer(file).writerows(rows[:2])
    more = f"--pseudo_labels {leaking} --epochs 1 --warmup_epochs 0"
    assert run_here(main_finetune, options(sets, run, tmp_path / "run", more)) == DONE
    assert f"warning: 1 of {results(tmp_path / 'run')['n']} images of test are in train, too" in (
        capfd.readouterr().out
    )
