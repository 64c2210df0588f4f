"""Every program uses a checkpoint as it was trained, or reports where it does not."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

import main_finetune
import main_predict
import main_pretrain
import main_visualize
from datasets import open_labelled
from datasets.faces.detection import open_detector
from exported import export
from finetuned import RAF_NAMES, assert_close, config, evaluate, measured, predictions, results
from inference.page_picture import Finder
from inference.predict import Predictor
from layouts import clear_votes, write_ferplus_csv, write_folder
from models_saved import open_autoencoder, open_classifier, open_saved
from runs import FAMILIES, SMALL, finetune_options, load, run_here, run_two
from util.errors import BAD_INPUT, DONE
from util.options.parser import Options
from util.options.trained import differences, trained_with
from util.report.page import write_report

ORDER = "Sad,Anger,Happy"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Class folders called 0, 1, 2."""
    root = tmp_path_factory.mktemp("numbered")
    return write_folder(root, {"train": 4, "test": 3}, ["0", "1", "2"], drawn=False)


@pytest.fixture(scope="module")
def disputed(tmp_path_factory):
    """FERPlus with ambiguous votes for every other test image, so that label rules differ."""
    votes = [clear_votes(k % 8) for k in range(24)]
    doubtful = [0, 4, 4, 0, 0, 0, 0, 0, 1, 1]
    votes += [doubtful if k % 2 else clear_votes(k % 8) for k in range(16)]
    return write_ferplus_csv(tmp_path_factory.mktemp("disputed"), 2, 1, 2, votes=votes)


