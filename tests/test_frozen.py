"""Frozen backbones: training a head, nearest neighbours, and probes during pre-training."""

import math
import shutil

import numpy as np
import pytest
import torch

import main_finetune
import main_pretrain
from finetuned import RAF_NAMES, assert_close, evaluate, measured, predictions, results, unaugmented
from models_registry import create_classifier
from runs import command, finetune_options, load, log, run_here, run_two, same
from util.weights import load_pretrained

LINEAR = "--linear_probe --lr 0.5 --batch_size 8"


def assert_frozen(folder, checkpoint):
    """Everything that was loaded is unchanged, but the head is not."""
    before, after = torch.load(checkpoint, weights_only=True)["model"], load(folder)["model"]
    before = {name.removeprefix("encoder."): value for name, value in before.items()}
    trained = [name for name in after if name in before and not name.startswith("head")]
    assert len(trained) > 100
    assert all(torch.equal(before[name], after[name]) for name in trained)
    head = next(name for name in after if name.startswith("head") and after[name].ndim == 2)
    assert not same(load(folder, "checkpoint-0.pth")["model"][head], after[head])


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_a_frozen_backbone_stays_unchanged(family, finetune, pretrained):
    assert_frozen(finetune(family, "--freeze_backbone --lr 0.01"), pretrained[family])


def test_a_linear_probe_trains_only_a_normalised_head_and_can_be_evaluated(
    sets, finetune, pretrained, tmp_path
):
    folder = finetune(more=LINEAR)
    assert_frozen(folder, pretrained["vit"])
    saved = load(folder)
    assert saved["model"]["head.0.num_batches_tracked"] == 14
    assert saved["model"]["head.0.running_mean"].abs().sum() > 0
    assert "trust_coeff" in saved["optimizer"]["param_groups"][0]  # LARS
    result = evaluate(folder / "checkpoint-best.pth", tmp_path, f"--data_path {sets / 'rafdb'}")
    assert_close(measured(result), measured(results(folder)))


def test_all_ranks_evaluate_a_linear_probe_with_the_same_statistics(sets, pretrained, tmp_path):
    more = f"--data_path {sets / 'rafdb'} --finetune {pretrained['vit']} {LINEAR} --epochs 1"
    run_two("main_finetune", finetune_options(tmp_path / "two", "vit", f"{more} --warmup_epochs 0"))
    data = f"--data_path {sets / 'rafdb'}"
    result = evaluate(tmp_path / "two" / "checkpoint-last.pth", tmp_path / "one", data)
    assert_close(measured(result), measured(results(tmp_path / "two")))


def test_nearest_neighbours_equal_a_slow_reference(sets, finetune, pretrained):
    folder = finetune(more="--knn --crop_pct 1.0")
    model = create_classifier("vit_tiny_patch16", 7, 32)
    load_pretrained(model, pretrained["vit"])
    features = {}
    for split in ("train", "test"):
        x, labels = unaugmented(sets / "rafdb", split, 1.0)
        with torch.no_grad():
            features[split] = model.eval().forward_features(x).double().numpy(), labels
    votes = np.zeros((21, 7))
    for i, query in enumerate(features["test"][0]):
        similar = []
        for x, label in zip(*features["train"], strict=True):
            cosine = query @ x / (np.linalg.norm(query) * np.linalg.norm(x))
            similar.append((cosine, label))
        for cosine, label in sorted(similar, reverse=True)[:20]:
            votes[i, label] += math.exp(cosine / 0.07)
    votes /= votes.sum(1, keepdims=True)
    rows = predictions(folder)
    found = np.array([[float(row[f"p_{name}"]) for name in RAF_NAMES] for row in rows])
    np.testing.assert_allclose(found, votes, atol=2e-5)
    right = (votes.argmax(1) == features["test"][1]).mean()
    assert results(folder)["accuracy"] == pytest.approx(100 * right)
    assert not list(folder.glob("checkpoint*"))


