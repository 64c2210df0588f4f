"""Files for the original authors' MAE-SFER and for S2D, read the way these programs read files.

Their loaders are reimplemented here on timm's ViT, which both use.
"""

import math

import pytest
import timm
import torch
from torch import nn

from datasets.transforms import Normalise
from export.weights import s2d_form
from exported import export, refused, stirred
from finetuned import RAF_NAMES
from models_registry import create_classifier, create_pretrain_model
from models_saved import Preprocessing, SavedClassifier, open_classifier, open_saved
from util.errors import BAD_INPUT, DONE, BadInput
from util.weights import load_pretrained

WHOLE = {"input_size": 224, "crop_pct": None, "interpolation": "bilinear"}
WHOLE |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "face_margin": None}


def trained(path, size, fine_tuned, patch=16, pool="token", side=224):
    """A checkpoint as this project writes it."""
    if fine_tuned:
        options = {"patch_size": patch, "global_pool": pool}
        model = create_classifier(f"vit_{size}_patch16", 7, side, **options)
        known = {"classes": list(RAF_NAMES), "preprocessing": {**WHOLE, "input_size": side}}
        known |= {"epoch": 41, "args": {"model": f"vit_{size}_patch16", "patch_size": patch}}
    else:
        small = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
        model = create_pretrain_model(f"mae_vit_{size}_patch16", side, patch_size=patch, **small)
        known = {"args": {"decoder_num_heads": 2}}
    torch.save(stirred({"model": model.state_dict(), **known}), path)
    return path


def their_vit(size, patch=16, classes=7):
    """timm's ViT with a position embedding of zeros, like theirs before weights are loaded."""
    model = timm.create_model(f"vit_{size}_patch16_224", patch_size=patch, num_classes=classes)
    nn.init.zeros_(model.pos_embed)
    return model.eval()


def mae_sfer_loads(path, model):
    """Load as their `utils.load_model` does; -> the next epoch, and unexpected keys."""
    content = torch.load(path, weights_only=True)
    names = ("vit-base-checkpoint-300.pth", "mae_pretrain_vit_base.pth")
    names += ("vit-tiny-checkpoint-299.pth", "vit-small-checkpoint-299.pth")
    if "model" in content:
        assert any(name in str(path) for name in names)
        state, after = content["model"], 0
    else:
        state, after = content["model_state_dict"], content["epoch"] + 1
        assert content["train_loss"] == math.inf
    own = model.state_dict()
    kept = {n: v if n not in own or v.shape == own[n].shape else own[n] for n, v in state.items()}
    return after, model.load_state_dict({**own, **kept}, strict=False).unexpected_keys


def s2d_takes(content):
    """The tensors that S2D's `_create_vision_transformer` loads, under timm's names."""
    state = content["model_state_dict"] if "model_state_dict" in content else content["model"]
    state = dict(state)
    for part in ("weight", "bias"):
        state[f"ln_post.{part}"] = state.pop(f"norm.{part}")
    assert state["patch_embed_prompt.proj.weight"].shape[1] != 128
    del state["patch_embed_prompt.proj.weight"]
    return {name.replace("ln_post.", "norm."): value for name, value in state.items()}


def reads_s2d_back(path, ours):
    """Check that fine-tuning starts from an S2D file as from the model it was made of."""
    model = create_classifier("vit_base_patch16", 7, 224, global_pool="token")
    report = load_pretrained(model, path)
    assert report.missing == ["head.weight", "head.bias"]
    assert report.layout == "S2D"
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, ours.state_dict()[name]), name


def imgs_of(count=2):
    pixels = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)
    return Normalise()(pixels)


def only_file(folder):
    (path,) = folder.glob("*.pth")
    assert {p.name for p in folder.iterdir()} == {path.name, "README.md"}
    return path