# Data set and options of a training, each of which a default would silently replace.
TRAINED = {
    "margin": ("affectnet", "--face_margin 0.5"),
    "seven": ("affectnet", "--nb_classes 7"),
    "rule": ("ferplus", "--label_rule majority"),
    "crop": ("rafdb", "--crop_pct 0.6 --imagenet_default_mean_and_std False"),
    "flip": ("rafdb", "--eval_flip"),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_evaluation_repeats_what_training_measured(kind, sets, finetune, tmp_path):
    data, more = TRAINED[kind]
    run = finetune(more=more, data=data)
    result = evaluate(run / "checkpoint-best.pth", tmp_path, f"--data_path {sets / data}")
    assert_close(measured(result), measured(results(run)))
    assert predictions(tmp_path) == predictions(run)
    assert result["differs_from_training"] == {}
    assert [result[key] for key in ("data", "rule", "split", "flip")] == [
        results(run)[key] for key in ("data", "rule", "split", "flip")
    ]


def test_numbered_folders_mean_the_same_classes_as_in_training(numbered, finetune, tmp_path, capfd):
    run = finetune(more=f"--label_order {ORDER}", data=numbered)
    capfd.readouterr()
    result = evaluate(run / "checkpoint-best.pth", tmp_path, f"--data_path {numbered}")
    assert_close(measured(result), measured(results(run)))
    told = f"numbered as in --label_order 0:{ORDER}: 0 Sad, 1 Anger, 2 Happy"
    assert told in capfd.readouterr().out
    assert "--label_order" in results(run)["report"][-1]


def test_the_label_rule_of_training_is_used(disputed, finetune, tmp_path, capfd):
    run = finetune(more="--label_rule majority", data=disputed)
    assert results(run)["n"] == 8
    again = evaluate(run / "checkpoint-best.pth", tmp_path / "a", f"--data_path {disputed}")
    assert_close(measured(again), measured(results(run)))
    given = f"--data_path {disputed} --label_rule argmax"
    result = evaluate(run / "checkpoint-best.pth", tmp_path / "b", given)
    assert result["n"] == 16
    differ = {"label_rule": {"tested": "argmax", "trained": "majority"}}
    assert result["differs_from_training"] == differ
    said = capfd.readouterr().out
    assert "tested with --label_rule argmax; trained with --label_rule majority" in said


@pytest.mark.parametrize(
    ("kind", "given", "name", "tested", "trained"),
    [
        ("margin", "--face_margin 0", "face_margin", 0.0, 0.5),
        ("crop", "--crop_pct 1", "crop_pct", 1.0, 0.6),
        ("crop", "--input_size 48", "input_size", 48, 32),
        ("flip", "--eval_flip False", "eval_flip", False, True),
    ],
)
def test_a_given_option_overrides_that_of_training_and_is_reported(
    kind, given, name, tested, trained, sets, finetune, tmp_path, capfd
):
    data, more = TRAINED[kind]
    run = finetune(more=more, data=data)
    capfd.readouterr()
    checkpoint = run / "checkpoint-best.pth"
    result = evaluate(checkpoint, tmp_path, f"--data_path {sets / data} {given}")
    assert result["differs_from_training"] == {name: {"tested": tested, "trained": trained}}
    assert result["log_loss"] != results(run)["log_loss"]
    told = f"warning: tested with --{name} {tested:g}; trained with --{name} {trained:g}"
    assert told.replace("eval_flip 0", "eval_flip False").replace("flip 1", "flip True") in (
        capfd.readouterr().out
    )
    assert f"Tested with {name}" in (tmp_path / "report.html").read_text()


def test_images_of_a_class_that_the_model_lacks_are_left_out_and_reported(
    sets, finetune, tmp_path, capfd
):
    data, more = TRAINED["seven"]
    run = finetune(more=more, data=data)
    result = evaluate(
        run / "checkpoint-best.pth", tmp_path, f"--data_path {sets / data} --nb_classes 8"
    )
    assert result["differs_from_training"] == {"nb_classes": {"tested": 8, "trained": 7}}
    assert result["left_out"] == {"images": {"Contempt": 1}, "answers": []}
    assert "left out: 1 image of Contempt, a class that the model" in capfd.readouterr().out
    assert "1 images of Contempt, unknown" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--model vit_small_patch16", "--model vit_tiny_patch16"),
        ("--model convnextv2_atto", "--model vit_tiny_patch16"),
        ("--patch_size 8", "--patch_size 16"),
        ("--cls_token", "--cls_token False"),
        ("--linear_probe", "--linear_probe False"),
    ],
)
def test_an_option_that_does_not_fit_the_weights_is_refused(
    given, named, sets, finetune, tmp_path, capfd
):
    checkpoint = finetune() / "checkpoint-best.pth"
    for program in ("--eval", "--knn"):
        options = f"{program} --finetune {checkpoint} --data_path {sets / 'rafdb'} {given}"
        code = run_here(main_finetune, [*options.split(), "--output_dir", str(tmp_path / "out")])
        assert code == BAD_INPUT
        line = capfd.readouterr().err
        assert f"{given.split()[0]} " in line
        assert f"was trained with {named}; leave the option out" in line


def test_the_same_options_as_in_training_may_be_repeated(sets, finetune, tmp_path):
    checkpoint = finetune() / "checkpoint-best.pth"
    more = "--model mae_vit_tiny_patch16 --input_size 32 --patch_size 16 --global_pool"
    result = evaluate(checkpoint, tmp_path, f"--data_path {sets / 'rafdb'} {more}")
    assert result["differs_from_training"] == {}
    assert_close(measured(result), measured(results(finetune())))


def test_face_crops_for_a_model_trained_without_them_are_reported(sets, finetune, tmp_path):
    checkpoint = finetune() / "checkpoint-best.pth"
    result = evaluate(checkpoint, tmp_path, f"--data_path {sets / 'affectnet'}")
    differ = {"face_margin": {"tested": 0.15, "trained": None}}
    assert result["differs_from_training"] == differ
    back = finetune(data="affectnet") / "checkpoint-best.pth"
    result = evaluate(back, tmp_path / "back", f"--data_path {sets / 'rafdb'}")
    assert result["differs_from_training"]["face_margin"] == {"tested": None, "trained": 0.15}


