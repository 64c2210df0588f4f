"""Trained models exported by `main_export.py`, for tests with other libraries."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import main_export
from datasets.synthetic.generator import SyntheticFaces
from finetuned import EVERYTHING
from models_saved import open_saved
from runs import ROOT, load, run_here
from util.errors import DONE

HOSTILE = ("a|b\n---\n# c", '"><script>', "`d` {e}", "---", "'", "www.f.com\\", "g\u202eh")
CLASSIFIERS = {
    "pooled": ("vit", ""),
    "token": ("vit", "--cls_token"),
    "probe": ("vit", "--linear_probe"),
    "convnext": ("convnext", EVERYTHING),
}
RESNET = {"resnet": ("resnet", "")}  # has no export to transformers
PRETRAINED = {"fcmae": "convnext", "masked resnet": "resnet"}  # others are ViTs


def stirred(content):
    """Make a checkpoint look as if trained for long, so that no two of its vectors are alike.

    After a few steps most norms and GRNs are still 1 and 0: mixing them up would go unnoticed.
    """
    generator = torch.Generator().manual_seed(0)
    for part in ("model", "model_ema"):
        for name, value in content.get(part, {}).items():
            if value.is_floating_point() and value.numel() == max(value.shape, default=0):
                noise = torch.randn(value.shape, generator=generator)
                content[part][name] = value * (0.1 * noise).exp() + 0.05 * noise.roll(1).abs()
    return content


@pytest.fixture(scope="session")
def checkpoint(finetune, pretrained, tmp_path_factory):
    """The file of a trained model, by kind, with its results beside it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(kind):
        if kind in CLASSIFIERS | RESNET or kind == "hostile":
            run = finetune(*(CLASSIFIERS | RESNET).get(kind, CLASSIFIERS["pooled"]))
            content = load(run, "checkpoint-best.pth")
            shutil.copy(run / "eval.json", root / kind)
        else:
            content = load(pretrained[PRETRAINED.get(kind, "vit")].parent)
            content["args"]["predict_ratio"] = 0.25  # used by the training loss only
        content = stirred(content)
        for part in ("model", "model_ema"):  # more confident
            if "head.weight" in content.get(part, {}):
                content[part]["head.weight"] *= 1000
        if kind == "pooled":  # sees the whole picture
            content["preprocessing"]["crop_pct"] = None
        if kind == "hostile":
            content["classes"] = list(HOSTILE)
        if kind == "encoder":
            state = content["model"].items()
            kept = {n: v for n, v in state if not n.startswith(("decoder", "mask_token"))}
            content = {"model": kept}
        return content

    def find(kind):
        path = root / kind / f"{kind}.pth"
        if not path.exists():
            path.parent.mkdir()
            torch.save(make(kind), path)
        return path

    return find


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """The folder of an export by `main_export.py`, made once, and our model."""
    made, opened = {}, {}

    def make(kind, to):
        if kind not in opened:
            opened[kind] = open_saved(checkpoint(kind))
        if (kind, to) not in made:
            folder = tmp_path_factory.mktemp("exported") / "out"
            assert export(checkpoint(kind), to, folder) == DONE
            made[kind, to] = folder
        return made[kind, to], opened[kind]

    return make


def export(source, to, output, *more):
    argv = ["--checkpoint", source, "--to", to, "--output", output, *more]
    return run_here(main_export, [str(arg) for arg in argv])


def some_images(saved, count=3):
    """Random uint8 pixels, and the same normalised for the model."""
    size = saved.preprocessing.input_size
    generator = torch.Generator().manual_seed(count)  # does not depend on earlier tests
    shape = (count, 3, size, size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return pixels, saved.preprocessing.normalise(pixels)


def assert_same(theirs, ours):
    torch.testing.assert_close(theirs, ours, atol=1e-5 * float(ours.abs().max()), rtol=0)


def refused(capfd):
    """The one error line of a program."""
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def run_card(folder, saved, here, monkeypatch, capfd):
    """The code in an export's model card predicts what our code predicts."""
    shutil.copytree(folder, here)
    monkeypatch.chdir(here)
    face = SyntheticFaces(8, 90).image(3)
    Image.fromarray(face).save("face.jpg", quality=100, subsampling=0)
    capfd.readouterr()
    exec(re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1], {})
    said = capfd.readouterr().out.strip()
    if not hasattr(saved, "classes"):
        assert said.startswith("torch.Size([1, ") or said.startswith("(1, ")
        return
    told = json.loads(said.replace("'", '"'))
    face = np.asarray(Image.open("face.jpg").convert("RGB"))
    expected = answer(saved, face).softmax(1)[0].tolist()
    assert max(expected) - min(expected) > 0.2, "else nothing is tested"
    assert told == pytest.approx(dict(zip(saved.classes, expected, strict=True)), abs=2e-3)


def run_docs(to, folder, saved, here, monkeypatch):
    """The code in docs/export.md predicts what our code predicts."""
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "exported").symlink_to(folder)
    face = SyntheticFaces(8, 90).image(3)
    Image.fromarray(face).save("face.jpg", "PNG")
    section = (ROOT / "docs" / "export.md").read_text().split(f"\n## {to}\n")[1].split("\n## ")[0]
    known = {}
    exec("\n".join(re.findall(r"^    (.*)", section, re.M)), known)
    ours = answer(saved, face)
    if to == "safetensors":
        assert known["saved"].classes == saved.classes
    elif to == "onnx":
        torch.testing.assert_close(torch.tensor(known["p"]), ours.softmax(1), atol=1e-3, rtol=0)
    else:
        torch.testing.assert_close(known["logits"].detach(), ours, atol=0.02, rtol=0)


@torch.no_grad()
def answer(saved, face):
    """Our logits for one picture."""
    return saved.model(saved.preprocessing.normalise(saved.preprocessing.view(face)[None]))