@pytest.mark.parametrize(("size", "patch"), [("tiny", 16), ("small", 32)])
@torch.no_grad()
def test_mae_sfer_loads_every_tensor_of_a_fine_tuned_model_with_equal_outputs(
    size, patch, tmp_path
):
    source = trained(tmp_path / "own.pth", size, True, patch)
    assert export(source, "mae-sfer", tmp_path / "out") == DONE
    path, ours, theirs = only_file(tmp_path / "out"), open_saved(source), their_vit(size, patch)
    state = torch.load(path, weights_only=True)["model_state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert path.name == f"vit-{size}-finetuned.pth"
    assert mae_sfer_loads(path, theirs) == (42, [])
    assert theirs.state_dict().keys() == ours.model.state_dict().keys()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    imgs = imgs_of()
    torch.testing.assert_close(theirs(imgs), ours.model(imgs), atol=1e-5, rtol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    command = f"--checkpoint-whole {path.name} --model-name vit_{size}_fixedpe_patch16_224"
    assert f"{command} --num_class 7 --evaluate\n" in card
    assert "| 1 | Fear |" in card


@torch.no_grad()
def test_mae_sfer_loads_a_pre_trained_model_from_the_file_name_it_expects(tmp_path):
    source = trained(tmp_path / "own.pth", "tiny", False)
    assert export(source, "mae-sfer", tmp_path / "out") == DONE
    path, theirs = only_file(tmp_path / "out"), their_vit("tiny")
    assert path.name == "vit-tiny-checkpoint-299.pth"
    head = {n: v.clone() for n, v in theirs.state_dict().items() if n.startswith("head.")}
    assert mae_sfer_loads(path, theirs) == (0, [])
    ours, state = open_saved(source).model, theirs.state_dict()
    for name in state.keys() - head.keys():
        assert torch.equal(state[name], ours.state_dict()[name]), name
    assert all(torch.equal(state[name], value) for name, value in head.items())
    tokens = theirs.forward_features(imgs := imgs_of())
    torch.testing.assert_close(
        tokens[:, 1:].mean(1), ours.forward_features(imgs), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_s2d_loads_every_tensor_of_a_pre_trained_encoder(tmp_path):
    source = trained(tmp_path / "own.pth", "base", False)
    assert export(source, "s2d", tmp_path / "out") == DONE
    path, ours = only_file(tmp_path / "out"), open_saved(source).model
    assert f"--finetune {path.name}\n" in (tmp_path / "out" / "README.md").read_text()
    named = s2d_takes(torch.load(path, weights_only=True))
    theirs = their_vit("base", classes=0)
    theirs.load_state_dict(named)
    for name, value in named.items():
        assert torch.equal(ours.state_dict()[name], value), name
    tokens = theirs.forward_features(imgs := imgs_of())[:, 0]
    own = ours.forward_encoder(imgs, torch.arange(196).expand(2, -1))[:, 0]
    torch.testing.assert_close(tokens, own, atol=1e-5, rtol=1e-5)
    reads_s2d_back(path, ours)


def test_s2d_loads_every_tensor_of_a_fine_tuned_model_except_the_head():
    model = create_classifier("vit_base_patch16", 7, 224, global_pool="token")
    saved = SavedClassifier("vit_base_patch16", model, RAF_NAMES, Preprocessing(224), {})
    _, content = s2d_form(saved)
    named, own = s2d_takes(content), model.state_dict()
    assert own.keys() - named.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(value, own[name]) for name, value in named.items())


@torch.no_grad()
def test_a_fine_tuned_file_is_read_back_with_its_classes_and_preprocessing(tmp_path):
    imgs = imgs_of()
    source = trained(tmp_path / "own.pth", "tiny", True)
    export(source, "mae-sfer", tmp_path / "out")
    again, ours = open_classifier(only_file(tmp_path / "out")), open_classifier(source)
    assert torch.equal(again.model(imgs), ours.model(imgs))
    assert (again.classes, again.preprocessing) == (RAF_NAMES, ours.preprocessing)


@pytest.mark.parametrize(
    ("to", "made", "message"),
    [
        ("mae-sfer", ("tiny", True, 16, "avg"), "by the class token, this checkpoint by the mean"),
        ("mae-sfer", ("tiny", True, 16, "token", 64), "224 px, this checkpoint's 64 px"),
        ("mae-sfer", ("small", False, 16), "ViT-Small has 32-pixel patches"),
        ("mae-sfer", ("tiny", False, 32), "ViT-Tiny has 16-pixel patches"),
        ("s2d", ("tiny", True), "takes ViT-Base only; this checkpoint is vit_tiny_patch16"),
    ],
)
def test_models_that_their_programs_would_misread_are_refused(to, made, message, tmp_path, capfd):
    source = trained(tmp_path / "own.pth", *made)
    assert export(source, to, tmp_path / "out") == BAD_INPUT
    line = refused(capfd)
    assert message in line
    assert f"--to {to}: " in line
    assert not (tmp_path / "out").exists()


def test_a_convnext_is_refused_too(checkpoint, tmp_path, capfd):
    assert export(checkpoint("convnext"), "mae-sfer", tmp_path / "out") == BAD_INPUT
    assert "only; this checkpoint is convnextv2_atto" in refused(capfd)


def test_preprocessing_unlike_theirs_is_noted_on_screen_and_in_the_card(tmp_path, capfd):
    for name, changes, note in (
        ("same", {}, ""),
        ("crop", {"crop_pct": 0.875, "interpolation": "bicubic"}, "a centre crop of 0.875"),
        ("mean", {"mean": [0.5] * 3}, "another mean and std"),
        ("order", {"classes": list(RAF_NAMES[::-1])}, "another number or order of classes"),
    ):
        source = trained(tmp_path / f"{name}.pth", "tiny", True)
        content = torch.load(source, weights_only=True)
        content["classes"] = changes.pop("classes", content["classes"])
        content["preprocessing"] |= changes
        torch.save(content, source)
        assert export(source, "mae-sfer", tmp_path / name) == DONE
        card = (tmp_path / name / "README.md").read_text()
        for text in (capfd.readouterr().out, card):
            assert ("expect other results there" in text) == bool(note)
            assert note in text


@torch.no_grad()
def test_weights_of_their_vit_small_are_refused_for_16_px_patches(tmp_path):
    source = trained(tmp_path / "own.pth", "small", False, 32)
    export(source, "mae-sfer", tmp_path / "out")
    with pytest.raises(BadInput, match="--patch_size 32"):
        load_pretrained(create_classifier("vit_small_patch16", 7), only_file(tmp_path / "out"))
