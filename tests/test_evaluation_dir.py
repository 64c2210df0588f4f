"""Evaluations do not overwrite the results of a run or of other evaluations."""

import json
import shutil
from pathlib import Path

import pytest

import main_finetune
import main_visualize
from finetuned import evaluate, results
from runs import finetune_options, run_here, run_two, status
from util.errors import BAD_INPUT, DONE, BadInput
from util.evaluation_dir import check_results, evaluation_folder, holds_run


@pytest.fixture
def run(finetune, tmp_path):
    """A copy of a finished fine-tuning, without the evaluations of other tests."""
    others = shutil.ignore_patterns("eval", "knn", "visualize")
    shutil.copytree(finetune(), tmp_path / "run", ignore=others)
    return tmp_path / "run"


def contents(folder):
    """The content of a run's files and figures, but not of other folders in it."""
    files = [*folder.glob("*"), *(folder / "figures").glob("*")]
    return {path: path.read_bytes() for path in files if path.is_file() and path.name != ".lock"}


def go(*options, code=DONE):
    assert run_here(main_finetune, [*map(str, options), "--num_workers", "0"]) == code


def test_an_evaluation_into_a_runs_folder_is_written_to_a_subfolder(run, sets, capfd):
    before = contents(run)
    data = ["--data_path", sets / "affectnet"]
    go("--eval", "--finetune", run / "checkpoint-best.pth", "--output_dir", run, *data)
    own = run / "eval" / "checkpoint-best-affectnet"
    assert f"results: {own}" in capfd.readouterr().out
    assert contents(run) == before
    assert {path.name for path in own.iterdir()} >= {
        *("eval.json", "predictions.csv", "figures", "report.html", "status.json")
    }
    assert results(own)["made_by"] == {
        "kind": "eval",
        "checkpoint": "../../checkpoint-best.pth",
        "data": str(sets / "affectnet"),
        "options": {},
    }


def test_without_an_output_dir_results_are_written_beside_the_checkpoint(
    run, sets, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = contents(run)
    data = ["--data_path", sets / "rafdb"]
    go("--eval", "--finetune", "run/checkpoint-best.pth", *data)
    go("--eval", "--finetune", "run/checkpoint-best.pth", *data, "--eval_flip", "--crop_pct", 0.5)
    go("--knn", "--finetune", "run/checkpoint-last.pth", *data)
    written = {str(path.parent.relative_to(run)) for path in run.rglob("eval.json")}
    assert written == {
        ".",
        "eval/checkpoint-best-rafdb",
        "eval/checkpoint-best-rafdb-crop_pct_0.5-eval_flip_True",
        "knn/checkpoint-last-rafdb",
    }
    assert contents(run) == before
    assert not (tmp_path / "output_dir").exists()


def test_two_processes_write_to_one_folder(run, sets):
    options = f"--eval --finetune {run / 'checkpoint-best.pth'} --data_path {sets / 'rafdb'}"
    run_two("main_finetune", f"{options} --output_dir {run} --num_workers 0".split())
    assert (run / "eval" / "checkpoint-best-rafdb" / "eval.json").exists()


def test_the_same_evaluation_again_replaces_its_own_results(run, sets, tmp_path):
    options = f"--data_path {sets / 'rafdb'}"
    first = evaluate(run / "checkpoint-best.pth", tmp_path / "out", options)
    assert evaluate(run / "checkpoint-best.pth", tmp_path / "out", options) == first


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("--data_path {sets}/affectnet", "data "),
        ("--data_path {sets}/rafdb --eval_flip", "options {}"),
        ("--data_path {sets}/rafdb --knn", "kind eval"),
        ("--data_path {sets}/rafdb --finetune {run}/checkpoint-last.pth", "checkpoint "),
    ],
)
def test_results_of_another_kind_are_not_replaced(other, named, run, sets, tmp_path, capfd):
    out = tmp_path / "out"
    evaluate(run / "checkpoint-best.pth", out, f"--data_path {sets / 'rafdb'}")
    before = contents(out)
    options = other.format(sets=sets, run=run).split()
    if "--finetune" not in options:
        options += ["--finetune", run / "checkpoint-best.pth"]
    kind = [] if "--knn" in options else ["--eval"]
    go(*kind, *options, "--output_dir", out, code=BAD_INPUT)
    line = capfd.readouterr().err
    assert f"--output_dir {out}: holds results of another kind" in line
    assert named in line
    del before[out / "status.json"]
    after = contents(out)
    del after[out / "status.json"]
    assert after == before


