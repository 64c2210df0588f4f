"""Exported models, opened from their files alone by the libraries they are for."""

import html
import json
import re
import shutil

import numpy as np
import onnxruntime
import pytest
import skimage.data
import timm
import torch
import transformers
import yaml
from finetuned import EVERYTHING, RAF_NAMES, evaluate, measured
from PIL import Image
from runs import ROOT, load, run_here
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import engine_export
import engine_onnx
import main_export
from datasets.synthetic import SyntheticFaces
from models_export import TimmForm, plain_state, timm_config
from models_hf import image_processor
from models_registry import create_classifier
from models_saved import Preprocessing, open_autoencoder, open_classifier, open_saved
from util.errors import BAD_INPUT, DONE, FAULT, BadInput
from util.model_card import Card, model_card
from util.model_code import code_for
from util.weights import load_pretrained

HOSTILE = ("a|b\n---\n# c", '"><script>', "`d` {e}", "---", "'", "www.f.com\\", "g\u202eh")
CLASSIFIERS = {
    "pooled": ("vit", ""),
    "token": ("vit", "--cls_token"),
    "probe": ("vit", "--linear_probe"),
    "convnext": ("convnext", EVERYTHING),
}
HF_CLASSES = {
    "pooled": "BeitForImageClassification",
    "token": "ViTForImageClassification",
    "probe": "ViTForImageClassification",
    "convnext": "ConvNextV2ForImageClassification",
}


