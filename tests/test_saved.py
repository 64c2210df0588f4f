"""Models opened from checkpoints without options: predictions and pictures as in their runs."""

import argparse

import numpy as np
import pytest
import timm
import torch

from finetuned import EVERYTHING, RAF_NAMES, predictions, unaugmented
from models_registry import create_classifier, create_pretrain_model
from models_saved import SavedEncoder, open_autoencoder, open_classifier, open_saved
from runs import load
from util.errors import BadInput


@pytest.mark.parametrize(
    ("family", "more"),
    [("vit", ""), ("vit", "--cls_token"), ("vit", "--linear_probe"), ("convnext", EVERYTHING)],
)
def test_a_fine_tuned_checkpoint_predicts_as_in_its_run(family, more, sets, finetune):
    folder = finetune(family, more)
    saved = open_classifier(folder / "checkpoint-best.pth")
    assert saved.classes == RAF_NAMES
    pixels, _ = unaugmented(sets / "rafdb", "test", saved.preprocessing.crop_pct)
    with torch.no_grad():
        p = saved.model(pixels).softmax(1)
    rows = predictions(folder)
    expected = [[float(row[f"p_{name}"]) for name in RAF_NAMES] for row in rows]
    np.testing.assert_allclose(p, expected, atol=2e-6)


def test_a_foreign_checkpoint_is_recognised_by_its_tensors(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64).eval()
    path = tmp_path / "theirs.pth"
    torch.save({"model": theirs.state_dict(), "args": argparse.Namespace(input_size=224)}, path)
    with pytest.raises(BadInput, match=r"has 3 classes, but does not name them; .* --classes A,B"):
        open_classifier(path)
    with pytest.raises(BadInput, match="has 3 classes, but --classes names 2"):
        open_classifier(path, ("a", "b"))
    saved = open_classifier(path, ("a", "b", "c"))
    assert (saved.name, saved.preprocessing.input_size) == ("vit_tiny_patch16", 64)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(saved.model(x), theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_an_autoencoder_reconstructs_as_in_its_run(family, pretrained):
    own = load(pretrained[family].parent)
    names = ["input_size", "mask_ratio", "norm_pix_loss", "decoder_embed_dim", "decoder_depth"]
    names += ["decoder_num_heads"] * (family == "vit")
    options = {name: own["args"][name] for name in names}
    model = create_pretrain_model(own["args"]["model"], **options).eval()
    model.load_state_dict(own["model"])
    saved = open_autoencoder(pretrained[family])
    size = options["input_size"]
    x = torch.rand(2, 3, size, size)
    noise = torch.rand(2, model.num_patches)
    with torch.no_grad():
        ours, expected = (m.reconstruct(x, noise=noise) for m in (saved.model, model))
    torch.testing.assert_close(ours.pred, expected.pred)
    assert saved.model.mask_ratio == own["args"]["mask_ratio"]
    assert saved.model.norm_pix_loss == own["args"]["norm_pix_loss"]


def test_unsuitable_checkpoints_are_refused_with_advice(pretrained, finetune, tmp_path):
    with pytest.raises(BadInput, match=r"was pre-trained only .* fine-tune it first"):
        open_classifier(pretrained["vit"])
    with pytest.raises(BadInput, match=r"no decoder, .* use a pre-training checkpoint"):
        open_autoencoder(finetune() / "checkpoint-best.pth")
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(BadInput, match="no ViT, ConvNeXt V2 or ResNet in a known layout"):
        open_classifier(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "damage",
    [
        {"preprocessing": {}},
        {"preprocessing": {"input_size": "32"}},
        {"preprocessing": {"input_size": 32, "std": [0, 1, 1]}},
        {"preprocessing": {"input_size": 10**9}},
        {"preprocessing": {"input_size": 33}},
        {"preprocessing": {"input_size": 32, "crop_pct": [1]}},
        {"classes": 7},
        {"classes": [1] * 7},
        {"evaluated": 3, "model": None},
    ],
)
def test_a_checkpoint_with_invalid_settings_is_bad_input(damage, finetune, tmp_path):
    torch.save({**load(finetune(), "checkpoint-best.pth"), **damage}, tmp_path / "bad.pth")
    with pytest.raises(BadInput, match=r"bad\.pth"):
        open_classifier(tmp_path / "bad.pth")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("mask_ratio", value) for value in ("0.75", 2, [0.5], float("nan"), True)),
        *(("decoder_num_heads", value) for value in (0, -4, "4", True, torch.tensor(4))),
        *(("norm_pix_loss", value) for value in ("no", torch.zeros(3))),
    ],
)
def test_an_autoencoder_with_an_invalid_option_is_bad_input(name, value, pretrained, tmp_path):
    own = load(pretrained["vit"].parent)
    torch.save({**own, "args": {**own["args"], name: value}}, tmp_path / "bad.pth")
    with pytest.raises(BadInput, match=rf"bad\.pth: holds an invalid {name}: "):
        open_autoencoder(tmp_path / "bad.pth")


def test_a_file_with_only_an_encoder_is_opened_as_an_encoder(pretrained, tmp_path):
    whole = open_autoencoder(pretrained["vit"])
    weights = load(pretrained["vit"].parent)["model"]
    encoder = {n: v for n, v in weights.items() if not n.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    saved = open_saved(tmp_path / "encoder.pth")
    assert isinstance(saved, SavedEncoder)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = [s.model.forward_features(x) for s in (saved, whole)]
    torch.testing.assert_close(*features)


def test_a_model_with_contradictory_sizes_is_bad_input(tmp_path):
    model = create_pretrain_model(
        "mae_vit_tiny_patch16", 32, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
    )
    path = tmp_path / "bad.pth"
    torch.save({"model": model.state_dict(), "args": {"decoder_num_heads": 5}}, path)
    with pytest.raises(BadInput, match=r"bad\.pth: its sizes contradict each other"):
        open_autoencoder(path)
    classifier = create_classifier("vit_tiny_patch16", 2, 32).state_dict()
    torch.save({**classifier, "head.weight": torch.zeros(2, 191)}, path)
    with pytest.raises(BadInput, match=r"bad\.pth"):
        open_classifier(path, "ab")
