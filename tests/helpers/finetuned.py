"""Read and compare the results of a fine-tuning."""

import csv
import json

import pytest
import torch

import main_finetune
from datasets import open_labelled, plain
from datasets.transforms import Normalise
from runs import run_here

RAF_NAMES = ("Surprise", "Fear", "Disgust", "Happy", "Sad", "Anger", "Neutral")  # ids 1 to 7
AFF_NAMES = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt")
MEASURED = ("n", "accuracy", "uar", "macro_f1", "recall", "confusion_matrix", "log_loss", "classes")
EVERYTHING = (
    "--model_ema True --model_ema_decay 0.9 --model_ema_eval True --mixup 0.8 --cutmix 1.0 "
    "--reprob 0.25 --drop_path 0.1 --balance True --smoothing 0.1 --layer_decay 0.8 --clip_grad 5 "
    "--lr 0.001"
)


def evaluate(checkpoint, output, more):
    """Run `--eval` in this process; -> eval.json. The default --model must not matter."""
    options = f"--eval --finetune {checkpoint} --output_dir {output} --num_workers 0 --batch_size 4"
    assert run_here(main_finetune, f"{options} {more}".split()) == 0
    return results(output)


def results(folder):
    return json.loads((folder / "eval.json").read_text())


def predictions(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def measured(result):
    return {name: result[name] for name in MEASURED}


def unaugmented(data, split, crop_pct=0.875):
    """The images of a split as tests see them, normalised (n, 3, 32, 32), and their labels."""
    images = open_labelled(str(data)).splits[split]
    view = plain(32, crop_pct)
    pixels = torch.stack([view(images.source.image(i)) for i in range(len(images))])
    return Normalise()(pixels), images.labels


def assert_close(a, b):
    """Equal except for the last bits of numbers."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), [b[key] for key in a]
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-6, rel=1e-6)
    else:
        assert a == b


def config(folder):
    return json.loads((folder / "config.json").read_text())
