"""Frozen backbones: what a head on them learns, their nearest neighbours, the probe of a run."""

import math

import numpy as np
import pytest
import torch
from finetuned import RAF_NAMES, assert_close, evaluate, measured, predictions, results, unaugmented
from runs import command, finetune_options, load, log, run_here, run_two, same

import main_pretrain
from models_registry import create_classifier
from util.weights import load_pretrained

LINEAR = "--linear_probe --lr 0.5 --batch_size 8"


def assert_frozen(folder, checkpoint):
    """All that was loaded is as it was; the head is not."""
    before, after = torch.load(checkpoint, weights_only=True)["model"], load(folder)["model"]
    before = {name.removeprefix("encoder."): value for name, value in before.items()}
    trained = [name for name in after if name in before and not name.startswith("head")]
    assert len(trained) > 100
    assert all(torch.equal(before[name], after[name]) for name in trained)
    head = next(name for name in after if name.startswith("head") and after[name].ndim == 2)
    assert not same(load(folder, "checkpoint-0.pth")["model"][head], after[head])


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_a_frozen_backbone_keeps_its_bits(family, finetune, pretrained):
    assert_frozen(finetune(family, "--freeze_backbone --lr 0.01"), pretrained[family])


def test_a_linear_probe_trains_a_normalised_head_alone_and_can_be_evaluated(
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


def test_ranks_evaluate_a_linear_probe_with_the_same_statistics(sets, pretrained, tmp_path):
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


# --- while pre-training ---


PRETRAIN = "--input_size 32 --num_workers 0 --data_path synthetic:24"
SCORES = ("probe_knn_acc1", "probe_knn_uar", "probe_linear_acc1", "probe_linear_uar")


def test_a_probe_measures_and_changes_nothing(sets, tmp_path):
    probe = f"--probe_data_path {sets / 'rafdb'} --probe_freq 1"
    for name, more in (("with", probe), ("without", "")):
        options = command(tmp_path / name, "mae", f"{PRETRAIN} {more}")[2:]
        assert run_here(main_pretrain, options) == 0
    for record in log(tmp_path / "with"):
        assert all(0 <= record[score] <= 100 for score in SCORES)
    assert same(load(tmp_path / "with")["model"], load(tmp_path / "without")["model"])
    assert same(load(tmp_path / "with")["optimizer"], load(tmp_path / "without")["optimizer"])


def test_a_probe_on_two_processes_equals_one(sets, tmp_path):
    # Without learning all see the same weights, and only the probe is compared.
    more = f"{PRETRAIN} --lr 0 --epochs 1 --probe_data_path {sets / 'rafdb'} --probe_freq 1"
    assert run_here(main_pretrain, command(tmp_path / "one", "mae", more)[2:]) == 0
    run_two("main_pretrain", command(tmp_path / "two", "mae", f"{more} --batch_size 4")[2:])
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [one[0][s] for s in SCORES] == pytest.approx([two[0][s] for s in SCORES], abs=1e-6)