def test_two_processes_use_a_checkpoint_as_trained_too(sets, finetune, tmp_path):
    run = finetune(more=TRAINED["margin"][1], data="affectnet")
    options = f"--eval --finetune {run / 'checkpoint-best.pth'} --data_path {sets / 'affectnet'}"
    run_two("main_finetune", f"{options} --num_workers 0 --output_dir {tmp_path}".split())
    assert_close(measured(results(tmp_path)), measured(results(run)))


def test_outputs_without_names_get_those_of_the_data_or_of_an_option(
    sets, finetune, tmp_path, capfd
):
    run = finetune()
    content = load(run, "checkpoint-best.pth")
    torch.save({"model": content["model"]}, tmp_path / "weights.pth")
    foreign = f"--model vit_tiny_patch16 --input_size 32 --data_path {sets / 'rafdb'}"
    result = evaluate(tmp_path / "weights.pth", tmp_path / "a", foreign)
    assert "names no classes: taken to be Surprise, Fear" in capfd.readouterr().out
    assert_close(measured(result), measured(results(run)))
    turned = ",".join(RAF_NAMES[::-1])
    result = evaluate(tmp_path / "weights.pth", tmp_path / "b", f"{foreign} --classes {turned}")
    assert result["classes"] == list(RAF_NAMES[::-1])
    rows = zip(predictions(tmp_path / "b"), predictions(run), strict=True)
    names = dict(zip(RAF_NAMES, RAF_NAMES[::-1], strict=True))
    assert all(ours["prediction"] == names[trained["prediction"]] for ours, trained in rows)
    capfd.readouterr()
    result = evaluate(run / "checkpoint-best.pth", tmp_path / "c", f"{foreign} --classes {turned}")
    own = ",".join(RAF_NAMES)
    assert result["differs_from_training"] == {"classes": {"tested": turned, "trained": own}}
    said = f"warning: tested with --classes {turned}; trained with --classes {own}"
    assert said in capfd.readouterr().out


def test_testing_other_weights_than_training_did_is_reported(sets, finetune, tmp_path, capfd):
    run = finetune(more="--model_ema --model_ema_decay 0.5")
    data, best = f"--data_path {sets / 'rafdb'}", run / "checkpoint-best.pth"
    result = evaluate(best, tmp_path / "a", f"{data} --model_key model_ema")
    differ = {"model_key": {"tested": "model_ema", "trained": "model"}}
    assert (result["differs_from_training"], result["weights"]) == (differ, "model_ema")
    capfd.readouterr()
    again = evaluate(best, tmp_path / "b", f"{data} --model_ema --model_ema_eval --select val")
    assert_close(measured(again), measured(results(run)))
    said = capfd.readouterr().out
    assert "--model_ema_eval has no effect: this checkpoint's results are of its model;" in said
    assert "--select val has no effect: it chooses an epoch in training" in said


def test_an_order_in_another_spelling_is_the_same(numbered, finetune, tmp_path):
    run = finetune(more=f"--label_order {ORDER}", data=numbered)
    more = f"--data_path {numbered} --label_order"
    for k, same in enumerate(("sadness,Angry,joy", "0:Sad,Anger,Happy")):
        result = evaluate(run / "checkpoint-best.pth", tmp_path / str(k), f"{more} {same}")
        assert result["differs_from_training"] == {}
    for before, now, same in (("sad,anger", "0:Sad,Anger", True), ("1:a,b", "0:a,b", False)):
        found = differences(Options(), {"label_order": before}, {"label_order": now})
        assert (not found) == same


