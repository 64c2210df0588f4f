"""A fine-tuning that is stopped or killed anywhere ends exactly like an uninterrupted one."""

import shutil
import signal

import pytest
import torch

import main_finetune
from finetuned import EVERYTHING, predictions, results
from runs import (
    assert_same_run,
    finetune_command,
    finetune_options,
    load,
    run,
    run_here,
    run_two,
    same,
    signal_at,
    status,
)


@pytest.fixture(scope="module")
def undisturbed(sets, pretrained, finetune, tmp_path_factory):
    """Uninterrupted runs with all options on, by (family, processes), made on first use."""
    made = {}

    def make(family, processes):
        if processes == 1:
            return finetune(family, EVERYTHING)
        if family not in made:
            made[family] = tmp_path_factory.mktemp("undisturbed")
            more = everything(sets, pretrained, family)
            run_two("main_finetune", finetune_options(made[family], family, more))
        return made[family]

    return make


def everything(sets, pretrained, family):
    return f"--data_path {sets / 'rafdb'} --finetune {pretrained[family]} {EVERYTHING}"


def assert_same_end(ours, undisturbed):
    assert_same_run(ours, undisturbed)
    assert results(ours) == results(undisturbed)
    assert predictions(ours) == predictions(undisturbed)
    a, b = load(ours, "checkpoint-best.pth"), load(undisturbed, "checkpoint-best.pth")
    assert same(a["model_ema"], b["model_ema"])


@pytest.mark.parametrize(
    ("family", "processes"),
    [("convnext", 1), ("vit", 2), pytest.param("resnet", 2, marks=pytest.mark.long)],
)
def test_fine_tuning_stopped_in_mid_epoch_ends_the_same(
    family, processes, sets, pretrained, undisturbed, tmp_path
):
    more = everything(sets, pretrained, family)
    arguments = finetune_command(tmp_path, family, more, processes)
    code, output = signal_at(arguments, "epoch 1/2  step 2/")
    assert code == (75 if processes == 1 else 1), output
    assert status(tmp_path) == "resumable"
    assert load(tmp_path)["step"] >= 2

    run("main_finetune", finetune_options(tmp_path, family, f"{more} --num_workers 2"), processes)
    assert_same_end(tmp_path, undisturbed(family, processes))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_fine_tuning_that_was_killed_ends_the_same(
    processes, sets, pretrained, undisturbed, tmp_path
):
    more = f"{everything(sets, pretrained, 'vit')} --save_steps 2"
    arguments = finetune_command(tmp_path, "vit", more, processes)
    signal_at(arguments, "epoch 1/2  step 4/", signal.SIGKILL)
    killed = load(tmp_path)
    assert (killed["epoch"], killed["step"] % 2) == (0, 0)
    run("main_finetune", finetune_options(tmp_path, "vit", f"{more} --num_workers 1"), processes)
    assert_same_end(tmp_path, undisturbed("vit", processes))


def test_worse_epochs_after_a_resume_do_not_replace_the_best_checkpoint(sets, finetune, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finetune(), folder)
    for path in folder.glob("checkpoint-*.pth"):
        path.unlink()
    saved = load(finetune())
    torch.save(saved | {"best": 99.9, "best_epoch": 0}, folder / "checkpoint-last.pth")
    torch.save(load(finetune(), "checkpoint-0.pth"), folder / "checkpoint-best.pth")
    best = (folder / "checkpoint-best.pth").read_bytes()
    more = f"--data_path {sets / 'rafdb'} --epochs 3 --finetune {saved['run']['finetune']}"
    assert run_here(main_finetune, finetune_options(folder, "vit", more)) == 0
    assert (folder / "checkpoint-best.pth").read_bytes() == best
    assert (load(folder)["epoch"], load(folder)["best"], load(folder)["best_epoch"]) == (2, 99.9, 0)
    assert (results(folder)["epoch"], results(folder)["last"]["epoch"]) == (0, 2)
