"""`--eval`: the same numbers by any number of processes, from any checkpoint, across data sets."""

import shutil
from collections import Counter

import numpy as np
import pytest
import timm
import torch
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
from runs import run_here, run_two

import main_finetune
from models_registry import create_classifier
from util.weights import load_pretrained

# --- evaluation ---


@pytest.mark.parametrize("more", ["", "--dist_eval False --eval_flip --amp bf16"])
def test_two_processes_evaluate_as_one(more, sets, finetune, tmp_path):
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
def test_our_checkpoint_is_evaluated_without_saying_what_it_is(
    family, more, sets, finetune, tmp_path
):
    folder = finetune(family, more)
    result = evaluate(folder / "checkpoint-best.pth", tmp_path, f"--data_path {sets / 'rafdb'}")
    assert_close(measured(result), measured(results(folder)))
    assert result["epoch"] == results(folder)["epoch"]
    assert result["weights"] == ("model_ema" if more else "model")


def test_without_a_name_the_best_of_the_output_dir_is_evaluated(sets, finetune, tmp_path):
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
def test_a_checkpoint_of_timm_has_the_accuracy_it_has_in_timm(
    ours, theirs, options, sets, tmp_path
):
    torch.manual_seed(3)
    model = timm.create_model(theirs, num_classes=7, **options).eval()
    head = model.get_classifier()
    torch.nn.init.normal_(head.weight, std=0.5)
    x, labels = unaugmented(sets / "rafdb", "test")
    with torch.no_grad():
        logits = model(x)
        head.bias -= logits.mean(0)  # else one class would win everywhere
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
    """The name of the expression of every validation image, by the owner's list."""
    lines = (root / "Manually_Annotated_file_lists" / "validation.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    return {row[0]: AFF_NAMES[int(row[6])] for row in rows}


def assert_counts_only(folder, truth, names):
    """predictions.csv holds the images of `truth`, and eval.json what follows from it."""
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
def test_seven_classes_are_tested_on_those_of_affectnets_eight(flag, sets, finetune, tmp_path):
    checkpoint = finetune() / "checkpoint-best.pth"
    data = f"--data_path {sets / 'rafdb'}" if flag == "--eval_data_path" else ""
    result = evaluate(checkpoint, tmp_path, f"{data} {flag} {sets / 'affectnet'}")
    truth = affectnet_truth(sets / "affectnet")
    common = {path: name for path, name in truth.items() if name != "Contempt"}
    assert len(common) == 14
    assert_counts_only(tmp_path, common, RAF_NAMES)
    assert result["data"].startswith("AffectNet-8")


def test_eight_classes_are_tested_on_rafdbs_seven(sets, finetune, tmp_path):
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


def test_training_can_be_tested_on_ferplus_under_a_named_rule(sets, finetune):
    folder = finetune(more=f"--eval_data_path {sets / 'ferplus'} --label_rule majority")
    result = results(folder)
    assert result["data"] == "FERPlus, CSV files"
    assert "--label_rule majority" in result["rule"]
    assert (result["n"], result["classes"]) == (14, list(RAF_NAMES))
    assert {row["label"] for row in predictions(folder)} == set(RAF_NAMES)
