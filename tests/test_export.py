"""Exported models, opened only from their files by the libraries they are for."""

import json
import re

import onnxruntime
import pytest
import timm
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import main_export
from backbones.family import DECODER
from export import onnx_graph
from export import write as export_write
from export.weights import plain_state
from exported import (
    CLASSIFIERS,
    RESNET,
    assert_same,
    export,
    refused,
    run_card,
    run_docs,
    some_images,
)
from finetuned import RAF_NAMES, evaluate, measured
from models_registry import create_classifier
from models_saved import SavedEncoder, open_autoencoder, open_classifier, open_saved
from runs import run_here
from util.errors import BAD_INPUT, FAULT, BadInput
from util.states import root
from util.weights import load_pretrained

HF_CLASSES = {
    "pooled": "BeitForImageClassification",
    "token": "ViTForImageClassification",
    "probe": "ViTForImageClassification",
    "convnext": "ConvNextV2ForImageClassification",
}


# Each library


@pytest.mark.parametrize("kind", ["pooled", "convnext", "resnet", "mae"])
def test_onnxruntime_computes_our_outputs_for_any_number_of_images(
    kind, exported, tmp_path, monkeypatch, capfd
):
    """Everything about ONNX files in one test, as exporting them is slow."""
    if kind == "mae":  # as if it were too large for one file
        monkeypatch.setattr(onnx_graph, "ONE_FILE", 0)
    folder, saved = exported(kind, "onnx")
    assert capfd.readouterr().err == ""
    assert (folder / "model.onnx.data").exists() == (kind == "mae")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    for count in (1, 3, 17):
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
    if kind == "resnet":  # after a few steps, its outputs hardly depend on the image
        return
    run_card(folder, saved, tmp_path / "card", monkeypatch, capfd)
    if kind == "pooled":
        run_docs("onnx", folder, saved, tmp_path / "docs", monkeypatch)