def test_training_does_not_replace_the_results_of_an_evaluation(run, sets, tmp_path, capfd):
    data = f"--data_path {sets / 'rafdb'}"
    evaluate(run / "checkpoint-best.pth", tmp_path / "out", data)
    options = finetune_options(tmp_path / "out", "vit", data)
    assert run_here(main_finetune, options) == BAD_INPUT
    assert "holds results of another kind (kind eval; now kind training)" in capfd.readouterr().err


OTHERS = {
    "eval": ["", "--face_margin 0", "--eval_flip False", "--imagenet_default_mean_and_std False"],
    "knn": [
        *("", "--label_fraction 0.5", "--label_fraction 0.5 --seed 1", "--aug none", "--cls_token"),
        "--data_path {sets}/rafdb --eval_data_path {sets}/affectnet",
    ],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_different_evaluation_gets_its_own_folder(kind, run, pretrained, sets, tmp_path):
    source = run / "checkpoint-best.pth"
    if kind == "knn":
        source = shutil.copy(pretrained["vit"], tmp_path / "encoder.pth")
    last = OTHERS[kind][-1]
    for given in (*OTHERS[kind], last):  # the second time into the same folder
        options = f"--data_path {sets}/affectnet --input_size 32 {given.format(sets=sets)}".split()
        go(f"--{kind}", "--finetune", source, "--model", "vit_tiny_patch16", *options)
    assert len(list(Path(source).parent.glob(f"{kind}/*/eval.json"))) == len(OTHERS[kind])


def test_the_same_evaluation_in_another_spelling_uses_the_same_folder(
    run, sets, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for checkpoint, data in (("run/checkpoint-best.pth", "rafdb"), (f"{run}/../run/", "rafdb/")):
        checkpoint = checkpoint.removesuffix("checkpoint-best.pth") + "checkpoint-best.pth"
        go("--eval", "--finetune", checkpoint, "--data_path", f"{sets}/{data}")
    assert len(list(run.glob("eval/*"))) == 1
    moved = shutil.copytree(run, tmp_path / "moved")
    go("--eval", "--output_dir", moved, "--data_path", sets / "rafdb")
    assert len(list(moved.glob("eval/*"))) == 1


def test_different_data_with_the_same_name_get_different_folders(run, sets, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(sets / "rafdb", tmp_path / name / "test")
        options = ["--data_path", tmp_path / name / "test"]
        go("--eval", "--finetune", run / "checkpoint-best.pth", *options)
    assert {path.name for path in run.glob("eval/*")} == {
        *("checkpoint-best-test", "checkpoint-best-test-2")
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--eval --knn", "--knn: does not use the head that --eval tests"),
        ("--knn --eval_flip", "--eval_flip: --knn does not flip images"),
        ("--eval --resume {run}/checkpoint-last.pth", "--resume: --finetune names the checkpoint"),
    ],
)
def test_conflicting_options_are_refused(given, words, run, sets, capfd):
    options = [*given.format(run=run).split(), "--finetune", run / "checkpoint-best.pth"]
    go(*options, "--data_path", sets / "rafdb", code=BAD_INPUT)
    assert words in capfd.readouterr().err


def test_nearest_neighbours_do_not_report_flipped_images(finetune, sets, tmp_path, capfd):
    run = finetune(more="--eval_flip")
    capfd.readouterr()
    data = ["--data_path", sets / "rafdb", "--output_dir", tmp_path]
    go("--knn", "--finetune", run / "checkpoint-best.pth", *data)
    assert results(tmp_path)["flip"] is False
    assert results(tmp_path)["differs_from_training"] == {}
    assert "eval_flip" not in capfd.readouterr().out


def test_results_of_an_earlier_run_are_moved_aside(run, sets, capfd):
    before = contents(run)
    data = f"--data_path {sets / 'rafdb'} --finetune {run}/start.pth"
    (run / "checkpoint-last.pth").rename(run / "start.pth")
    for path in run.glob("checkpoint-*"):
        path.unlink()
    assert run_here(main_finetune, finetune_options(run, "vit", f"{data} --epochs 2")) == DONE
    aside = run / "earlier_results"
    assert f"results that are not from this run were moved to {aside}" in capfd.readouterr().out
    assert (aside / "eval.json").read_bytes() == before[run / "eval.json"]
    assert (aside / "figures" / "confusion_matrix.png").exists()
    assert (run / "eval.json").read_bytes() != before[run / "eval.json"]


def test_a_run_whose_results_an_older_release_overwrote_resumes(run, sets, pretrained):
    old = results(run)
    del old["made_by"], old["train_data"]
    (run / "eval.json").write_text(json.dumps(old))
    more = f"--data_path {sets / 'rafdb'} --finetune {pretrained['vit']}"
    assert run_here(main_finetune, finetune_options(run, "vit", more)) == DONE
    assert results(run)["made_by"] == {"kind": "training"}
    assert results(run / "earlier_results") == old


@pytest.mark.parametrize("flags", [["--eval"], ["--knn"], ["--eval", "--modle", "x"]])
def test_a_failed_evaluation_does_not_change_the_status_of_the_run(flags, run, capfd):
    assert status(run) == "done"
    checkpoint = ["--finetune", run / "checkpoint-best.pth"]
    go(*flags, *checkpoint, "--data_path", "/nowhere", "--output_dir", run, code=BAD_INPUT)
    assert status(run) == "done"


def test_a_folder_without_checkpoints_names_the_option(sets, tmp_path, capfd):
    go("--eval", "--data_path", sets / "rafdb", "--output_dir", tmp_path, code=BAD_INPUT)
    assert f"--eval: {tmp_path} holds no checkpoint; name one with" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        ({"accuracy": 1, "train_data": "RAF-DB"}, "training"),
        ({"accuracy": 1, "classifier": "nearest neighbours"}, "knn"),
        ({"accuracy": 1, "checkpoint": "a.pth"}, "eval"),
        ({"made_by": {"kind": "knn"}}, "knn"),
    ],
)
def test_the_kind_of_older_results_is_inferred_from_their_content(result, kind, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(result))
    check_results(tmp_path, {"kind": kind})
    for other in {"training", "knn", "eval"} - {kind}:
        with pytest.raises(BadInput, match=f"kind {kind}; now kind {other}"):
            check_results(tmp_path, {"kind": other})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"eval"'])
