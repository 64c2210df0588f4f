"""Bad input to fine-tuning: exit code 2 and one line that names the problem, before training."""

import os
import shutil

import numpy as np
import pytest
import torch

import main_finetune
from layouts import write_fer2013, write_folder, write_rafdb
from layouts_affectnet import write_affectnet_csv
from models_registry import create_classifier
from runs import finetune_options, run_here
from util.errors import BAD_INPUT

LIST = "basic/EmoLabel/list_patition_label.txt"
FILE_LISTS = "Manually_Annotated_file_lists"


@pytest.fixture
def refuse(tmp_path, capfd):
    """Run with invalid options; -> the one error line."""

    def run(*options, output=None):
        output, before = output or tmp_path / "out", snapshot(tmp_path)
        options = [*finetune_options(output), *map(str, options)]
        code, captured = run_here(main_finetune, options), capfd.readouterr()
        assert code == BAD_INPUT, captured
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, lines
        assert "step 1/" not in captured.out
        assert not list(tmp_path.glob("out/checkpoint*"))
        assert snapshot(tmp_path).items() >= before.items()
        return lines[0]

    return run


def snapshot(root):
    """The content of the files before a run, except for the status that it may write."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "status.json")
    return {path: path.read_bytes() for path in files}


@pytest.fixture
def rafdb(tmp_path):
    return write_rafdb(tmp_path / "rafdb", drawn=False)


@pytest.fixture
def affectnet(tmp_path):
    write_affectnet_csv(tmp_path / "affectnet", {"train": (2,) * 8, "test": (1,) * 8})
    return tmp_path / "affectnet"


# --- options ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--modle x", "--modle --model"),
        ("--model vit_bse_patch16", "--model vit_base_patch16"),
        ("--input_size 50", "--input_size 50 patch 48"),
        ("--mixup 0.8 --batch_size 3", "--batch_size 3 --mixup even"),
        ("--cutmix 1.0 --batch_size 5", "--batch_size 5 --cutmix even"),
        ("--schedule step", "--schedule step --step_epochs"),
        ("--schedule step --step_epochs -1", "--step_epochs >= 0 '-1'"),
        ("--model_ema_eval", "--model_ema_eval --model_ema"),
        ("--model_ema --model_ema_eval --model_ema_force_cpu", "--model_ema_force_cpu"),
        ("--knn", "--knn --finetune"),
        ("--linear_probe", "--linear_probe --finetune"),
        ("--linear_probe --finetune x --batch_size 1", "--batch_size 1 --linear_probe two"),
        ("--linear_probe --finetune x --batch_size 1 --accum_iter 8", "--batch_size 2 or more"),
        ("--input_size 96 128", "--input_size 96 128: takes one value"),
        ("--classes a,b", "--classes --eval"),
        ("--freeze_backbone", "--freeze_backbone --finetune"),
        ("--freeze_backbone --finetune x --drop_path 0.1", "--drop_path 0.1 frozen"),
        ("--select val --disable_eval", "--select val --disable_eval"),
        ("--cutmix_minmax 0.8 0.2", "--cutmix_minmax 0.8 0.2: MIN < MAX"),
        ("--opt_betas 0.9", "--opt_betas two"),
        ("--opt adamm", "--opt adamm"),
        ("--aa nonsense", "--aa nonsense"),
        ("--model convnextv2_atto --cls_token", "--cls_token convnextv2_atto"),
        ("--use_amp True --amp off", "--use_amp True --amp off"),
        ("--eval", "--eval out --finetune"),
        ("--eval --auto_resume False", "--eval --finetune"),
        ("--finetune mae_vit_bas_300e", "mae_vit_bas_300e mae_vit_base_300e"),
        ("--finetune /nowhere/x.pth", "/nowhere/x.pth no such file"),
        ("--resume /nowhere/x.pth", "/nowhere/x.pth no such file"),
        ("--data_set imagenet", "--data_set imagenet rafdb"),
        ("--data_path /nowhere/at/all", "--data_path /nowhere/at/all"),
        ("--data_path synthetic:8", "--data_path 8 images --batch_size 9"),
        ("--nb_classes 5", "--nb_classes 5 8 classes"),
    ],
)
def test_wrong_options_are_named(refuse, options, expected):
    size = ["--batch_size", "9"] if "synthetic:8" in options else []
    line = refuse("--data_path", "synthetic:16:8", *size, *options.split())
    for text in expected.split():
        assert text in line


# --- data ---


def test_a_folder_of_images_without_labels_is_named(refuse, rafdb):
    folder = rafdb / "basic" / "Image" / "aligned"
    line = refuse("--data_path", folder)
    assert f"--data_path {folder}" in line
    assert "21 images and nothing that labels them" in line


def test_missing_lists_of_affectnet_are_named(refuse, affectnet):
    shutil.rmtree(affectnet / FILE_LISTS)
    line = refuse("--data_path", affectnet)
    assert f"--data_path {affectnet}" in line
    assert "training.csv" in line


def test_the_missing_list_of_rafdb_is_named(refuse, rafdb):
    (rafdb / LIST).unlink()
    line = refuse("--data_path", rafdb)
    assert f"--data_path {rafdb}" in line
    assert "EmoLabel/list_patition_label.txt" in line


def test_a_list_without_the_column_expression_is_named(refuse, affectnet):
    path = affectnet / FILE_LISTS / "training.csv"
    path.write_text(path.read_text().replace(",expression,", ",mood,"))
    line = refuse("--data_path", affectnet)
    assert str(path) in line
    assert "expression" in line


@pytest.mark.parametrize("label", ["11", "-1", "nan", "NaN", "", "2.5"])
def test_an_invalid_label_in_affectnet_is_named(refuse, affectnet, label):
    path = affectnet / FILE_LISTS / "training.csv"
    rows = path.read_text().splitlines()
    cells = rows[4].split(",")
    rows[4] = ",".join([*cells[:6], label, *cells[7:]])
    path.write_text("\n".join(rows))
    line = refuse("--data_path", affectnet)
    assert str(path) in line
    assert "row 5" in line
    assert "its expression must be an id from 0 to 10" in line


@pytest.mark.parametrize("label", ["0", "8", "nan", ""])
def test_an_invalid_label_in_rafdb_is_named(refuse, rafdb, label):
    path = rafdb / LIST
    rows = path.read_text().splitlines()
    rows[2] = f"{rows[2].split()[0]} {label}"
    path.write_text("\n".join(rows))
    line = refuse("--data_path", rafdb)
    assert str(path) in line
    assert "row 3" in line


def test_a_class_without_training_images_is_named(refuse, tmp_path):
    root = tmp_path / "seven"
    write_affectnet_csv(root, {"train": (2,) * 7, "test": (1,) * 8})
    line = refuse("--data_path", root)
    assert f"--data_path {root}: no training image of Contempt" in line
    assert "--nb_classes 7" in line


def test_a_test_class_that_training_lacks_is_named(refuse, tmp_path):
    root = write_folder(tmp_path / "f", {"train": 8}, ("Happy", "Sad"), drawn=False)
    write_folder(root, {"test": 2}, ("Happy", "Sad", "Anger"), drawn=False)
    line = refuse("--data_path", root)
    assert str(root / "test") in line
    assert "Anger" in line


def test_a_number_of_classes_that_does_not_fit_is_refused(refuse, rafdb, affectnet):
    assert "--nb_classes 8: RAF-DB" in refuse("--data_path", rafdb, "--nb_classes", 8)
    assert "--nb_classes 6: AffectNet" in refuse("--data_path", affectnet, "--nb_classes", 6)


def test_a_label_rule_for_data_without_votes_is_refused(refuse, rafdb):
    line = refuse("--data_path", rafdb, "--label_rule", "majority")
    assert "--label_rule majority" in line
    assert "rafdb" in line


def test_two_data_sets_under_one_path_are_named(refuse, rafdb):
    write_fer2013(rafdb, drawn=False)
    line = refuse("--data_path", rafdb)
    for text in (f"--data_path {rafdb}", "--data_set rafdb", "--data_set fer2013"):
        assert text in line


def test_a_batch_larger_than_the_data_is_refused(refuse, rafdb):
    line = refuse("--data_path", rafdb, "--batch_size", 4, "--accum_iter", 4)
    for text in ("14 images", "--batch_size 4", "--accum_iter 4", "1 processes = 16"):
        assert text in line


def test_data_without_readable_images_are_refused(refuse, rafdb):
    for path in rafdb.rglob("*.jpg"):
        path.write_bytes(b"<html>quota exceeded</html>")
    line = refuse("--data_path", rafdb)
    assert "none of the 14 images tried can be read" in line


def test_a_test_set_without_common_classes_is_refused(refuse, rafdb, tmp_path):
    other = write_folder(tmp_path / "f", {"train": 2, "test": 2}, ("cat", "dog"), drawn=False)
    line = refuse("--data_path", rafdb, "--eval_data_path", other)
    assert "cat, dog" in line
    assert "fewer than two in common" in line


# --- checkpoints ---


class Canary:
    def __reduce__(self):
        return os.system, ("touch canary",)


@pytest.fixture
def no_checkpoints(tmp_path):
    """Files that are not valid checkpoints."""
    whole = tmp_path / "whole.pth"
    torch.save({"model": {"weight": torch.zeros(1000)}}, whole)
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html><title>Quota exceeded</title>")
    (tmp_path / "truncated.pth").write_bytes(whole.read_bytes()[:2000])
    torch.save({"model": Canary()}, tmp_path / "code.pth")
    return tmp_path


@pytest.mark.parametrize("way", ["--finetune", "--eval --finetune", "--resume"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("page", "a web page"),
        ("code", "could run code"),
        ("truncated", "truncated or damaged"),
    ],
)
def test_a_file_that_is_not_a_valid_checkpoint_is_named_and_never_executed(
    refuse, no_checkpoints, monkeypatch, rafdb, way, name, expected
):
    monkeypatch.chdir(no_checkpoints)
    path = no_checkpoints / f"{name}.pth"
    line = refuse("--data_path", rafdb, *way.split(), path)
    assert str(path) in line
    assert expected in line
    assert not (no_checkpoints / "canary").exists()


@pytest.mark.parametrize(
    ("held", "asked", "closest"),
    [
        ("convnextv2_atto", "vit_tiny_patch16", "--model convnextv2_atto"),
        ("vit_tiny_patch16", "convnextv2_atto", "--model mae_vit_tiny_patch16"),
        ("convnextv2_atto", "convnextv2_femto", "--model convnextv2_atto"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_model_they_fit(
    refuse, rafdb, tmp_path, held, asked, closest
):
    path = tmp_path / "other.pth"
    torch.save({"model": create_classifier(held, 7, 32).state_dict()}, path)
    line = refuse("--data_path", rafdb, "--finetune", path, "--model", asked)
    for text in (str(path), f"--model is {asked}" if "vit" in asked else asked, closest):
        assert text in line


def test_a_head_with_another_number_of_classes_cannot_be_evaluated(refuse, rafdb, tmp_path):
    path = tmp_path / "imagenet.pth"
    torch.save(create_classifier("vit_tiny_patch16", 1000, 32).state_dict(), path)
    line = refuse("--eval", "--data_path", rafdb, "--finetune", path)
    assert str(path) in line
    assert "1000 classes, the model 7" in line


def test_weights_that_are_not_finite_are_refused(refuse, rafdb, tmp_path):
    path = tmp_path / "diverged.pth"
    state = create_classifier("vit_tiny_patch16", 7, 32).state_dict()
    state["blocks.3.mlp.fc1.weight"][0, 0] = np.nan
    torch.save(state, path)
    line = refuse("--data_path", rafdb, "--finetune", path)
    assert f"{path}: blocks.3.mlp.fc1.weight is not finite" in line


def test_changed_options_are_listed_and_nothing_is_overwritten(refuse, rafdb, tmp_path, capfd):
    out = tmp_path / "run"
    options = [*finetune_options(out), "--data_path", str(rafdb), "--epochs", "1"]
    assert run_here(main_finetune, options) == 0
    capfd.readouterr()
    more = ["--data_path", rafdb, "--smoothing", 0.2, "--mixup", 0.8]
    kept = (out / "checkpoint-last.pth").read_bytes(), (out / "eval.json").read_text()
    line = refuse(*more, output=out)
    for text in ("smoothing 0.1 -> 0.2", "mixup 0.0 -> 0.8", "--override_resume"):
        assert text in line
    assert kept == ((out / "checkpoint-last.pth").read_bytes(), (out / "eval.json").read_text())
    assert "would overwrite" in refuse(*more, "--auto_resume", "False", output=out)