def test_label_options_of_another_test_set_are_stored(sets, disputed, numbered, finetune, tmp_path):
    test = f"--eval_data_path {disputed} --label_rule majority"
    run = finetune(more=test)
    assert (results(run)["n"], config(run)["options"]["label_rule"]) == (8, "majority")
    result = evaluate(run / "checkpoint-best.pth", tmp_path / "a", f"--data_path {disputed}")
    assert_close(measured(result), measured(results(run)))
    assert result["rule"] == results(run)["rule"]
    run = finetune(more=f"--eval_data_path {numbered} --label_order {ORDER}")
    assert results(run)["classes"] == ["Happy", "Sad", "Anger"]
    result = evaluate(run / "checkpoint-best.pth", tmp_path / "b", f"--data_path {numbered}")
    assert_close(measured(result), measured(results(run)))
    run = finetune(more=f"--eval_data_path {sets / 'affectnet'} --face_margin 0.3")
    assert config(run)["options"]["face_margin"] == 0.3
    assert load(run)["preprocessing"]["face_margin"] is None


def test_the_input_size_must_fit_the_checkpoints_patch_size(sets, finetune, tmp_path, capfd):
    run, data = tmp_path / "run", f"--data_path {sets / 'rafdb'}"
    options = finetune_options(run, "vit", f"{data} --patch_size 8 --epochs 1 --warmup_epochs 0")
    assert run_here(main_finetune, options) == DONE
    evaluate(run / "checkpoint-best.pth", tmp_path / "a", f"{data} --input_size 40")
    options = f"--eval --finetune {run / 'checkpoint-best.pth'} {data} --input_size 36"
    code = run_here(main_finetune, [*options.split(), "--output_dir", str(tmp_path / "b")])
    assert code == BAD_INPUT
    assert "--input_size 36: not a multiple of the patch size, 8" in capfd.readouterr().err


def test_options_of_vits_are_ignored_for_a_convnext(sets, finetune, tmp_path, capfd):
    run = finetune("convnext", "--linear_probe --lr 0.5 --batch_size 8")
    capfd.readouterr()
    options = f"--data_path {sets / 'rafdb'} --freeze_pos_embed"
    evaluate(run / "checkpoint-best.pth", tmp_path, options)
    assert "cls_token" not in capfd.readouterr().out


# Training that begins with a checkpoint


@pytest.fixture(scope="module")
def wide(sets, tmp_path_factory):
    """A pre-training of 48 px on faces cut with a margin."""
    folder = tmp_path_factory.mktemp("wide")
    data = f"--data_path {sets / 'affectnet'} --face_margin 0.4 --num_workers 0 --epochs 1"
    options = f"{SMALL} {FAMILIES['mae']} {data} --output_dir {folder}"
    assert run_here(main_pretrain, options.split()) == DONE
    return folder / "checkpoint-last.pth"


def test_pre_training_stores_how_its_images_were_cropped(wide, sets):
    saved = load(wide.parent)
    assert saved["args"]["face_margin"] == saved["preprocessing"]["face_margin"] == 0.4
    assert trained_with(saved, wide)["input_size"] == 48
    assert open_autoencoder(wide).preprocessing.face_margin == 0.4


def test_nearest_neighbours_use_images_as_in_training(wide, sets, tmp_path, capfd):
    options = f"--knn --finetune {wide} --data_path {sets / 'affectnet'} --num_workers 0"
    assert run_here(main_finetune, f"{options} --output_dir {tmp_path / 'a'}".split()) == DONE
    said = capfd.readouterr().out
    assert "from the checkpoint: --model mae_vit_tiny_patch16, " in said
    assert "--input_size 48" in said
    assert "margin 0.4" in results(tmp_path / "a")["data"]
    assert results(tmp_path / "a")["differs_from_training"] == {}
    given = "--face_margin 0 --input_size 32"
    assert run_here(main_finetune, f"{options} {given} --output_dir {tmp_path / 'b'}".split()) == 0
    assert results(tmp_path / "b")["differs_from_training"] == {
        "face_margin": {"tested": 0.0, "trained": 0.4},
        "input_size": {"tested": 32, "trained": 48},
    }


