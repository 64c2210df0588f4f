"""main_visualize: figures of other images or weights never get into the report of a run."""

import shutil

import pytest
import torch

import main_visualize
from finetuned import evaluate, results
from runs import load, run_here
from util.errors import BAD_INPUT, DONE

CHART = "figures/confusion_matrix.png"


@pytest.fixture
def run(finetune, tmp_path):
    """A copy of a finished fine-tuning on faces with a margin, without others' evaluations."""
    made = finetune(more="--face_margin 0.5", data="affectnet")
    others = shutil.ignore_patterns("eval", "knn", "visualize")
    shutil.copytree(made, tmp_path / "run", ignore=others)
    last = load(tmp_path / "run")
    last["epoch"] = results(made)["epoch"] + 1
    torch.save(last, tmp_path / "run" / "checkpoint-last.pth")
    return tmp_path / "run"


@pytest.fixture
def draw(run, sets, capfd):
    """Run the program, by default with the run's checkpoint and data; -> its output."""

    def go(*options, checkpoint=run / "checkpoint-best.pth", code=DONE):
        argv = ["--checkpoint", checkpoint, "--data_path", sets / "affectnet", "--num_workers", 0]
        capfd.readouterr()
        assert run_here(main_visualize, [*map(str, (*argv, *options))]) == code
        return "".join(capfd.readouterr())

    return go


def contents(folder):
    files = [*folder.glob("*.*"), *(folder / "figures").glob("*")]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--face_margin", 0], "checkpoint-best-affectnet-face_margin_0.0"),
        (["--nb_classes", 7], "checkpoint-best-affectnet-nb_classes_7"),
        (["--split", "train", "--figures", "attention"], "checkpoint-best-affectnet-split_train"),
    ],
)
def test_figures_with_other_options_are_saved_elsewhere(options, name, run, draw):
    before = contents(run)
    said = draw(*(["--figures", "confusion"] if "--figures" not in options else []), *options)
    assert contents(run) == before
    assert list((run / "visualize" / name / "figures").glob("*.png"))
    assert f"{run} holds other results and keeps its figures; these go to" in said


def test_figures_of_other_weights_or_class_names_are_saved_elsewhere(run, draw):
    before = contents(run)
    only = ["--figures", "confusion"]
    draw(*only, checkpoint=run / "checkpoint-last.pth")
    assert (run / "visualize" / "checkpoint-last-affectnet" / CHART).exists()
    turned = ",".join(results(run)["classes"][::-1])
    draw(*only, "--classes", turned)
    assert (run / "visualize" / f"checkpoint-best-affectnet-classes_{turned}" / CHART).exists()
    shutil.copy(run / "checkpoint-best.pth", run.parent / "of-another.pth")
    draw(*only, "--output_dir", run, checkpoint=run.parent / "of-another.pth")
    assert (run / "visualize" / "of-another-affectnet" / CHART).exists()
    assert contents(run) == before


def test_figures_with_the_same_options_replace_the_runs_own(run, draw):
    before = (run / CHART).read_bytes()
    draw("--figures", "confusion,attention", "--face_margin", 0.5, "--split", "test")
    assert (run / CHART).read_bytes() == before
    assert (run / "figures" / "attention.png").exists()
    assert not (run / "visualize").exists()


def test_figures_of_an_evaluation_are_not_replaced_by_others(run, draw, sets, tmp_path):
    best, out = run / "checkpoint-best.pth", tmp_path / "out"
    evaluate(best, out, f"--data_path {sets / 'affectnet'} --face_margin 0")
    before = contents(out)
    only = ["--figures", "confusion", "--output_dir", out]
    draw(*only)  # uses the margin of training
    assert (out / "visualize" / "checkpoint-best-affectnet" / CHART).exists()
    assert contents(out) == before
    draw(*only, "--face_margin", 0)
    own = {path for path in contents(out) if path.parent.name == "figures"}
    assert {path: path.read_bytes() for path in own} == {path: before[path] for path in own}
    assert not (out / "visualize" / "checkpoint-best-affectnet-face_margin_0.0").exists()
    flipped = tmp_path / "flipped"
    evaluate(best, flipped, f"--data_path {sets / 'affectnet'} --eval_flip")
    draw("--figures", "confusion", "--output_dir", flipped)
    assert (flipped / "visualize" / "checkpoint-best-affectnet" / CHART).exists()


def test_unreadable_images_are_counted(finetune, sets, tmp_path, capfd):
    shutil.copytree(sets / "rafdb", tmp_path / "rafdb")
    for path in sorted((tmp_path / "rafdb").rglob("test_*.jpg"))[:2]:
        path.write_bytes(b"torn")
    argv = ["--checkpoint", finetune() / "checkpoint-best.pth", "--data_path", tmp_path / "rafdb"]
    argv += ["--num_workers", 0, "--output_dir", tmp_path, "--figures", "confusion,features"]
    assert run_here(main_visualize, list(map(str, argv))) == DONE
    assert (
        "left out of charts and feature map: 2 images that cannot be read\n"
        in capfd.readouterr().out
    )


def test_a_missing_checkpoint_is_reported_first(run, draw, tmp_path):
    said = draw(checkpoint=tmp_path / "mae_vit_base", code=BAD_INPUT)
    assert "mae_vit_base: no such file, and no released weights of this name; " in said
    said = draw(checkpoint=run, code=BAD_INPUT)
    assert f"{run}: is a folder; name a checkpoint in it" in said