def test_incomplete_results_are_replaced(text, tmp_path):
    (tmp_path / "eval.json").write_text(text)
    check_results(tmp_path, {"kind": "eval", "data": "x"})


@pytest.mark.parametrize("made_by", [3, [], {"kind": []}, {"data": {"a": [1]}}])
def test_results_of_unknown_origin_are_kept(made_by, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps({"made_by": made_by, "classifier": 1}))
    with pytest.raises(BadInput, match="holds results of another kind"):
        check_results(tmp_path, {"kind": "eval", "data": "x"})


def test_names_of_evaluation_folders_are_valid_and_short(tmp_path):
    odd = "/data/a b/…\n$(x)/../RAF-DB/"
    made = evaluation_folder("eval", "released_name", odd, None, {"label_order": "a,b"})
    assert made == "output_dir/eval/released_name-RAF-DB-label_order_a,b"
    long = evaluation_folder("eval", "x", "synthetic:90:8", str(tmp_path), {"classes": "n" * 999})
    assert long == str(tmp_path)
    (tmp_path / "log.txt").touch()
    long = evaluation_folder("eval", "x", "synthetic:90:8", str(tmp_path), {"classes": "n" * 999})
    assert long.startswith(f"{tmp_path}/eval/x-synthetic_90_8-classes_nnn")
    assert len(long.rpartition("/")[2]) == 200


def test_figures_of_other_images_do_not_replace_the_figures_of_a_run(run, sets, capfd):
    before = contents(run)
    argv = ["--checkpoint", run / "checkpoint-best.pth", "--data_path", sets / "affectnet"]
    argv += ["--figures", "confusion", "--num_workers", 0]
    assert run_here(main_visualize, list(map(str, argv))) == DONE
    assert contents(run) == before
    own = run / "visualize" / "checkpoint-best-affectnet"
    assert (own / "figures" / "confusion_matrix.png").exists()
    assert str(own) in capfd.readouterr().out
    assert not holds_run(own)
