"""Files beside exported weights: preprocessing settings and the model card."""

import html
import json
import re
import shutil

import pytest
import skimage.data
import timm
import torch
import transformers
import yaml
from PIL import Image

from export.huggingface import image_processor
from export.model_card import Card, model_card
from export.model_code import code_for
from export.weights import TimmForm, timm_config
from exported import HOSTILE, export, run_card, run_docs
from models_saved import Preprocessing, open_saved
from runs import load
from util.errors import DONE

# Preprocessing settings


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("crop_pct", "bound"), [(None, 0.02), (0.875, 1.5)])
def test_every_library_preprocesses_a_photograph_as_we_do(
    crop_pct, bound, interpolation, tmp_path, checkpoint, monkeypatch
):
    """Mean difference of 255. Libraries resize to whole pixels before cropping: up to half off."""
    monkeypatch.chdir(tmp_path)
    photograph = skimage.data.astronaut()[:420, 60:400]
    Image.fromarray(photograph).save("face.jpg", "PNG")
    own = Preprocessing(224, crop_pct, interpolation=interpolation)
    ours = own.normalise(own.view(photograph)[None])

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor(own)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = {"hf": processor(Image.fromarray(photograph), return_tensors="pt").pixel_values}
    saved = open_saved(checkpoint("pooled"))._replace(preprocessing=own)
    config = timm_config(saved, TimmForm("vit_tiny_patch16_224", {}, {}))["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(config))
    theirs["timm"] = transform(Image.fromarray(photograph))[None]
    lines, known = code_for("onnx", "", True, own._asdict()).splitlines(), {"size": 224}
    words = ("import numpy", "from PIL", "face", "images")
    exec("\n".join(line for line in lines if line.startswith(words)), known)
    theirs["onnx"] = own.normalise(torch.tensor(known["images"]))
    for name, imgs in theirs.items():
        assert imgs.shape == ours.shape, name
        off = (imgs - ours).abs() * torch.tensor(own.std).view(3, 1, 1) * 255
        assert off.mean() < bound, (name, off.mean())


# The model card


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        *(("pooled", to) for to in ("safetensors", "timm", "hf")),
        *(("mae", to) for to in ("safetensors", "timm", "hf")),
        *(("fcmae", to) for to in ("timm", "hf")),
        *(("convnext", to) for to in ("timm", "hf")),
    ],
)
def test_the_code_in_the_card_runs(kind, to, exported, tmp_path, monkeypatch, capfd):
    """For ONNX, see tests/test_export.py."""
    run_card(*exported(kind, to), tmp_path / "here", monkeypatch, capfd)


@pytest.mark.parametrize("to", ["safetensors", "timm", "hf"])
def test_the_code_in_the_docs_runs(to, exported, tmp_path, monkeypatch):
    run_docs(to, *exported("pooled", to), tmp_path / "here", monkeypatch)


def test_the_card_describes_the_model_and_its_results(exported, checkpoint):
    folder, _ = exported("pooled", "hf")
    card = (folder / "README.md").read_text()
    result = json.loads((checkpoint("pooled").parent / "eval.json").read_text())
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["facial-expression-recognition", "masked-autoencoder"],
    }
    low, high = result["uar_ci"]
    assert f"| {result['accuracy']:.2f} % (95 % interval" in body
    assert f"| {result['uar']:.2f} % (95 % interval {low:.2f}–{high:.2f}) |" in body
    assert f"{result['n']} images of RAF\\-DB" in body
    assert "the best epoch on test, which flatters" in body
    assert "| 1 | Fear |" in body
    assert str(checkpoint("pooled").parent) not in card
    assert "not an emotion" in body
    assert "not stated" in body


def test_the_card_omits_results_of_another_epoch(finetune, tmp_path):
    for name, kept in (("checkpoint-best.pth", True), ("checkpoint-old.pth", False)):
        shutil.copy(finetune() / "eval.json", tmp_path)
        content = load(finetune(), "checkpoint-best.pth")
        if not kept:
            content["epoch"] += 7
        torch.save(content, tmp_path / name)
        assert export(tmp_path / name, "safetensors", tmp_path / f"{name}-out") == DONE
        card = (tmp_path / f"{name}-out" / "README.md").read_text()
        assert ("accuracy (WAR)" in card) == kept
        assert ("without results" in card) == (not kept)


def card_beside(checkpoint, result, folder):
    """The card of a checkpoint with this `eval.json` beside it."""
    shutil.copy(checkpoint, folder)
    (folder / "eval.json").write_text(json.dumps(result))
    path = folder / checkpoint.name
    assert export(path, "safetensors", folder / "out") == DONE
    card = (folder / "out" / "README.md").read_text()
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", card)


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": "model_ema"},
        {"made_by": {"kind": "knn"}},
        {"classifier": "nearest neighbours"},
        {"made_by": {"kind": "eval", "checkpoint": "/runs/seed_1.pth"}},
    ],
)
def test_the_card_omits_results_of_other_weights_or_methods(changed, finetune, tmp_path):
    best = finetune() / "checkpoint-best.pth"
    own = json.loads((best.parent / "eval.json").read_text())
    card = card_beside(best, {**own, **changed}, tmp_path)
    assert "accuracy (WAR)" not in card
    assert "without results" in card


