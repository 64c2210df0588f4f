"""`--eval`: with any number of processes, from any checkpoint, across data sets."""

import re
import shutil
from collections import Counter

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from sklearn.linear_model import LogisticRegression

import main_finetune
from datasets import open_labelled, plain
from datasets.transforms import Normalise
from finetuned import (
    AFF_NAMES,
    EVERYTHING,
    RAF_NAMES,
    assert_close,
    evaluate,
    measured,
    predictions,
    results,
    unaugmented,
)
from models_registry import create_classifier
from runs import run_here, run_two
from util.weights import load_pretrained

# --- evaluation ---


@pytest.mark.parametrize("more", ["", "--dist_eval False --eval_flip --amp bf16"])
def test_two_processes_evaluate_like_one(more, sets, finetune, tmp_path):
    checkpoint = finetune("convnext", EVERYTHING) / "checkpoint-best.pth"
    more = f"--data_path {sets / 'rafdb'} {more}"
    one, two = tmp_path / "one", tmp_path / "two"
    expected = evaluate(checkpoint, one, more)
    options = f"--eval --finetune {checkpoint} --output_dir {two} --num_workers 1 --batch_size 4"
    run_two("main_finetune", f"{options} {more}".split())
    assert_close(results(two), expected)
    assert results(two)["confusion_matrix"] == expected["confusion_matrix"]
    assert [row["path"] for row in predictions(two)] == [row["path"] for row in predictions(one)]
    assert len({row["path"] for row in predictions(two)}) == 21
    for a, b in zip(predictions(two), predictions(one), strict=True):
        assert (a["label"], a["prediction"]) == (b["label"], b["prediction"])


def test_evaluation_obeys_amp_and_flip(sets, finetune, tmp_path):
    checkpoint = finetune("vit") / "checkpoint-best.pth"
    data = f"--data_path {sets / 'rafdb'}"
    usual = evaluate(checkpoint, tmp_path / "usual", data)
    half = evaluate(checkpoint, tmp_path / "half", f"{data} --amp bf16")
    assert half["log_loss"] != usual["log_loss"]
    assert half["log_loss"] == pytest.approx(usual["log_loss"], abs=0.02)

    model = create_classifier("vit_tiny_patch16", 7, 32)
    load_pretrained(model, checkpoint, keep_head=True)
    x, labels = unaugmented(sets / "rafdb", "test")
    with torch.no_grad():
        p = (model.eval()(x).softmax(1) + model(x.flip(3)).softmax(1)) / 2
    flipped = evaluate(checkpoint, tmp_path / "flipped", f"{data} --eval_flip")
    expected = float(-p[torch.arange(21), torch.from_numpy(labels)].log().mean())
    assert flipped["log_loss"] == pytest.approx(expected, abs=1e-5)
    assert flipped["log_loss"] != usual["log_loss"]
    assert (flipped["flip"], usual["flip"]) == (True, False)


@pytest.mark.parametrize(("family", "more"), [("vit", ""), ("convnext", EVERYTHING)])
def test_our_checkpoints_are_evaluated_without_model_options(
    family, more, sets, finetune, tmp_path
):
    folder = finetune(family, more)
    result = evaluate(folder / "checkpoint-best.pth", tmp_path, f"--data_path {sets / 'rafdb'}")
    assert_close(measured(result), measured(results(folder)))
    assert result["epoch"] == results(folder)["epoch"]
    assert result["weights"] == ("model_ema" if more else "model")


def test_without_finetune_the_best_checkpoint_of_the_output_dir_is_evaluated(
    sets, finetune, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(finetune(), folder)
    options = f"--eval --data_path {sets / 'rafdb'} --output_dir {folder} --num_workers 0"
    assert run_here(main_finetune, options.split()) == 0
    written = results(folder / "eval" / "checkpoint-best-rafdb")
    assert_close(measured(written), measured(results(finetune())))


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("vit_tiny_patch16", "vit_tiny_patch16_224", {"img_size": 32, "global_pool": "avg"}),
        ("convnextv2_atto", "convnextv2_atto", {}),
    ],
)
def test_a_timm_checkpoint_has_the_same_accuracy_as_in_timm(ours, theirs, options, sets, tmp_path):
    torch.manual_seed(3)
    model = timm.create_model(theirs, num_classes=7, **options).eval()
    head = model.get_classifier()
    torch.nn.init.normal_(head.weight, std=0.5)
    x, labels = unaugmented(sets / "rafdb", "test")
    with torch.no_grad():
        logits = model(x)
        head.bias -= logits.mean(0)  # else all predictions would be of one class
        p = model(x).softmax(1)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    more = f"--model {ours} --input_size 32 --data_path {sets / 'rafdb'}"
    result = evaluate(tmp_path / "timm.pth", tmp_path / "out", more)
    right = (p.argmax(1).numpy() == labels).mean()
    assert result["accuracy"] == pytest.approx(100 * right)
    rows = predictions(tmp_path / "out")
    found = np.array([[float(row[f"p_{name}"]) for name in RAF_NAMES] for row in rows])
    np.testing.assert_allclose(found, p, atol=2e-4)