def without_size(options):
    """Options of fine-tuning, without --input_size."""
    at = options.index("--input_size")
    return options[:at] + options[at + 2 :]


@pytest.mark.parametrize("more", ["", "--input_size 32", "--linear_probe", "--freeze_backbone"])
def test_training_from_a_checkpoint_uses_images_as_that_did(more, wide, sets, tmp_path, capfd):
    data = f"--data_path {sets / 'affectnet'} --finetune {wide} {more}"
    options = without_size(finetune_options(tmp_path, "vit", data))
    assert run_here(main_finetune, options) == DONE
    saved = load(tmp_path)
    assert saved["args"]["face_margin"] == saved["preprocessing"]["face_margin"] == 0.4
    given = "--input_size" in more
    size = 32 if given else 48
    assert saved["args"]["input_size"] == saved["preprocessing"]["input_size"] == size
    said = capfd.readouterr().out
    assert f" M parameters, {size} px;" in said
    assert ("from the checkpoint: --input_size 48" in said) == (not given)
    warned = "warning: fine-tuned with --input_size 32; pre-trained with --input_size 48" in said
    assert warned == given
    assert run_here(main_finetune, [*options, "--epochs", "3"]) == DONE  # resumed
    assert load(tmp_path)["epoch"] == 2


def test_a_size_that_does_not_fit_the_model_is_not_taken_from_a_checkpoint(
    pretrained, wide, tmp_path, capfd
):
    """The error is about the model, not about an option that nobody gave."""
    options = finetune_options(tmp_path / "a", "convnext", f"--finetune {wide}")
    assert run_here(main_finetune, without_size(options)) == BAD_INPUT
    said = capfd.readouterr().err
    assert "holds vit_tiny_patch16 " in said
    assert "--input_size" not in said
    saved = load(pretrained["resnet"].parent)
    saved["args"]["input_size"] = 10**6
    torch.save(saved, tmp_path / "huge.pth")
    more = f"--data_path synthetic:8:8 --epochs 1 --finetune {tmp_path / 'huge.pth'}"
    options = [*finetune_options(tmp_path / "b", "resnet", more), "--disable_eval"]
    assert run_here(main_finetune, without_size(options)) == DONE
    assert load(tmp_path / "b")["args"]["input_size"] == 224


def test_fine_tuning_with_another_margin_is_reported(wide, sets, tmp_path, capfd):
    data = f"--data_path {sets / 'affectnet'} --finetune {wide} --face_margin 0"
    assert run_here(main_finetune, finetune_options(tmp_path, "vit", data)) == DONE
    said = capfd.readouterr().out
    assert "warning: fine-tuned with --face_margin 0; pre-trained with --face_margin 0.4" in said


# The other programs


@pytest.fixture(scope="module")
def margin(finetune):
    """A classifier whose faces were cut with a margin of 0.5."""
    return finetune(more=TRAINED["margin"][1], data="affectnet") / "checkpoint-best.pth"


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photograph") / "astronaut.png"
    Image.fromarray(astronaut()).save(path)
    return path


def predict(checkpoint, photograph, output, *options, code=DONE):
    argv = [photograph, "--checkpoint", checkpoint, "--num_workers", 0, "--output", output]
    assert run_here(main_predict, [str(arg) for arg in (*argv, *options)]) == code
    return output.read_text() if code == DONE else ""


def test_prediction_crops_faces_as_training_did(margin, finetune, photograph, tmp_path, capfd):
    rows = [
        predict(margin, photograph, tmp_path / f"{k}.csv", *options)
        for k, options in enumerate(([], ["--face_margin", 0.5], ["--face_margin", 0.15]))
    ]
    assert rows[0] == rows[1] != rows[2]
    said = capfd.readouterr().err
    assert said.count("faces are cropped with --face_margin 0.5, as in training") == 2
    cropped = "warning: faces are cropped with --face_margin 0.15; trained with --face_margin 0.5"
    assert cropped in said
    predict(finetune() / "checkpoint-best.pth", photograph, tmp_path / "raf.csv")
    said = capfd.readouterr().err
    assert "--face_margin 0.15 (assumed: the checkpoint does not say)" in said