@pytest.mark.parametrize(
    "kind", [*CLASSIFIERS, *RESNET, "mae", "encoder", "fcmae", "masked resnet"]
)
def test_timm_creates_the_model_from_the_folder(kind, exported):
    folder, saved = exported(kind, "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _, imgs = some_images(saved)
    with torch.no_grad():
        if kind in CLASSIFIERS | RESNET:
            assert_same(model(imgs), saved.model(imgs))
            assert tuple(model.pretrained_cfg["label_names"]) == RAF_NAMES
        elif kind in ("fcmae", "masked resnet"):
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
        assert_same(theirs, saved.model.forward_encoder(imgs, ids[:, :keep]))


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
def test_exported_safetensors_can_be_opened_as_a_checkpoint(kind, exported):
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
def test_an_exported_autoencoder_reconstructs_like_the_checkpoint(kind, exported):
    folder, saved = exported(kind, "safetensors")
    again = open_autoencoder(folder / "model.safetensors")
    assert again.model.mask_ratio == saved.model.mask_ratio
    assert again.model.predict_ratio == saved.model.predict_ratio == 1
    _, imgs = some_images(saved)
    noise = torch.rand(len(imgs), saved.model.num_patches)
    with torch.no_grad():
        ours, theirs = (m.reconstruct(imgs, noise=noise) for m in (saved.model, again.model))
    assert torch.equal(ours.pred, theirs.pred)
    name = again.name.removeprefix("mae_")
    classifier = create_classifier(name, 4, again.preprocessing.input_size)
    load_pretrained(classifier, folder / "model.safetensors")


def test_an_exported_encoder_stays_an_encoder(exported):
    folder, saved = exported("encoder", "safetensors")
    again = open_saved(folder / "model.safetensors")
    assert type(again) is type(saved) is SavedEncoder
    assert not any(root(name) in DECODER for name in load_file(folder / "model.safetensors"))
    _, imgs = some_images(saved)
    with torch.no_grad():
        assert_same(again.model.forward_features(imgs), saved.model.forward_features(imgs))


@pytest.mark.parametrize("to", ["hf", "timm"])
@pytest.mark.parametrize("kind", [*CLASSIFIERS, "mae", "fcmae", "encoder"])
def test_an_export_for_another_library_is_read_back_unchanged(kind, to, exported):
    folder, saved = exported(kind, to)
    again = open_saved(folder / "model.safetensors")
    pixels, imgs = some_images(saved)
    assert (again.name, again.notes) == (saved.name, ())
    assert again.preprocessing[:2] == saved.preprocessing[:2]
    assert torch.equal(again.preprocessing.normalise(pixels), imgs)
    with torch.no_grad():
        if kind in CLASSIFIERS:
            assert again.classes == saved.classes
            assert_same(again.model(imgs), saved.model(imgs))
            return
        assert_same(again.model.forward_features(imgs), saved.model.forward_features(imgs))
        if (kind, to) == ("mae", "hf"):
            assert again.model.mask_ratio == saved.model.mask_ratio
            noise = torch.rand(len(imgs), saved.model.num_patches)
            assert_same(*(s.model.reconstruct(imgs, noise=noise).pred for s in (again, saved)))


@pytest.mark.parametrize("kind", ["token", "convnext", "mae"])
def test_missing_settings_of_an_export_are_read_from_files_beside_it(kind, exported, tmp_path):
    """As other programs save it."""
    folder, saved = exported(kind, "hf")
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    again = open_saved(tmp_path / "model.safetensors")
    ours, theirs = again.preprocessing, saved.preprocessing
    assert (list(again.notes), ours.input_size) == ([], theirs.input_size)
    assert list(ours.mean) == list(theirs.mean)
    if theirs.crop_pct:  # rounded to whole pixels there
        assert ours.crop_pct == pytest.approx(theirs.crop_pct, abs=0.02)
    assert getattr(again, "classes", ()) == getattr(saved, "classes", ())
    if kind == "mae":
        assert again.model.mask_ratio == saved.model.mask_ratio
        heads = [s.model.decoder_blocks[0].attn.num_heads for s in (again, saved)]
        assert heads[0] == heads[1]


@pytest.mark.parametrize(
    ("kind", "to"),
    [("probe", "safetensors"), ("convnext", "safetensors"), ("convnext", "timm"), ("token", "hf")],
)
def test_exported_safetensors_are_evaluated_like_the_checkpoint(
    kind, to, exported, checkpoint, sets, tmp_path
):
    folder, _ = exported(kind, to)
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
def test_weights_with_invalid_settings_are_bad_input(damage, exported, tmp_path):
    source = exported("pooled", "safetensors")[0] / "model.safetensors"
    with safe_open(source, "pt") as file:
        notes = file.metadata()
    save_file(load_file(source), tmp_path / "bad.safetensors", {**notes, **damage})
    with pytest.raises(BadInput, match=r"bad\.safetensors"):
        open_classifier(tmp_path / "bad.safetensors")


# Failures


def larger(state):
    name = next(
        n for n in state if n.endswith(("3.norm2.weight", "layer.3.layernorm_after.weight"))
    )
    return {**state, name: state[name] * 1.5}


def swapped(state):
    """Swap two vectors of the same shape and purpose, like an off-by-one error in a translation."""
    first = next(n for n in state if n.endswith(("3.norm1.bias", "3.layernorm_before.bias")))
    second = first.replace("3.", "4.")
    return {**state, first: state[second], second: state[first]}


def upside_down(state):
    """Put the rows of classes in another order than their names."""
    last = [n for n in state if n.endswith(("head.weight", "classifier.weight"))]
    return {**state, **{n: state[n].flip(0) for n in last}}


def renamed(config):
    if "label_names" in config:
        return {**config, "label_names": config["label_names"][::-1]}
    names = reversed(config["id2label"].values())
    return {**config, "id2label": dict(zip(config["id2label"], names, strict=True))}


def other_eps(config):
    """Use transformers' default."""
    return {**config, "layer_norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("to", "damage"),
    [
        *((to, larger) for to in ("timm", "hf", "safetensors")),
        *((to, swapped) for to in ("timm", "hf")),
        *((to, upside_down) for to in ("timm", "hf")),
        *((to, renamed) for to in ("timm", "hf")),
        ("hf", other_eps),
    ],
)
def test_an_export_with_other_outputs_is_not_written(
    to, damage, checkpoint, tmp_path, monkeypatch, capfd
):
    of_config = damage in (renamed, other_eps)
    name = "write_json" if of_config else "write_weights"
    write = getattr(export_write, name)

    def broken(path, content, *rest):
        write(path, damage(content) if path.name != export_write.PROCESSOR else content, *rest)

    monkeypatch.setattr(export_write, name, broken)
    assert export(checkpoint("pooled"), to, tmp_path / "out") == FAULT
    said = "the exported classes differ in name or order; nothing was written"
    if damage is not renamed:
        said = "logits differ by at most .*; the limit is 1e-04"
    assert re.search(rf"--to {to}: {said}", refused(capfd))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_no_files(checkpoint, tmp_path, monkeypatch, capfd):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(export_write, "write_json", full)
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
        ("--checkpoint {file} --to timm --output {full}", "already exists; name a new folder"),
        ("--checkpoint {file} --to timm --output {file}", "already exists"),
        ("--checkpoint {file} --to timm --output {file}/x", "is a file or inside one"),
        ("--checkpoint {file} --to timm --output {new} --license a:b", "an identifier such as"),
        (
            "--checkpoint {file} --to timm --output {new} --classes a,,b",
            "names separated by commas",
        ),
        ("--checkpoint {file} --to timm --output {new} --classes a,b", "--classes names 2"),
        ("--checkpoint {mae} --to timm --output {new} --classes a,b", "pre-trained only"),
        ("--checkpoint {full}/no.pth --to timm --output {new}", "no such file"),
        ("--checkpoint {full} --to timm --output {new}", "is a folder; name a checkpoint in it"),
        ("--checkpoint {full}/page --to timm --output {new}", "a web page"),
    ],
)
def test_wrong_options_give_one_error_line(options, words, checkpoint, tmp_path, capfd):
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
    assert f"needs {lacking}: pip install -r requirements/export.txt" in refused(capfd)