def test_frozen_features_use_images_as_in_training(sets, finetune, pretrained, tmp_path):
    """The crop follows the input size of the checkpoint, or is taken from the checkpoint itself."""
    large = tmp_path / "large"
    data = f"--data_path {sets / 'rafdb'} --input_size 256 --epochs 1 --num_workers 0"
    assert run_here(main_pretrain, command(large, "mae", data)[2:]) == 0
    probe = f"{LINEAR} --epochs 1 --warmup_epochs 0 --num_workers 0 --model vit_tiny_patch16"
    options = f"{probe} --data_path {sets / 'rafdb'} --output_dir {tmp_path / 'probe'}"
    source = f"--finetune {large / 'checkpoint-last.pth'}"
    assert run_here(main_finetune, f"{options} {source}".split()) == 0
    assert load(tmp_path / "probe")["preprocessing"]["crop_pct"] == 1.0  # default above 224 px
    whole = finetune(more="--aug none") / "checkpoint-best.pth"
    frozen = finetune(more=f"--freeze_backbone --finetune {whole}")
    assert load(frozen)["preprocessing"]["crop_pct"] is None


def test_unreadable_images_are_counted_by_nearest_neighbours(sets, pretrained, tmp_path, capfd):
    shutil.copytree(sets / "rafdb", tmp_path / "data")
    images = sorted((tmp_path / "data").rglob("*.jpg"))
    test = [path for path in images if path.name.startswith("test")]
    for path in (*images[-2:], test[0]):
        path.write_bytes(b"no image")
    options = f"--knn --finetune {pretrained['vit']} --model vit_tiny_patch16 --input_size 32"
    options += f" --data_path {tmp_path / 'data'} --output_dir {tmp_path / 'knn'} --num_workers 0"
    assert run_here(main_finetune, options.split()) == 0
    said, result = capfd.readouterr().out, results(tmp_path / "knn")
    assert "nearest neighbours are found among 54 of 56 training images; 2 cannot be read" in said
    assert "20 images, 1 more cannot be read" in said
    assert [result[key] for key in ("train_images", "train_unreadable", "unreadable")] == [54, 2, 1]


# --- during pre-training ---


PRETRAIN = "--input_size 32 --num_workers 0 --data_path synthetic:24"
SCORES = ("probe_knn_acc1", "probe_knn_uar", "probe_linear_acc1", "probe_linear_uar")


def test_a_probe_does_not_change_training(sets, tmp_path):
    probe = f"--probe_data_path {sets / 'rafdb'} --probe_freq 1"
    for name, more in (("with", probe), ("without", "")):
        options = command(tmp_path / name, "mae", f"{PRETRAIN} {more}")[2:]
        assert run_here(main_pretrain, options) == 0
    for record in log(tmp_path / "with"):
        assert all(0 <= record[score] <= 100 for score in SCORES)
    assert same(load(tmp_path / "with")["model"], load(tmp_path / "without")["model"])
    assert same(load(tmp_path / "with")["optimizer"], load(tmp_path / "without")["optimizer"])


def test_faces_for_a_probe_are_cropped_with_the_given_margin(sets, tmp_path, capfd):
    more = f"{PRETRAIN} --probe_data_path {sets / 'affectnet'} --face_margin 0.4 --epochs 1"
    assert run_here(main_pretrain, command(tmp_path, "mae", more)[2:]) == 0
    assert "faces cropped with margin 0.4" in capfd.readouterr().out


def test_a_probe_on_two_processes_equals_one(sets, tmp_path):
    # With a learning rate of 0 the weights are equal, and only the probes are compared.
    more = f"{PRETRAIN} --lr 0 --epochs 1 --probe_data_path {sets / 'rafdb'} --probe_freq 1"
    assert run_here(main_pretrain, command(tmp_path / "one", "mae", more)[2:]) == 0
    run_two("main_pretrain", command(tmp_path / "two", "mae", f"{more} --batch_size 4")[2:])
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [one[0][s] for s in SCORES] == pytest.approx([two[0][s] for s in SCORES], abs=1e-6)
