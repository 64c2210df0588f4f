"""A new backbone, declared in a single file, works in every program."""

import csv

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import main_export
import main_finetune
import main_predict
import main_pretrain
from backbones import FAMILIES
from datasets import open_images
from inference.explanation import attention_map
from layouts import save
from models_saved import open_autoencoder, open_classifier
from runs import SMALL, SMALL_FINETUNE, load, run_here
from toy_backbone import PATCH, ToyFamily
from util.errors import BadInput

DATA = "--data_path synthetic:32:16"


@pytest.fixture(autouse=True)
def registered():
    toy = ToyFamily()
    FAMILIES.append(toy)
    yield
    FAMILIES.remove(toy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.fixture
def trained(folder):
    """Pre-trained and then fine-tuned, on first use."""
    before, after = folder / "pre-trained", folder / "fine-tuned"
    if not after.exists():
        model = "--model masked_toy_small --input_size 32 --decoder_embed_dim 16"
        options = f"{SMALL} {model} --num_workers 0 --output_dir {before}"
        assert run_here(main_pretrain, options.split()) == 0
        options = f"{SMALL_FINETUNE} --model toy_small --layer_decay 0.7 {DATA}"
        options += f" --finetune {before}/checkpoint-last.pth --output_dir {after}"
        assert run_here(main_finetune, options.split()) == 0
    return after / "checkpoint-last.pth"


def test_its_layers_have_decayed_learning_rates(trained):
    scales = {group["lr_scale"] for group in load(trained.parent)["optimizer"]["param_groups"]}
    assert sorted(scales) == pytest.approx([0.7**3, 0.7**2, 0.7, 1])


def test_its_pre_trained_checkpoint_reconstructs(trained, folder):
    saved = open_autoencoder(folder / "pre-trained" / "checkpoint-last.pth")
    assert (saved.name, saved.model.patch_size) == ("masked_toy_small", PATCH)
    out = saved.model.reconstruct(torch.randn(2, 3, 32, 32))
    assert out.pred.shape == (2, 16, 3 * PATCH**2)
    assert out.mask.sum(1).tolist() == [8, 8]
    assert torch.equal(
        load(folder / "pre-trained")["model"]["mask_token"], saved.model.state_dict()["mask_token"]
    )


def test_it_is_evaluated_and_main_predict_gives_its_predictions(trained, folder, tmp_path):
    options = f"--eval --finetune {trained} {DATA} --num_workers 0 --output_dir {tmp_path}/eval"
    assert run_here(main_finetune, options.split()) == 0
    images = open_images("synthetic:4", size=36).source
    for i in range(4):
        save(Image.fromarray(images.image(i)), tmp_path / "faces" / f"{i}.png")
    options = f"--checkpoint {trained} --detector none --num_workers 0 --device cpu"
    options += f" {tmp_path}/faces --output {tmp_path}/rows.csv"
    assert run_here(main_predict, options.split()) == 0
    saved = open_classifier(trained)
    views = torch.stack([saved.preprocessing.view(images.image(i)) for i in range(4)])
    expected = saved.model(saved.preprocessing.normalise(views)).softmax(1).detach().numpy()
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = np.array([[float(row[f"p_{name}"]) for name in saved.classes] for row in rows])
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_it_has_an_attention_map(trained):
    heat = attention_map(open_classifier(trained).model, torch.randn(2, 3, 32, 32))
    assert heat.shape == (2, 32, 32)


def test_it_is_exported_and_read_back(trained, tmp_path):
    saved = open_classifier(trained)
    for to in ("onnx", "safetensors"):
        options = f"--checkpoint {trained} --to {to} --output {tmp_path / to}"
        assert run_here(main_export, options.split()) == 0
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = saved.model(saved.preprocessing.normalise(imgs)).detach().numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    logits, _ = session.run(None, {session.get_inputs()[0].name: imgs.numpy()})
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    again = open_classifier(tmp_path / "safetensors" / "model.safetensors")
    assert again.classes == saved.classes
    for name, value in saved.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_options_of_other_backbones_are_refused():
    parser = main_finetune.build_parser()
    with pytest.raises(BadInput, match="--cls_token: not an option of toy_small, only of ViT"):
        main_finetune.check_options(parser.parse(["--model", "toy_small", "--cls_token"]))