# --- across data sets ---


def affectnet_truth(root):
    """The expression of every validation image, by name, from the owners' list."""
    lines = (root / "Manually_Annotated_file_lists" / "validation.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    return {row[0]: AFF_NAMES[int(row[6])] for row in rows}


def assert_counts_only(folder, truth, names):
    """predictions.csv has the images of `truth` only, and eval.json the metrics that follow."""
    rows, result = predictions(folder), results(folder)
    assert len(rows) == len(truth) == result["n"]
    right = Counter()
    for row in rows:
        name = next(name for path, name in truth.items() if row["path"].endswith(path))
        assert row["label"] == name
        p = {n: float(row[f"p_{n}"]) for n in names}
        assert sum(p.values()) == pytest.approx(1, abs=1e-5)
        assert p[row["prediction"]] == max(p.values())
        right[name] += row["prediction"] == name
    assert [key for key in rows[0] if key.startswith("p_")] == [f"p_{n}" for n in names]
    assert result["classes"] == list(names)
    assert result["accuracy"] == pytest.approx(100 * right.total() / len(rows))
    recalls = [right[n] / sum(t == n for t in truth.values()) for n in names]
    assert result["uar"] == pytest.approx(100 * np.mean(recalls))


@pytest.mark.parametrize("flag", ["--data_path", "--eval_data_path"])
def test_a_model_of_seven_classes_is_tested_on_seven_of_affectnets_eight(
    flag, sets, finetune, tmp_path
):
    checkpoint = finetune() / "checkpoint-best.pth"
    data = f"--data_path {sets / 'rafdb'}" if flag == "--eval_data_path" else ""
    result = evaluate(checkpoint, tmp_path, f"{data} {flag} {sets / 'affectnet'}")
    truth = affectnet_truth(sets / "affectnet")
    common = {path: name for path, name in truth.items() if name != "Contempt"}
    assert len(common) == 14
    assert_counts_only(tmp_path, common, RAF_NAMES)
    assert result["data"].startswith("AffectNet-8")


def test_a_model_of_eight_classes_is_tested_on_rafdbs_seven(sets, finetune, tmp_path):
    checkpoint = finetune(data="affectnet") / "checkpoint-best.pth"
    evaluate(checkpoint, tmp_path, f"--data_path {sets / 'rafdb'}")
    list_file = sets / "rafdb" / "basic" / "EmoLabel" / "list_patition_label.txt"
    rows = [line.split() for line in list_file.read_text().splitlines()]
    truth = {
        name.replace(".jpg", "_aligned.jpg"): RAF_NAMES[int(label) - 1]
        for name, label in rows
        if name.startswith("test")
    }
    assert_counts_only(tmp_path, truth, AFF_NAMES[:7])


def test_training_can_be_tested_on_ferplus_with_a_label_rule(sets, finetune):
    folder = finetune(more=f"--eval_data_path {sets / 'ferplus'} --label_rule majority")
    result = results(folder)
    assert result["data"] == "FERPlus, CSV files"
    assert "--label_rule majority" in result["rule"]
    assert (result["n"], result["classes"]) == (14, list(RAF_NAMES))
    assert {row["label"] for row in predictions(folder)} == set(RAF_NAMES)


# --- unknown classes, and classes in another order ---


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """A classifier that tells 7 expressions by the colour of an image, mostly right.

    Its features are untrained: only a head is fitted to the images of `coloured`.
    """
    root = tmp_path_factory.mktemp("knowing")
    folder = coloured(root / "data", RAF_NAMES, 48)
    torch.manual_seed(0)
    model = create_classifier("vit_tiny_patch16", 7, 32, global_pool="token").eval()
    images = open_labelled(str(folder)).splits["test"]
    view = plain(32)
    pixels = torch.stack([view(images.source.image(i)) for i in range(len(images))])
    names = open_labelled(str(folder)).classes
    with torch.no_grad():
        x = model.forward_features(Normalise()(pixels)).numpy()
    fitted = LogisticRegression(C=1e4, max_iter=2000).fit(x, images.labels)
    order = [names.index(name) for name in RAF_NAMES]
    model.head.weight.data = torch.tensor(fitted.coef_[order], dtype=torch.float32)
    model.head.bias.data = torch.tensor(fitted.intercept_[order], dtype=torch.float32)
    torch.save(model.state_dict(), root / "weights.pth")
    return root / "weights.pth", folder


def coloured(root, names, per_class, called=None):
    """A test split whose classes differ in colour, with a little noise."""
    rng = np.random.default_rng(1)
    shades = dict(zip(RAF_NAMES, np.linspace(20, 235, 7), strict=True))
    for name in names:
        folder = root / "test" / (called or {}).get(name, name)
        folder.mkdir(parents=True)
        for k in range(per_class):
            shade = shades[name] + rng.normal(0, 9)
            pixels = np.full((16, 16, 3), np.clip(shade, 0, 255), np.uint8)
            Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


FOREIGN = "--crop_pct 1 --classes"


def test_a_misspelt_class_folder_is_reported_on_screen_and_in_the_results(knowing, tmp_path, capfd):
    path, _ = knowing
    data = coloured(tmp_path / "data", RAF_NAMES, 8, {"Surprise": "Suprise"})
    names = f"{FOREIGN} {','.join(RAF_NAMES)}"
    result = evaluate(path, tmp_path / "out", f"--data_path {data} --data_set folder {names}")
    assert (result["n"], len(result["classes"])) == (48, 6)
    assert result["left_out"] == {"images": {"Suprise": 8}, "answers": ["Surprise"]}
    said = capfd.readouterr().out
    assert (
        "left out: 8 images of Suprise, a class that the model does not know; did you mean" in said
    )
    assert "left out: the model's Surprise, which the data set does not have" in said
    assert "Suprise (did you mean Surprise?) is not a known expression" in said
    report = (tmp_path / "out" / "report.html").read_text()
    assert "8 images of Suprise, unknown to the model" in report


def test_a_right_order_of_classes_is_not_doubted(knowing, tmp_path, capfd):
    path, data = knowing
    result = evaluate(path, tmp_path, f"--data_path {data} {FOREIGN} {','.join(RAF_NAMES)}")
    assert result["accuracy"] > 75
    assert "better_class_order" not in result
    assert "another order" not in capfd.readouterr().out


def test_a_wrong_order_of_a_foreign_models_classes_is_found_and_corrected(knowing, tmp_path, capfd):
    path, data = knowing
    wrong = [*AFF_NAMES[:7]]
    result = evaluate(path, tmp_path / "a", f"--data_path {data} {FOREIGN} {','.join(wrong)}")
    assert result["accuracy"] < 40
    said = capfd.readouterr().out
    assert "warning: the classes are probably in another order" in said
    told = re.search(r"if the model's outputs are misnamed: (--classes=\S+)", said)[1]
    assert told == f"--classes={','.join(RAF_NAMES)}"
    right = evaluate(path, tmp_path / "b", f"--data_path {data} --crop_pct 1 {told}")
    assert right["accuracy"] == pytest.approx(result["better_class_order"]["accuracy"])
    assert right["accuracy"] > 75


def test_a_wrong_order_of_numbered_folders_is_found_and_corrected(knowing, tmp_path, capfd):
    path, _ = knowing
    numbers = {name: str(k) for k, name in enumerate(sorted(RAF_NAMES))}  # alphabetical
    data = coloured(tmp_path / "data", RAF_NAMES, 48, numbers)
    more = f"--data_path {data} {FOREIGN} {','.join(RAF_NAMES)} --label_order"
    result = evaluate(path, tmp_path / "a", f"{more} fer2013")
    assert result["accuracy"] < 75
    said = capfd.readouterr().out
    told = re.search(r"if the data's labels are misnamed: --label_order=(\S+)", said)[1]
    assert told == "0:" + ",".join(sorted(RAF_NAMES))
    right = evaluate(path, tmp_path / "b", f"{more} {told}")
    assert right["accuracy"] > 75
    assert "another order" not in capfd.readouterr().out


def test_class_names_are_read_from_the_config_beside_transformers_weights(tmp_path, sets, capfd):
    names = dict(enumerate(RAF_NAMES[::-1]))
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        id2label=names,
        label2id={name: k for k, name in names.items()},
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    transformers.ViTImageProcessor(size=32, resample=3).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    result = evaluate(path, tmp_path / "out", f"--data_path {sets / 'rafdb'}")
    assert result["classes"] == list(RAF_NAMES[::-1])
    said = capfd.readouterr().out
    assert "names no classes" not in said
    images = open_labelled(str(sets / "rafdb")).splits["test"]
    view, normalise = plain(32), Normalise((0.5,) * 3, (0.5,) * 3)  # as in the processor's settings
    x = normalise(torch.stack([view(images.source.image(i)) for i in range(len(images))]))
    with torch.no_grad():
        p = theirs(x).logits.softmax(1).numpy()
    rows = predictions(tmp_path / "out")
    found = np.array([[float(row[f"p_{name}"]) for name in RAF_NAMES[::-1]] for row in rows])
    np.testing.assert_allclose(found, p, atol=1e-4)