def test_prediction_without_a_detector_reports_how_training_cropped(
    margin, photograph, tmp_path, capfd
):
    predict(margin, photograph, tmp_path / "rows.csv", "--detector", "none")
    said = capfd.readouterr().err
    assert "training cropped faces from photographs with --face_margin 0.5" in said
    options = ["--detector", "none", "--face_margin", 0.5]
    predict(margin, photograph, tmp_path / "rows.csv", *options, code=BAD_INPUT)
    assert "--face_margin: without a detector" in capfd.readouterr().err


def test_prediction_averages_over_mirrored_faces_if_the_evaluation_did(finetune):
    saved = open_classifier(finetune(more=TRAINED["flip"][1]) / "checkpoint-best.pth")
    face = astronaut()[:200, 130:330]
    p = Predictor(saved, "cpu").of_faces([face, face[:, ::-1]]).probabilities
    np.testing.assert_allclose(p[0], p[1], atol=1e-5)
    assert saved.flip


def test_the_page_crops_faces_as_training_did(margin, photograph):
    detect, saved = open_detector("mtcnn"), open_classifier(margin)
    wide, narrow = Finder(detect), Finder(detect, 0.15)
    (face,), line = wide.crop(wide.open(photograph), saved)
    (less,), _ = narrow.crop(narrow.open(photograph), saved)
    assert face.shape[0] / less.shape[0] == pytest.approx(2 / 1.3, rel=0.02)
    assert line == "faces are cropped with --face_margin 0.5, as in training"


def test_the_page_says_when_a_picture_is_used_whole(margin, finetune, photograph):
    finder, saved = Finder(open_detector("none"), 0.5), open_classifier(margin)
    picture = finder.open(photograph)
    (face,), line = finder.crop(picture, saved)
    assert face.shape == astronaut().shape
    assert picture.line == "The whole picture is used as one face."
    assert line.startswith("warning: each picture is used whole, but training cropped faces")
    assert line.endswith("--face_margin 0.5: give pictures cropped in the same way")
    _, line = finder.crop(picture, open_classifier(finetune() / "checkpoint-best.pth"))
    assert line == ""


def test_figures_use_images_as_in_training(margin, finetune, sets, tmp_path, capfd):
    argv = ["--checkpoint", margin, "--data_path", sets / "affectnet", "--figures", "confusion"]
    argv += ["--num_workers", 0, "--output_dir", tmp_path]
    assert run_here(main_visualize, list(map(str, argv))) == DONE
    chart = "figures/confusion_matrix.png"
    assert (tmp_path / chart).read_bytes() == (margin.parent / chart).read_bytes()
    assert "margin 0.5" in capfd.readouterr().out
    assert run_here(main_visualize, [*map(str, argv), "--face_margin", "0"]) == DONE
    said = capfd.readouterr().out
    assert "warning: drawn with --face_margin 0; trained with --face_margin 0.5" in said


def test_exported_models_know_how_faces_were_cropped(margin, sets, finetune, tmp_path):
    folder = tmp_path / "out"
    assert export(margin, "safetensors", folder) == DONE
    config = json.loads((folder / "config.json").read_text())
    assert config["preprocessing"]["face_margin"] == 0.5
    card = (folder / "README.md").read_text()
    assert "with 0.5 of the box's longer side added on each side" in re.sub(r"\\", "", card)
    saved = open_saved(folder / "model.safetensors")
    assert saved.preprocessing.face_margin == 0.5
    data = f"--data_path {sets / 'affectnet'}"
    result = evaluate(folder / "model.safetensors", tmp_path / "eval", data)
    assert_close(measured(result), measured(results(margin.parent)))


