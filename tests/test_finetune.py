"""Fine-tuning end to end: from data sets as their owners ship them to results."""

import math
import re

import numpy as np
import pytest
from PIL import Image

from datasets import open_labelled
from datasets.finetune import choose_splits
from finetuned import EVERYTHING, config, predictions, results
from runs import finish, launched, load, log, same, status

# --- the two published command lines ---

COMMANDS = {
    "convnext": (
        "rafdb/basic",
        "--model convnextv2_atto --batch_size 4 --update_freq 4 --blr 6.25e-4 --epochs 2 "
        "--warmup_epochs 1 --layer_decay_type group --layer_decay 0.6 --weight_decay 0.05 "
        "--drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --model_ema True "
        "--model_ema_eval True --use_amp True",
    ),
    "vit": (
        "affectnet",
        "--model mae_vit_tiny_patch16 --batch_size 4 --accum_iter 2 --blr 5e-4 --layer_decay 0.65 "
        "--weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --epochs 2",
    ),
}


@pytest.mark.parametrize("family", COMMANDS)
def test_the_published_commands_run_on_data_sets_as_shipped(family, sets, pretrained, tmp_path):
    data, options = COMMANDS[family]
    options += f" --data_path {sets / data} --finetune {pretrained[family]} --input_size 32"
    options += f" --num_workers 1 --output_dir {tmp_path}"
    output = finish(launched("main_finetune.py", options.split(), processes=2))
    assert "tensors loaded from 'model'" in output
    assert status(tmp_path) == "done"

    result, rows = results(tmp_path), predictions(tmp_path)
    count = {"rafdb/basic": 21, "affectnet": 15}[data]
    assert result["n"] == len(rows) == len({row["path"] for row in rows}) == count
    right = np.mean([row["label"] == row["prediction"] for row in rows])
    assert result["accuracy"] == pytest.approx(100 * right)
    expected = {"test_acc1", "test_uar"} | ({"test_acc1_ema"} if family == "convnext" else set())
    records = log(tmp_path)
    assert [record["epoch"] for record in records] == [0, 1]
    assert all(expected <= record.keys() for record in records)
    chosen = "test_acc1_ema" if family == "convnext" else "test_acc1"
    assert result["accuracy"] == pytest.approx(max(record[chosen] for record in records))
    assert load(tmp_path, "checkpoint-best.pth")["epoch"] == result["epoch"]
    check_lines(output, records, "_ema" if family == "convnext" else "")
    Image.open(tmp_path / "figures" / "confusion_matrix.png").verify()
    assert f"{result['accuracy']:.2f}" in (tmp_path / "report.html").read_text()


def check_lines(output, records, ending):
    """One line per epoch: what log.txt has of the selecting split, and which epoch is the best."""
    lines = re.findall(r"^epoch (\d+)/2  test.*accuracy.*$", output, re.M)
    assert lines == ["0", "1"]  # only process 0 prints
    for record in records:
        accuracy, uar, loss = (record[f"test_{name}{ending}"] for name in ("acc1", "uar", "loss"))
        first = max(records[: record["epoch"] + 1], key=lambda r: r[f"test_acc1{ending}"])
        best = f"best so far: epoch {first['epoch']}, {first[f'test_acc1{ending}']:.2f} %"
        line = (
            f"epoch {record['epoch']}/2  test{' (EMA)' * bool(ending)}: accuracy {accuracy:.2f} %  "
            f"UAR {uar:.2f} %  loss {loss:.4f}  {'* best so far' if first is record else best}\n"
        )
        assert line in output


# --- what is trained on, and how the best is chosen ---


def test_the_best_epoch_can_be_selected_on_held_out_training_images(sets, finetune):
    folder = finetune(more="--select val --val_fraction 0.25 --lr 0.002")
    assert config(folder)["data"]["count"] == 56 - 14
    records, saved, result = log(folder), load(folder), results(folder)
    assert saved["best"] == max(record["val_acc1"] for record in records)
    assert saved["best_epoch"] == int(np.argmax([record["val_acc1"] for record in records]))
    assert (result["split"], result["selected_on"], result["n"]) == ("test", "val", 21)
    assert result["accuracy"] == pytest.approx(records[saved["best_epoch"]]["test_acc1"])

    data = open_labelled(str(sets / "rafdb"))
    train, tests, *_ = choose_splits(data, None, "val", 0.25, 0, "")
    assert tests["val"].counts(7).tolist() == [2] * 7
    names = [{s.source.name(i) for i in range(len(s))} for s in (train, *tests.values())]
    assert sum(map(len, names)) == len(set.union(*names)) == 56 + 21


def test_a_fraction_of_the_labels_is_trained_on(finetune):
    folder = finetune(more="--label_fraction 0.5 --disable_eval")
    assert config(folder)["data"]["count"] == 28
    assert status(folder) == "done"
    assert not (folder / "eval.json").exists()
    assert not any(key.startswith("test") for record in log(folder) for key in record)


def test_classes_are_balanced_by_default_for_affectnet_only(finetune):
    assert load(finetune(data="affectnet"))["run"]["balance"] is True
    assert load(finetune())["run"]["balance"] is False
    assert load(finetune("convnext", EVERYTHING))["run"]["balance"] is True


def test_votes_are_soft_targets_and_their_rule_is_named(finetune):
    folder = finetune(more="--label_rule votes --aug none", data="ferplus")
    assert "--label_rule votes" in results(folder)["rule"]
    assert not same(
        load(folder)["model"],
        load(finetune(more="--label_rule argmax --aug none", data="ferplus"))["model"],
    )


# --- schedules, optimizers, averages ---


def test_the_learning_rate_falls_in_steps(finetune):
    more = "--schedule step --step_epochs 1 --step_factor 0.1 --lr 0.01 --warmup_epochs 0"
    records = log(finetune(more=f"{more} --opt sgd --momentum 0.8 --aug fer"))
    assert [record["train_lr"] for record in records] == pytest.approx([0.01, 0.001])


def test_warm_up_and_weight_decay_change_every_step(finetune):
    more = "--warmup_steps 56 --lr 0.056 --weight_decay 0.04 --weight_decay_end 0.4 --opt adam"
    folder = finetune(more=more)
    assert [r["train_lr"] for r in log(folder)] == pytest.approx([0.013, 0.027])
    decays = {group["weight_decay"] for group in load(folder)["optimizer"]["param_groups"]} - {0.0}
    last = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * 27 / 28))
    assert list(decays) == pytest.approx([last])


@pytest.mark.parametrize(
    ("more", "known"),
    [
        ("--opt sgd --momentum 0.8", {"momentum": 0.8}),
        ("--opt adam --opt_betas 0.8 0.99", {"betas": (0.8, 0.99)}),
    ],
)
def test_the_optimizer_asked_for_is_used(more, known, finetune):
    group = load(finetune(more=f"{more} --disable_eval --epochs 1"))["optimizer"]["param_groups"][0]
    assert {name: group[name] for name in known} == known


def test_an_ema_in_main_memory_is_the_same(finetune):
    apart = finetune("convnext", f"{EVERYTHING} --model_ema_eval False --model_ema_force_cpu")
    together = finetune("convnext", EVERYTHING)
    assert same(load(apart)["model_ema"], load(together)["model_ema"])
    assert not same(load(together)["model_ema"], load(together)["model"])