def test_the_card_reports_differences_between_test_and_training(finetune, tmp_path):
    best = finetune() / "checkpoint-best.pth"
    own = json.loads((best.parent / "eval.json").read_text())
    result = {
        **own,
        "made_by": {"kind": "eval", "checkpoint": f"/elsewhere/{best.name}"},
        "differs_from_training": {
            "face_margin": {"tested": 0.0, "trained": 0.4},
            "eval_flip": {"tested": True, "trained": False},
            "<img>": 3,
        },
        "left_out": {"images": {"Contempt": 4, "x": "y"}, "answers": ["Sad"]},
        "unreadable": 2,
    }
    card = card_beside(best, result, tmp_path)
    assert "accuracy (WAR)" in card
    assert "\n- warning: tested with --face_margin 0; trained with --face_margin 0.4\n" in card
    assert "\n- warning: tested with --eval_flip True; trained with --eval_flip False\n" in card
    assert "\n- left out: 4 images of Contempt, unknown to the model\n" in card
    assert "\n- left out: 2 images that could not be read\n" in card
    assert "predictions, as the data do not have it: Sad\n" in card
    assert "<img" not in card


def test_the_card_contains_no_folders_of_this_machine(finetune, tmp_path):
    best = finetune() / "checkpoint-best.pth"
    own = json.loads((best.parent / "eval.json").read_text())
    options = {"data_path": "/home/me/my data/raf/"}
    (tmp_path / "config.json").write_text(json.dumps({"options": options}))
    line = "warning: 1 of 4 images of test are in train, too (first: {a} is {b})"
    inside = [f"/home/me/my data/raf/Image/{name}.jpg" for name in ("test_1", "train_2")]
    report = [
        line.format(a=inside[0], b=inside[1]),
        line.format(a="/mnt/disk/x/t.jpg", b="'~/y/u.jpg'"),
        "test: 1/2 of Image/aligned, 50 % / 50 %",
    ]
    card = card_beside(best, {**own, "report": report}, tmp_path)
    assert "(first: Image/test_1.jpg is Image/train_2.jpg)" in card
    assert "(first: t.jpg is 'u.jpg')" in card
    assert report[2] in card
    for folder in ("/home/me", "my data", "/mnt/", str(tmp_path)):
        assert folder not in card


@pytest.mark.parametrize("to", ["safetensors", "timm", "hf"])
def test_hostile_class_names_are_shown_as_names(to, exported):
    folder, _ = exported("hostile", to)
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert set(yaml.safe_load(front)) <= {"library_name", "pipeline_tag", "tags"}
    rows = re.findall(r"^\| (\d) \| (.*) \|$", body, re.M)
    assert [number for number, _ in rows] == list("0123456")
    for line in body.splitlines():
        assert line.strip() != "---"
        assert "<script" not in line
        assert "\u202e" not in line
    shown = [html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", name)) for _, name in rows]
    assert shown[:2] == ["a|b\\n---\\n# c", '"><script>']
    config = json.loads((folder / "config.json").read_text())
    known = {
        "safetensors": lambda: config["classes"],
        "timm": lambda: config["label_names"],
        "hf": lambda: list(config["id2label"].values()),
    }
    assert tuple(known[to]()) == HOSTILE


def test_a_card_can_be_written_for_a_checkpoint_with_invalid_values(tmp_path):
    (tmp_path / "eval.json").write_text(
        '{"epoch": 1, "classes": ["a", "b"], "accuracy": 1e400, "uar": "x", "uar_ci": 5, "n": {},'
        '"recall": {"a": [1], "b": 50}, "data": ["<img>"], "selected_on": 7, "train_data": "# x"}'
    )
    args = {"epochs": "9" * 5000, "lr": 10**400, "mixup": [1], "aug": "`|\n", "finetune": 3}
    own = {"input_size": 32, "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
    own["interpolation"] = "bicubic"
    text = model_card(
        Card(
            to="timm",
            name="vit_tiny_patch16",
            loader="timm.create_model",
            classes=("a", "b"),
            preprocessing=own,
            use="pass",
            parity="equal",
            source=tmp_path / "c|`\n.pth",
            checkpoint={"epoch": 1, "args": args},
        )
    )
    assert "| recall of b | 50.0 % |" in text
    assert "<img" not in text
    assert "\n# x" not in text
    assert max(map(len, text.splitlines())) < 1000


def test_an_empty_folder_is_used_and_the_licence_is_in_the_card(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "empty")
    code = export(checkpoint("token"), "timm", tmp_path / "out", "--license", "cc-by-nc-4.0")
    assert code == DONE
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert front["license"] == "cc-by-nc-4.0"
