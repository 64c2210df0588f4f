"""benchmarks/rivals.py: the same labels and minutes as main_finetune.py, results in its format."""

import csv
import json
import sys

import pytest
import torch
from PIL import Image

import main_finetune
from benchmarks import rivals
from datasets.labelled import digest_of
from finetuned import results
from runs import run_here
from util.report.page import write_report
from util.summary import is_finished, read_log

DATA = "--data_path synthetic-lab:32:16 --input_size 32 --label_fraction 0.5"


def run(options):
    return rivals.main(options.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """ResNet-18, trained for 0.3 seconds per seed."""
    folder = tmp_path_factory.mktemp("rivals")
    assert run(f"{DATA} --models resnet18 --seeds 1 2 --minutes 0.005 --output_dir {folder}") == 0
    return folder


@pytest.mark.parametrize("seed", [1, 2])
def test_a_rival_writes_the_results_of_a_fine_tuning_run(trained, seed):
    folder = trained / "resnet18" / f"seed-{seed}"
    assert is_finished(folder)
    result, log = results(folder), read_log(folder)
    with open(folder / "predictions.csv", newline="") as file:
        right = [row["label"] == row["prediction"] for row in csv.DictReader(file)]
    assert result["n"] == len(right) == 16
    assert result["accuracy"] == pytest.approx(100 * sum(right) / 16)
    looks = [line["test_acc1"] for line in log]
    assert len(looks) == rivals.LEGS
    assert result["accuracy"] == max(looks) == looks[result["epoch"]]
    Image.open(folder / "figures" / "predictions.png").verify()
    ends = {name: result["last"].pop(name) for name in ("accuracy_ci", "uar_ci")}
    assert ends["accuracy_ci"][0] <= looks[-1] <= ends["accuracy_ci"][1]
    assert result["last"] == {
        "epoch": rivals.LEGS - 1,
        "accuracy": looks[-1],
        "uar": log[-1]["test_uar"],
        "macro_f1": log[-1]["test_f1"],
    }
    seconds = sum(line["epoch_s"] for line in log)
    assert 0.3 <= 60 * result["minutes"] == pytest.approx(seconds, abs=0.01 * rivals.LEGS)
    assert rivals.minutes_of([str(folder), str(folder)]) == pytest.approx(2 * seconds / 60)


def test_a_given_recipe_is_used_without_a_search(tmp_path, capsys):
    options = f"{DATA} --models resnet18 --minutes 0.005 --output_dir {tmp_path}"
    assert run(f"{options} --seeds 1 --recipe 2e-3:4:strong") == 0
    assert "held out" not in (said := capsys.readouterr().out)
    assert "Recipe(lr=0.002, batch=4, strong=True)" in said
    assert (
        json.loads((tmp_path / "resnet18/seed-1/config.json").read_text())["options"]["lr"] == 2e-3
    )
    assert run(f"{options} --seeds 1 --recipe 1e-3:4:strong") == 2
    assert "was made with --recipe Recipe(lr=0.002, batch=4" in capsys.readouterr().err
    for wrong in ("1e-3", "1e-3:1", "0:8", "1e-3:8:weak", "x:8"):
        assert run(f"{options} --seeds 2 --recipe {wrong}") == 2
        assert "--recipe" in capsys.readouterr().err


def test_finished_seeds_are_kept_and_changed_options_refused(trained, capsys):
    again = f"{DATA} --models resnet18 --seeds 1 2 --output_dir {trained}"
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*.json")}
    assert run(f"{again} --minutes 0.005") == 0
    assert capsys.readouterr().out == "resnet18: already finished: seeds 1, 2\n"
    assert run(f"{again} --minutes 0.01") == 2
    assert "was made with --minutes 0.005, now 0.01" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*.json")} == before


def test_the_best_recipe_on_held_out_labels_is_chosen(monkeypatch):
    """Each candidate is measured on labels that it was not trained on."""
    seen, scores = [], {(1e-3, 8, False): 60.0, (1e-3, 8, True): 50.0}

    class Fake:
        def __init__(self, name, size, classes, recipe, seed, device):
            self.recipe = recipe

        def train(self, x, y, until, end):
            self.known = x
            return 1.0

    def measure(rival, x, y):
        for image in x:
            assert not (rival.known == image).flatten(1).all(1).any()
        seen.append((rival.recipe, len(rival.known), len(x)))
        return scores.get(tuple(rival.recipe), 10.0)

    monkeypatch.setattr(rivals, "Rival", Fake)
    monkeypatch.setattr(rivals, "mean_class_accuracy", measure)
    args = rivals.build_parser().parse_args(f"{DATA} --minutes 1 --output_dir x".split())
    args.device = torch.device("cpu")
    assert rivals.choose("resnet18", args) == (1e-3, 8, False)
    assert [recipe for recipe, *_ in seen] == [
        *(rivals.Recipe(lr, batch) for lr in (3e-4, 1e-3, 3e-3) for batch in (8, 32)),
        rivals.Recipe(1e-3, 8, strong=True),
    ]
    assert {(known, held) for _, known, held in seen} == {(8, 8)}


def test_a_rival_gets_the_labels_of_fine_tuning_and_shares_its_report(trained):
    ours = trained / "ours" / "seed-1"
    options = f"{DATA} --model vit_tiny_patch16 --epochs 1 --seed 1 --num_workers 0 --batch_size 8"
    assert run_here(main_finetune, f"{options} --output_dir {ours}".split()) == 0
    config = json.loads((ours / "config.json").read_text())
    options = f"{DATA} --minutes 1 --output_dir {trained}"
    _, train, test, split = rivals.open_data(rivals.build_parser().parse_args(options.split()), 1)
    assert config["data"]["digest"] == digest_of(train.digest, test.digest)
    assert config["data"]["count"] == len(train) == results(ours)["train_images"] == 16
    assert split == "test"
    page = write_report(ours, trained / "resnet18" / "seed-1", trained / "resnet18" / "seed-2")
    text = page.read_text()
    assert "<h1>ours and resnet18 compared</h1>" in text
    assert text.count("Right and wrong predictions.") == 2  # one run of each


def test_light_augmentation_only_moves_an_image_a_little():
    x, rng = torch.zeros(64, 3, 32, 32), torch.Generator().manual_seed(0)
    x[:, :, 16, 16] = 1
    y = rivals.augment(x, strong=False, rng=rng)
    rows = (y.sum((1, 3)) * torch.arange(32)).sum(1) / y.sum((1, 2, 3))
    assert 13.9 <= rows.min() < 14.5
    assert 17.5 < rows.max() <= 18.1
    torch.testing.assert_close(y.sum((1, 2, 3)), torch.full((64,), 3.0))


def test_strong_augmentation_changes_images_but_leaves_them_recognisable():
    grid = torch.linspace(-1, 1, 32)
    x = (grid[:, None] * grid).expand(64, 3, 32, 32)
    y = rivals.augment(x, strong=True, rng=torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    erased = (y == 0).float().mean((1, 2, 3)) > 0.01
    assert 5 < erased.sum() < 28
    pairs = torch.stack([x.flatten(1), y.flatten(1)], dim=1)
    like = torch.stack([torch.corrcoef(pair)[0, 1].abs() for pair in pairs])
    assert like.min() > 0.3
    assert like.mean() < 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--minutes_of {0}", "log.txt has no training times"),
        ("--minutes 1 --models resnet19", "--models resnet19: timm has no such model"),
        ("--minutes 1 --models deit_tiny_patch16_224", "cannot take images of 32 px"),
        ("--minutes 1 --data_path {0}/nowhere", "nowhere"),
    ],
)
def test_bad_input_gives_one_error_line(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["rivals.py"])
    options = options.format(tmp_path)
    assert run(f"{DATA} {options} --output_dir {tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rivals.py: error: ")
    assert message in line