def test_an_exported_model_knows_its_label_rule(sets, finetune, tmp_path):
    run = finetune(more=TRAINED["rule"][1], data="ferplus")
    assert export(run / "checkpoint-best.pth", "safetensors", tmp_path / "out") == DONE
    data = f"--data_path {sets / 'ferplus'}"
    result = evaluate(tmp_path / "out" / "model.safetensors", tmp_path / "eval", data)
    assert_close(measured(result), measured(results(run)))


# Files of older releases, and files with invalid values


def older(path, new):
    """The checkpoint as older releases wrote it, without resolved options of the data."""
    content = load(path.parent, path.name)
    for name in ("nb_classes", "face_margin", "label_rule", "label_order"):
        content["args"][name] = None
    del content["preprocessing"]["face_margin"], content["trained_on"]
    torch.save(content, new)
    return new


def test_older_checkpoints_are_used_with_the_defaults_of_their_release(sets, finetune, tmp_path):
    run = finetune(data="affectnet")
    path = older(run / "checkpoint-best.pth", tmp_path / "older.pth")
    result = evaluate(path, tmp_path / "out", f"--data_path {sets / 'affectnet'}")
    assert_close(measured(result), measured(results(run)))
    assert result["differs_from_training"] == {}
    assert open_classifier(path).preprocessing.face_margin is None


@pytest.mark.parametrize("to", ["safetensors", "timm"])
def test_an_export_of_an_older_checkpoint_adds_no_settings(to, sets, finetune, tmp_path):
    run = finetune(data="affectnet")
    path = older(run / "checkpoint-best.pth", tmp_path / "older.pth")
    assert export(path, to, tmp_path / "out") == DONE
    weights = tmp_path / "out" / "model.safetensors"
    result = evaluate(weights, tmp_path / "eval", f"--data_path {sets / 'affectnet'}")
    assert_close(measured(result), measured(results(run)))
    assert result["differs_from_training"] == {}
    assert "face_margin" not in open_saved(weights).checkpoint["preprocessing"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("face_margin", "0.5"),
        ("face_margin", -1.0),
        ("face_margin", float("nan")),
        ("label_rule", ["majority"]),
        ("label_rule", "a\nb"),
        ("input_size", 10**12),
        ("input_size", True),
        ("crop_pct", 0),
        ("eval_flip", 1),
        ("nb_classes", -7),
    ],
)
def test_invalid_values_in_a_checkpoint_are_refused_by_name(
    name, value, sets, finetune, tmp_path, capfd
):
    content = load(finetune(), "checkpoint-best.pth")
    content["args"][name] = value
    torch.save(content, tmp_path / "odd.pth")
    options = f"--eval --finetune {tmp_path / 'odd.pth'} --data_path {sets / 'rafdb'}"
    code = run_here(main_finetune, f"{options} --output_dir {tmp_path / 'out'}".split())
    assert code == BAD_INPUT
    assert f"holds an invalid {name}: " in capfd.readouterr().err


def test_the_report_mentions_missing_images(sets, finetune, tmp_path):
    shutil.copytree(sets / "rafdb", tmp_path / "rafdb")
    for path in sorted((tmp_path / "rafdb").rglob("test_*.jpg"))[::3]:
        path.unlink()
    checkpoint = finetune() / "checkpoint-best.pth"
    result = evaluate(checkpoint, tmp_path / "out", f"--data_path {tmp_path / 'rafdb'}")
    told = "7 of 21 images named in list_patition_label.txt are missing"
    assert any(told in line for line in result["report"])
    assert told in (tmp_path / "out" / "report.html").read_text()
    assert open_labelled(str(tmp_path / "rafdb")).splits["test"].source is not None
    write_report(tmp_path / "out")
    assert config(finetune())["data"]["count"] == 56