@pytest.fixture(scope="module")
def checkpoint(finetune, pretrained, tmp_path_factory):
    """A trained model's file, by what it is."""
    root = tmp_path_factory.mktemp("checkpoints")

    def find(kind):
        if kind == "pooled":  # that sees the whole picture, and is surer of itself
            content = load(finetune(), "checkpoint-best.pth")
            content["model"]["head.weight"] *= 1000
            content["preprocessing"]["crop_pct"] = None
            (root / "run").mkdir(exist_ok=True)
            shutil.copy(finetune() / "eval.json", root / "run")
            torch.save(content, root / "run" / "pooled.pth")
            return root / "run" / "pooled.pth"
        if kind in CLASSIFIERS:
            return finetune(*CLASSIFIERS[kind]) / "checkpoint-best.pth"
        if kind == "encoder":
            state = load(pretrained["vit"].parent)["model"]
            kept = {n: v for n, v in state.items() if not n.startswith(("decoder", "mask_token"))}
            torch.save({"model": kept}, root / "encoder.pth")
            return root / "encoder.pth"
        if kind == "hostile":
            content = load(finetune(), "checkpoint-best.pth")
            torch.save({**content, "classes": list(HOSTILE)}, root / "hostile.pth")
            return root / "hostile.pth"
        return pretrained[{"mae": "vit", "fcmae": "convnext"}[kind]]

    return find


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The folder of an export by `main_export.py`, made once; and our model."""
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
    """uint8 pixels, and the same as the model takes them."""
    size = saved.preprocessing.input_size
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return pixels, saved.preprocessing.normalise(pixels)


def assert_same(theirs, ours):
    torch.testing.assert_close(theirs, ours, atol=1e-5 * float(ours.abs().max()), rtol=0)


# Each library


@pytest.mark.parametrize("kind", ["pooled", "convnext", "mae"])
def test_onnxruntime_answers_for_any_number_of_images(kind, exported, monkeypatch, capfd):
    if kind == "mae":  # as if it were too large for one file
        monkeypatch.setattr(engine_onnx, "ONE_FILE", 0)
    folder, saved = exported(kind, "onnx")
    assert capfd.readouterr().err == ""
    assert (folder / "model.onnx.data").exists() == (kind == "mae")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    for count in (1, 3):
        pixels, imgs = some_images(saved, count)
        answers = session.run(None, {"images": pixels.numpy()})
        with torch.no_grad():
            if kind == "mae":
                assert_same(torch.tensor(answers[0]), saved.model.forward_features(imgs))
                continue
            logits = saved.model(imgs)
        assert_same(torch.tensor(answers[0]), logits)
        assert_same(torch.tensor(answers[1]), logits.softmax(1))
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["classes"]) == list(getattr(saved, "classes", ()))
    assert json.loads((folder / "preprocessing.json").read_text())["preprocessing"] == {
        **json.loads(notes["preprocessing"]),
        "input_size": 32,
    }


@pytest.mark.parametrize("kind", [*CLASSIFIERS, "mae", "encoder", "fcmae"])
def test_timm_creates_it_from_the_folder(kind, exported):
    folder, saved = exported(kind, "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _, imgs = some_images(saved)
    with torch.no_grad():
        if kind in CLASSIFIERS:
            assert_same(model(imgs), saved.model(imgs))
            assert tuple(model.pretrained_cfg["label_names"]) == RAF_NAMES
        elif kind == "fcmae":
            features = model.forward_features(imgs).mean((2, 3))
            assert_same(features, saved.model.forward_features(imgs))
        else:
            assert_same(model(imgs), saved.model.forward_features(imgs))
    head = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=4).eval()
    assert head(imgs).shape == (3, 4), "and it can be fine-tuned there"


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_transformers_classify_as_we_do(kind, exported):
    folder, saved = exported(kind, "hf")
    cls = getattr(transformers, HF_CLASSES[kind])
    auto = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(auto) is cls
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert tuple(model.config.id2label[k] for k in range(7)) == RAF_NAMES
    assert model.config.label2id["Fear"] == 1
    _, imgs = some_images(saved)
    with torch.no_grad():
        assert_same(model.eval()(imgs).logits, saved.model(imgs))
        assert_same(auto(imgs).logits, saved.model(imgs))


def test_transformers_vitmae_reconstructs_as_we_do(exported):
    folder, saved = exported("mae", "hf")
    model, report = transformers.ViTMAEForPreTraining.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    _, imgs = some_images(saved)
    noise = torch.rand(len(imgs), saved.model.num_patches)
    with torch.no_grad():
        theirs, ours = model(imgs, noise=noise), saved.model.reconstruct(imgs, noise=noise)
        assert_same(theirs.logits, ours.pred)
        assert_same(theirs.loss, saved.model(imgs, noise=noise))
    assert torch.equal(theirs.mask, ours.mask)


@pytest.mark.parametrize("kind", ["mae", "encoder"])
def test_transformers_vitmae_model_is_the_encoder(kind, exported):
    folder, saved = exported(kind, "hf")
    model = transformers.ViTMAEModel.from_pretrained(folder).eval()
    _, imgs = some_images(saved)
    noise = torch.rand(len(imgs), saved.model.num_patches)
    with torch.no_grad():
        theirs = model(imgs, noise=noise).last_hidden_state
        keep = theirs.shape[1] - 1
        assert 0 < keep < saved.model.num_patches
        ids = noise.argsort(dim=1)
        assert_same(theirs, saved.model.encode(imgs, ids[:, :keep]))


def test_transformers_convnextv2_model_is_fcmaes_encoder(exported):
    folder, saved = exported("fcmae", "hf")
    model, report = transformers.ConvNextV2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    _, imgs = some_images(saved)
    with torch.no_grad():
        theirs = model.eval()(imgs).last_hidden_state
        ours = saved.model.encoder(imgs)[:, 0].permute(0, 3, 1, 2)
    assert_same(theirs, ours)


# Our own files


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_exported_safetensors_are_a_checkpoint_again(kind, exported):
    folder, saved = exported(kind, "safetensors")
    again = open_classifier(folder / "model.safetensors")
    assert again[2:4] == saved[2:4]
    assert again.name == saved.name
    assert plain_state(again.model).keys() == plain_state(saved.model).keys()
    _, imgs = some_images(saved)
    with torch.no_grad():
        assert torch.equal(again.model(imgs), saved.model(imgs))
    assert json.loads((folder / "config.json").read_text())["classes"] == list(RAF_NAMES)


@pytest.mark.parametrize("kind", ["mae", "fcmae"])
def test_an_exported_autoencoder_reconstructs_again(kind, exported):
    folder, saved = exported(kind, "safetensors")
    again = open_autoencoder(folder / "model.safetensors")
    assert again.model.mask_ratio == saved.model.mask_ratio
    _, imgs = some_images(saved)
    noise = torch.rand(len(imgs), saved.model.num_patches)
    with torch.no_grad():
        ours, theirs = (m.reconstruct(imgs, noise=noise) for m in (saved.model, again.model))
    assert torch.equal(ours.pred, theirs.pred)
    name = again.name.removeprefix("mae_")
    classifier = create_classifier(name, 4, again.preprocessing.input_size)
    load_pretrained(classifier, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["probe", "convnext"])
def test_exported_safetensors_are_evaluated_like_the_checkpoint(
    kind, exported, checkpoint, sets, tmp_path
):
    folder, _ = exported(kind, "safetensors")
    data = f"--data_path {sets / 'rafdb'}"
    a = evaluate(checkpoint(kind), tmp_path / "a", data)
    b = evaluate(folder / "model.safetensors", tmp_path / "b", data)
    assert measured(a) == measured(b)


@pytest.mark.parametrize(
    "damage",
    [
        {"preprocessing": '{"input_size": "32"}'},
        {"preprocessing": '{"input_size": 32, "std": [0, 1, 1]}'},
        {"classes": "7"},
        {"classes": "[" * 100_000},
        {"classes": '["a"]'},
        {"args": "[]", "classes": "{"},
    ],
)
def test_settings_beside_weights_that_were_tampered_with_are_bad_input(damage, exported, tmp_path):
    source = exported("pooled", "safetensors")[0] / "model.safetensors"
    with safe_open(source, "pt") as file:
        notes = file.metadata()
    save_file(load_file(source), tmp_path / "bad.safetensors", {**notes, **damage})
    with pytest.raises(BadInput, match=r"bad\.safetensors"):
        open_classifier(tmp_path / "bad.safetensors")


# Pictures: what the settings tell the libraries to do


@pytest.mark.parametrize(("crop_pct", "bound"), [(None, 0.02), (0.875, 1.5)])
def test_a_photograph_reaches_every_library_as_it_reaches_us(
    crop_pct, bound, tmp_path, exported, monkeypatch
):
    """Mean difference of 255. Others resize before they crop, to whole pixels: half of one off."""
    monkeypatch.chdir(tmp_path)
    photograph = skimage.data.astronaut()[:420, 60:400]
    Image.fromarray(photograph).save("face.jpg", "PNG")
    own = Preprocessing(224, crop_pct)
    ours = own.normalise(own.view(photograph)[None])

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor(own)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = {"hf": processor(Image.fromarray(photograph), return_tensors="pt").pixel_values}
    saved = exported("pooled", "timm")[1]._replace(preprocessing=own)
    config = timm_config(saved, TimmForm("vit_tiny_patch16_224", {}, {}))["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(config))
    theirs["timm"] = transform(Image.fromarray(photograph))[None]
    lines, known = code_for("onnx", "", True, crop_pct).splitlines(), {"size": 224}
    words = ("import numpy", "from PIL", "face", "images")
    exec("\n".join(line for line in lines if line.startswith(words)), known)
    theirs["onnx"] = own.normalise(torch.tensor(known["images"]))
    for name, imgs in theirs.items():
        assert imgs.shape == ours.shape, name
        off = (imgs - ours).abs() * torch.tensor(own.std).view(3, 1, 1) * 255
        assert off.mean() < bound, (name, off.mean())


# The model card


def code_of(folder):
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        *(("pooled", to) for to in ("onnx", "safetensors", "timm", "hf")),
        *(("mae", to) for to in ("onnx", "safetensors", "timm", "hf")),
        *(("fcmae", to) for to in ("timm", "hf")),
        *(("convnext", to) for to in ("onnx", "timm", "hf")),
    ],
)
def test_the_code_in_the_card_runs(kind, to, exported, tmp_path, monkeypatch, capfd):
    folder, saved = exported(kind, to)
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    face = SyntheticFaces(8, 90).image(3)
    Image.fromarray(face).save("face.jpg", quality=100, subsampling=0)
    capfd.readouterr()
    exec(code_of(folder), {})
    said = capfd.readouterr().out.strip()
    if kind not in CLASSIFIERS:
        assert said.startswith("torch.Size([1, ") or said.startswith("(1, ")
        return
    told = json.loads(said.replace("'", '"'))
    face = np.asarray(Image.open("face.jpg").convert("RGB"))
    with torch.no_grad():
        p = saved.model(saved.preprocessing.normalise(saved.preprocessing.view(face)[None]))
    expected = p.softmax(1)[0].tolist()
    if kind == "pooled":
        assert max(expected) - min(expected) > 0.2, "else nothing is tested"
    assert told == pytest.approx(dict(zip(saved.classes, expected, strict=True)), abs=2e-3)


@pytest.mark.parametrize("to", ["onnx", "safetensors", "timm", "hf"])
def test_the_code_in_the_docs_runs(to, exported, tmp_path, monkeypatch):
    folder, saved = exported("pooled", to)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").symlink_to(folder)
    face = SyntheticFaces(8, 90).image(3)
    Image.fromarray(face).save("face.jpg", "PNG")
    section = (ROOT / "docs" / "export.md").read_text().split(f"\n## {to}\n")[1].split("\n## ")[0]
    known = {}
    exec("\n".join(re.findall(r"^    (.*)", section, re.M)), known)
    imgs = saved.preprocessing.normalise(saved.preprocessing.view(face)[None])
    with torch.no_grad():
        ours = saved.model(imgs)
    if to == "safetensors":
        assert known["saved"].classes == saved.classes
    elif to == "onnx":
        torch.testing.assert_close(torch.tensor(known["p"]), ours.softmax(1), atol=1e-3, rtol=0)
    else:
        torch.testing.assert_close(known["logits"].detach(), ours, atol=0.02, rtol=0)


def test_the_card_tells_what_the_model_is_and_how_good(exported, checkpoint):
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


def test_results_of_another_epoch_are_not_told(finetune, tmp_path):
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


@pytest.mark.parametrize("to", ["safetensors", "timm", "hf"])
def test_hostile_class_names_stay_names(to, exported):
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


def test_a_card_survives_a_checkpoint_that_holds_anything(tmp_path):
    (tmp_path / "eval.json").write_text(
        '{"epoch": 1, "classes": ["a", "b"], "accuracy": 1e400, "uar": "x", "uar_ci": 5, "n": {},'
        '"recall": {"a": [1], "b": 50}, "data": ["<img>"], "selected_on": 7, "train_data": "# x"}'
    )
    args = {"epochs": "9" * 5000, "lr": 10**400, "mixup": [1], "aug": "`|\n", "finetune": 3}
    own = {"input_size": 32, "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
    text = model_card(
        Card(
            to="timm",
            name="vit_tiny_patch16",
            loader="timm.create_model",
            classes=("a", "b"),
            preprocessing=own,
            code="pass",
            parity="equal",
            source=tmp_path / "c|`\n.pth",
            checkpoint={"epoch": 1, "args": args},
        )
    )
    assert "| recall of b | 50.0 % |" in text
    assert "<img" not in text
    assert "\n# x" not in text
    assert max(map(len, text.splitlines())) < 1000


# What cannot work


def refused(capfd):
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("to", ["timm", "hf", "safetensors"])
def test_an_export_that_answers_otherwise_is_no_export(
    to, checkpoint, tmp_path, monkeypatch, capfd
):
    write = engine_export.write_weights

    def broken(path, state, metadata=None):
        name = next(name for name in state if name.endswith("3.norm2.weight") or "layer.3" in name)
        write(path, {**state, name: state[name] * 1.5}, metadata)

    monkeypatch.setattr(engine_export, "write_weights", broken)
    assert export(checkpoint("pooled"), to, tmp_path / "out") == FAULT
    said = rf"--to {to}: logits differ by at most .*; the limit is 1e-04"
    assert re.search(said, refused(capfd))
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_half_way_leaves_nothing(checkpoint, tmp_path, monkeypatch, capfd):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(engine_export, "write_json", full)
    assert export(checkpoint("pooled"), "timm", tmp_path / "out") == FAULT
    assert "No space left on device" in refused(capfd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--to onnx --output {new}", "--checkpoint is missing"),
        ("--checkpoint {file} --output {new}", "--to is missing"),
        (
            "--checkpoint {file} --to keras --output {new}",
            "choose from onnx, safetensors, timm, hf",
        ),
        ("--checkpoint {file} --to timm --output {full}", "is there already; name a new folder"),
        ("--checkpoint {file} --to timm --output {file}", "is there already"),
        ("--checkpoint {file} --to timm --output {file}/x", "cannot be written"),
        ("--checkpoint {file} --to timm --output {new} --license a:b", "an identifier such as"),
        ("--checkpoint {file} --to timm --output {new} --classes a,,b", "names by commas"),
        ("--checkpoint {file} --to timm --output {new} --classes a,b", "--classes names 2"),
        ("--checkpoint {mae} --to timm --output {new} --classes a,b", "pre-trained only"),
        ("--checkpoint {full}/no.pth --to timm --output {new}", "no such file"),
        ("--checkpoint {full}/page --to timm --output {new}", "a web page"),
    ],
)
def test_what_cannot_be_exported_is_one_line(options, words, checkpoint, tmp_path, capfd):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "page").write_text("<html>")
    places = {"file": checkpoint("pooled"), "mae": checkpoint("mae")}
    places |= {name: tmp_path / name for name in ("new", "full")}
    capfd.readouterr()
    assert run_here(main_export, options.format(**places).split()) == BAD_INPUT
    assert words in refused(capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(("to", "lacking"), [("onnx", "onnxscript"), ("hf", "transformers")])
def test_a_missing_library_is_named_with_its_file(to, lacking, tmp_path, monkeypatch, capfd):
    find = main_export.importlib.util.find_spec
    monkeypatch.setattr(
        main_export.importlib.util, "find_spec", lambda n: None if n == lacking else find(n)
    )
    assert export("any.pth", to, tmp_path / "out") == BAD_INPUT
    assert f"needs {lacking}: pip install -r requirements-export.txt" in refused(capfd)


def test_an_empty_folder_is_taken_and_a_stated_licence_stands_in_the_card(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "empty")
    code = export(checkpoint("token"), "timm", tmp_path / "out", "--license", "cc-by-nc-4.0")
    assert code == DONE
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert front["license"] == "cc-by-nc-4.0"
