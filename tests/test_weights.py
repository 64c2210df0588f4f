"""Weights in all supported layouts are loaded exactly; others are refused with a clear message."""

import copy
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.convnext import checkpoint_filter_fn
from torch import nn

from backbones.vit import ViTSize
from models_mae import MaskedAutoencoderViT, ViTClassifier
from models_registry import create_classifier, create_pretrain_model
from util.checkpoint.container import Damaged
from util.checkpoint.read import read_checkpoint
from util.errors import BadInput
from util.weights import load_pretrained, read_source

VIT = ViTSize(192, 2, 3, 16)  # shallow, for speed
CONVNEXT = "convnextv2_atto"
FACES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def randomised(model):
    """`model` without parameters at zero or one, so that a tensor in a wrong place is noticed."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise, alpha=0.05 if parameter.ndim > 1 else 0.2)
    return model.eval()


def classifier(size, classes=7, input_size=64, **options):
    build = ViTClassifier if isinstance(size, ViTSize) else create_classifier
    return build(size, classes, input_size=input_size, **options).eval()


@pytest.fixture(scope="module")
def mae():
    return randomised(MaskedAutoencoderViT(VIT, 64, decoder_depth=1, decoder_embed_dim=32))


@pytest.fixture(scope="module")
def fcmae():
    return randomised(create_pretrain_model(CONVNEXT, 64, decoder_embed_dim=32))


@pytest.fixture(scope="module")
def vit():
    return randomised(classifier(VIT))


@pytest.fixture
def save(tmp_path):
    def write(content, name="weights.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return write


def same(state, other):
    """Check that tensors in both states are equal; -> their number."""
    shared = state.keys() & other.keys()
    assert all(torch.equal(state[name], other[name]) for name in shared)
    return len(shared)


# ---- layouts


def to_minkowski(state):
    """A dense encoder's tensors in the layout of the sparse code, tap by tap."""
    sparse = {}
    for name, value in state.items():
        path, _, kind = name.rpartition(".")
        stem = path.startswith("encoder.downsample_layers.0.")
        if not path.startswith("encoder.") or stem:
            sparse[name] = value
        elif value.ndim == 4 and kind == "weight":
            k = value.shape[2]
            taps = [value[:, :, y, x] for x in range(k) for y in range(k)]
            kernel = torch.stack([tap[:, 0] if k == 7 else tap.T for tap in taps])
            sparse[f"{path}.kernel"] = kernel
        elif path.endswith("grn"):
            sparse[name] = value.reshape(1, -1)
        elif "pwconv" in path:
            sparse[f"{path}.linear.{kind}"] = value
        elif path.endswith("norm") or path.endswith(".0"):
            sparse[f"{path}.ln.{kind}"] = value
        else:
            sparse[name] = value.reshape(1, -1)  # a convolution's bias
    return sparse


def test_minkowski_weights_give_the_same_features(save, fcmae):
    sparse = to_minkowski(fcmae.state_dict())
    assert sparse["encoder.stages.0.0.dwconv.kernel"].shape == (49, 40)
    assert sparse["encoder.downsample_layers.1.1.kernel"].shape == (4, 40, 80)
    path = save({"model": sparse, "args": Namespace(model="convnextv2_atto")})
    visible = torch.tensor([[0, 3], [2, 1]])

    again = create_pretrain_model(CONVNEXT, 64, decoder_embed_dim=32).eval()
    report = load_pretrained(again, path)
    assert (report.missing, report.unexpected) == ([], [])
    assert report.layout == "official FCMAE (Minkowski)"
    assert torch.equal(again.encoder(FACES, visible), fcmae.encoder(FACES, visible))

    dense = classifier(CONVNEXT)
    report = load_pretrained(dense, path)
    assert torch.equal(dense.encode(FACES), fcmae.encoder(FACES))
    assert report.missing == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert {name.split(".")[0] for name in report.unexpected} == {
        "mask_token", "proj", "decoder", "pred"
    }  # fmt: skip


@pytest.mark.parametrize("conv_mlp", [True, False])
def test_timms_convnext_weights_give_equal_logits(save, conv_mlp):
    theirs = randomised(timm.create_model(CONVNEXT, num_classes=7, conv_mlp=conv_mlp))
    ours = classifier(CONVNEXT)
    report = load_pretrained(ours, save(theirs.state_dict()), keep_head=True)
    assert report.layout == "timm ConvNeXt V2"
    assert (report.missing, report.unexpected, report.entry) == ([], [], "")
    torch.testing.assert_close(ours(FACES), theirs(FACES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_vit_weights_in_timm_and_back_give_equal_logits(save, pool):
    options = {"img_size": 64, "num_classes": 7, "global_pool": pool, "depth": 2}
    ours, theirs = (
        randomised(classifier(VIT, global_pool=pool)),
        timm.create_model("vit_tiny_patch16_224", **options).eval(),
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours(FACES), theirs(FACES))
    again = classifier(VIT, global_pool=pool)
    report = load_pretrained(again, save({"state_dict": theirs.state_dict()}), keep_head=True)
    assert (report.missing, report.unexpected) == ([], [])
    assert torch.equal(again(FACES), ours(FACES))


def test_our_convnext_is_read_by_timm_under_its_official_names():
    ours = randomised(classifier(CONVNEXT))
    theirs = timm.create_model(CONVNEXT, num_classes=7).eval()
    theirs.load_state_dict(checkpoint_filter_fn(ours.state_dict(), theirs), strict=True)
    torch.testing.assert_close(theirs(FACES), ours(FACES), rtol=1e-4, atol=1e-4)


def test_timms_head_with_norm_before_pooling_is_not_used(save):
    theirs = timm.create_model(CONVNEXT, num_classes=7, head_norm_first=True)
    path = save(theirs.state_dict())
    report = load_pretrained(classifier(CONVNEXT), path)
    assert report.missing == ["head.weight", "head.bias"]
    with pytest.raises(BadInput, match=r"missing head\.weight"):
        load_pretrained(classifier(CONVNEXT), path, keep_head=True)


OFFICIAL = {"args": Namespace(output_dir=Path("out"), lr=np.float64(0.1)), "epoch": np.int64(3)}


def test_a_complete_official_mae_checkpoint_is_read(save, mae):
    optimizer = torch.optim.AdamW(mae.parameters()).state_dict()
    official = {"model": mae.state_dict(), "optimizer": optimizer, "scaler": {}, **OFFICIAL}
    path = save(official)
    assert str(read_source(path)["args"].output_dir) == "out"
    assert read_source(path)["args"].lr == 0.1

    model = classifier(VIT, global_pool="token")
    report = load_pretrained(model, path)
    assert report.layout == "MAE with decoder"
    assert report.missing == ["head.weight", "head.bias"]
    # The whole encoder is from the file, including the attention's `proj`; only the head is not.
    assert same(model.state_dict(), mae.state_dict()) == len(model.state_dict()) - 2
    assert "blocks.1.attn.proj.weight" in report.loaded

    report = load_pretrained(classifier(VIT), path)  # average pooling has its own norm
    assert {"norm.weight", "norm.bias"} <= set(report.unexpected)
    assert report.missing == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert "not used: cls" not in str(report)
    assert "newly initialised: fc_norm, head" in str(report)


def test_names_of_numpy_1_and_paths_of_other_pythons_are_read(tmp_path, save):
    path = save({"model": {}, **OFFICIAL}, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    names = [(b"numpy._core.multi", b"numpy.core.multi"), (b"cpathlib\n", b"cpathlib._local\n")]
    if sys.version_info[:2] == (3, 13):  # writes its own name for paths
        names[1] = names[1][::-1]
    for new, old in names:
        assert new in content
        content = content.replace(new, old)
    path.write_bytes(content)
    assert read_checkpoint(path)["epoch"] == 3


WRAPPERS = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model.", "backbone.",
            "encoder.", "module.encoder."]  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_prefixes_of_wrappers_are_removed(save, vit, wrapper):
    state = {wrapper + name: value for name, value in vit.state_dict().items()}
    model = classifier(VIT)
    load_pretrained(model, save({"model": state}), keep_head=True)
    assert same(model.state_dict(), vit.state_dict()) == len(state)


def test_a_head_beside_a_wrapped_backbone_is_found(save, vit):
    state = {
        name if name.startswith(("head", "fc_norm")) else f"backbone.{name}": value
        for name, value in vit.state_dict().items()
    }
    model = classifier(VIT)
    load_pretrained(model, save({"n_averaged": torch.tensor(9), **state}), keep_head=True)
    assert same(model.state_dict(), vit.state_dict()) == len(state)


@pytest.mark.parametrize(
    ("entries", "options", "taken"),
    [
        (["model", "model_ema"], {}, "model"),
        (["model", "model_ema"], {"key": "model_ema|model"}, "model_ema"),
        (["module", "state_dict"], {}, "module"),
        (["model_ema"], {}, "model_ema"),
        (["state_dict_ema"], {}, "state_dict_ema"),
        (["teacher", "model"], {"key": "teacher"}, "teacher"),
    ],
)
def test_the_requested_entry_is_used_and_reported(save, vit, entries, options, taken):
    states = {
        entry: {name: value + k for name, value in vit.state_dict().items()}
        for k, entry in enumerate(entries)
    }
    model = classifier(VIT)
    report = load_pretrained(model, save({**states, "epoch": 3}), keep_head=True, **options)
    assert report.entry == taken
    assert same(model.state_dict(), states[taken]) == len(report.loaded)


def test_a_prefix_selects_a_part_of_a_larger_model(save, vit):
    student = {f"student.{name}": value for name, value in vit.state_dict().items()}
    teacher = {f"teacher.{name}": value + 1 for name, value in vit.state_dict().items()}
    path = save({"model": {**teacher, **student}})
    model = classifier(VIT)
    load_pretrained(model, path, prefix="student.", keep_head=True)
    assert same(model.state_dict(), vit.state_dict()) == len(student)
    with pytest.raises(BadInput, match=r"--model_prefix pupil\.: .* begin with teacher, student"):
        load_pretrained(model, path, prefix="pupil.")
    with pytest.raises(BadInput, match="--model_prefix"):
        load_pretrained(model, path)


def test_safetensors_and_torchs_older_format_are_read(tmp_path, save, vit):
    save_file(vit.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "renamed.bin").write_bytes((tmp_path / "weights.safetensors").read_bytes())
    legacy = save({"model": vit.state_dict()}, _use_new_zipfile_serialization=False)
    for path in (tmp_path / "weights.safetensors", tmp_path / "renamed.bin", legacy):
        model = classifier(VIT)
        load_pretrained(model, path, keep_head=True)
        assert same(model.state_dict(), vit.state_dict()) == len(vit.state_dict())


def test_half_precision_weights_are_loaded_into_an_fp32_model(save, vit):
    model = classifier(VIT)
    load_pretrained(model, save(copy.deepcopy(vit).half().state_dict()), keep_head=True)
    assert model.head.weight.dtype == torch.float32
    torch.testing.assert_close(model.head.weight, vit.head.weight, rtol=1e-3, atol=1e-3)


# ---- pre-training models, heads, other grids


def test_an_encoder_without_a_decoder_is_loaded_but_not_with_half_a_decoder(save, mae, fcmae):
    encoder = {n: v for n, v in mae.state_dict().items() if not n.startswith(("decoder", "mask"))}
    model = MaskedAutoencoderViT(VIT, 64, decoder_depth=2)
    report = load_pretrained(model, save(encoder))
    assert {name.split("_")[0] for name in report.missing} == {"mask", "decoder"}
    with pytest.raises(BadInput, match=r"missing decoder_blocks\.1"):
        load_pretrained(
            MaskedAutoencoderViT(VIT, 64, decoder_depth=2, decoder_embed_dim=32),
            save(mae.state_dict()),
        )

    dense = randomised(classifier(CONVNEXT))
    model = create_pretrain_model(CONVNEXT, 64, decoder_embed_dim=32).eval()
    report = load_pretrained(model, save(dense.state_dict()))
    assert torch.equal(model.encoder(FACES), dense.encode(FACES))
    assert "encoder.stages.0.0.grn.gamma" in report.loaded
    assert report.missing[:2] == ["mask_token", "proj.weight"]


@pytest.mark.parametrize(
    ("built", "options"),
    [
        ({"decoder_depth": 4, "decoder_embed_dim": 32}, "--decoder_depth 1"),
        ({"decoder_depth": 1, "decoder_embed_dim": 64}, "--decoder_embed_dim 32"),
        ({}, "--decoder_depth 1 --decoder_embed_dim 32"),
    ],
)
def test_another_decoder_is_refused_with_the_options_that_fit(save, mae, built, options):
    with pytest.raises(BadInput, match=f"; its decoder differs: use {options}$"):
        load_pretrained(MaskedAutoencoderViT(VIT, 64, **built), save(mae.state_dict()))


def test_another_decoder_of_fcmae_is_refused_with_the_options_that_fit(save, fcmae):
    model = create_pretrain_model(CONVNEXT, 64, decoder_embed_dim=64, decoder_depth=2)
    with pytest.raises(
        BadInput, match=r"; its decoder differs: use --decoder_depth 1 --decoder_embed_dim 32$"
    ):
        load_pretrained(model, save(fcmae.state_dict()))


def test_another_head_is_replaced_and_reported(save):
    saved = randomised(classifier(VIT, classes=8))
    path = save({"model": saved.state_dict(), "classes": ["happy"], "evaluated": "model"})
    model = classifier(VIT)
    before = model.head.weight.clone()
    checkpoint = read_source(path)
    assert checkpoint["classes"] == ["happy"]
    report = load_pretrained(model, path, checkpoint=checkpoint)
    assert report.replaced_head == "8 -> 7 classes"
    assert "head replaced: 8 -> 7 classes" in str(report)
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.fc_norm.weight, saved.fc_norm.weight)
    with pytest.raises(BadInput, match="its head has 8 classes, the model 7"):
        load_pretrained(model, path, keep_head=True)


def test_a_linear_probes_head_is_kept(save, vit):
    def probe(model):
        head = nn.Linear(192, 7)
        model.head = nn.Sequential(nn.BatchNorm1d(192, affine=False, eps=1e-6), head)
        return model

    saved = probe(copy.deepcopy(vit)).train()
    saved(FACES)  # fills the running statistics
    model = probe(classifier(VIT)).eval()
    report = load_pretrained(model, save({"model": saved.state_dict()}), keep_head=True)
    assert report.missing == []
    assert torch.equal(model(FACES), saved.eval()(FACES))
    report = load_pretrained(classifier(VIT, classes=8), save({"model": saved.state_dict()}))
    assert report.replaced_head == "7 -> 8 classes"
    assert report.missing == ["head.weight", "head.bias"]


@pytest.mark.parametrize("size", [32, 96])
def test_position_embeddings_of_another_grid_are_interpolated(save, mae, size):
    model = classifier(VIT, input_size=size)
    report = load_pretrained(model, save({"model": mae.state_dict()}))
    assert report.resized == ["pos_embed"]
    old, new = mae.pos_embed.data, model.pos_embed.data
    grid = old[:, 1:].transpose(1, 2).reshape(1, 192, 4, 4)
    wanted = F.interpolate(grid, size=(size // 16, size // 16), mode="bicubic")
    assert torch.equal(new[:, :1], old[:, :1])
    torch.testing.assert_close(new[:, 1:], wanted.flatten(2).transpose(1, 2))

    again = MaskedAutoencoderViT(VIT, size, decoder_depth=1, decoder_embed_dim=32)
    report = load_pretrained(again, save({"model": mae.state_dict()}))
    assert report.resized == ["pos_embed", "decoder_pos_embed"]
    assert torch.equal(again.pos_embed, new)


# ---- weights that do not fit


def changed(**changes):
    """A function that replaces the named tensors of a state or, for None, removes them."""

    def change(state):
        state = {**state, **{name.replace("__", "."): value for name, value in changes.items()}}
        return {name: value for name, value in state.items() if value is not None}

    return change


TINY = "vit_tiny_patch16"
NAN, ONE = torch.full((192,), torch.nan), torch.ones(192)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changed(pos_embed=None), "missing pos_embed"),
        (changed(cls_token=None), "missing cls_token"),
        (changed(pos_embed=torch.ones(1, 16, 192)), "pos_embed 1x16x192 instead of 1x17x192"),
        (changed(blocks__0__norm1__weight=None), r"missing blocks\.0\.norm1\.weight$"),
        (changed(blocks__0__norm1__weight=ONE[1:]), r"blocks\.0\.norm1\.weight 191 instead of 192"),
        (changed(blocks__0__ls1__gamma=ONE), r"unexpected blocks\.0\.ls1\.gamma"),
        (changed(reg_token=torch.ones(1, 4, 192)), "unexpected reg_token"),
        (changed(blocks__0__norm1__weight=NAN), r"blocks\.0\.norm1\.weight is not finite"),
        (changed(blocks__0__norm1__weight=ONE.long()), r"norm1\.weight holds torch\.int64"),
        (changed(blocks__0__norm1__weight=ONE.to_sparse()), r"norm1\.weight is sparse"),
        (changed(head__2__weight=ONE), r"unexpected head\.2\.weight"),
        (changed(fc_norm__weight=None), r"missing fc_norm\.weight"),
        (lambda _: {"conv1.weight": ONE, "fc.bias": ONE}, r"no ViT, .* conv1\.weight, fc\.bias"),
        (lambda _: {}, "no weights under model, module, model_ema"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(save, vit, change, expected):
    path = save({"model": change(vit.state_dict())})
    model = classifier(VIT)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput, match=expected) as error:
        load_pretrained(model, path, keep_head=True)
    assert str(path) in str(error.value)
    assert same(model.state_dict(), before) == len(before)


@pytest.mark.parametrize(
    ("saved", "wanted", "expected"),
    [
        (
            ("vit_small_patch16", {}),
            (TINY, {}),
            ["holds vit_small_patch16 (dim 384, 12 blocks", "--model is vit_tiny_patch16 (dim 192",
             "use --model mae_vit_small_patch16"],
        ),
        (
            ("vit_small_patch16", {"patch_size": 32}),
            ("vit_small_patch16", {}),
            ["holds vit_small_patch32", "patches of 32 pixels", "patches of 16 pixels",
             "--patch_size 32", "MAE-SFER"],
        ),
        ((TINY, {}), (CONVNEXT, {}), ["--model is convnextv2_atto", "use --model mae_vit_tiny"]),
        ((CONVNEXT, {}), (TINY, {}), ["dim 40, 2+2+6+2 blocks", "use --model convnextv2_atto"]),
        ((CONVNEXT, {}), ("convnextv2_femto", {}), ["use --model convnextv2_atto"]),
        ((TINY, {"in_chans": 1}), (TINY, {}), ["1 channels, but --model takes 3"]),
    ],
    ids=["size", "patch", "family", "other family", "width", "channels"],
)  # fmt: skip
def test_the_wrong_model_is_refused_with_the_one_that_fits(save, saved, wanted, expected):
    path = save({"model": classifier(saved[0], **saved[1]).state_dict()})
    with pytest.raises(BadInput) as error:
        load_pretrained(classifier(wanted[0], **wanted[1]), path)
    for text in [str(path), *expected]:
        assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_model_size_is_refused_with_the_nearest(save, vit):
    path = save({"model": vit.state_dict()})
    with pytest.raises(BadInput, match=r"a ViT .*2 blocks.* nearest is --model mae_vit_tiny_\w+$"):
        load_pretrained(classifier(TINY), path)


@pytest.mark.parametrize(
    ("saved", "wanted", "advice"),
    [("avg", "token", "leave out --cls_token"), ("token", "avg", "use --cls_token")],
)
def test_a_head_for_another_pooling_is_not_evaluated(save, saved, wanted, advice):
    path = save({"model": classifier(VIT, global_pool=saved).state_dict()})
    with pytest.raises(BadInput, match=advice):
        load_pretrained(classifier(VIT, global_pool=wanted), path, keep_head=True)


def test_an_encoder_without_a_head_is_not_evaluated(save, mae):
    with pytest.raises(BadInput, match="holds no head"):
        load_pretrained(classifier(VIT), save({"model": mae.state_dict()}), keep_head=True)


def test_if_no_entry_is_known_the_entries_are_listed(save, vit):
    path = save({"student": vit.state_dict(), "epoch": 3})
    with pytest.raises(BadInput, match=r"it holds student, epoch: .*--model_key"):
        load_pretrained(classifier(VIT), path)


# ---- sources


def test_a_name_is_a_file_or_a_release_or_an_error(save, vit, monkeypatch):
    path = save({"model": vit.state_dict()})
    released = {"mae_vit_tiny_300e": path}
    monkeypatch.setattr("util.download.fetch", lambda name, cache_dir: released[name])
    assert load_pretrained(classifier(VIT), "mae_vit_tiny_300e").source == "mae_vit_tiny_300e"
    with pytest.raises(BadInput, match=r"mae_vit_tiny_30e: no such file.*mae_vit_tiny_300e"):
        load_pretrained(classifier(VIT), "mae_vit_tiny_30e")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_weights_are_reported_as_damaged(save, tmp_path, vit, kind):
    if kind == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(vit.state_dict(), path)
    else:
        path = save(vit.state_dict(), _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (len(whole) - 7, len(whole) // 2, 600, 30):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged, match=path.name):
            load_pretrained(classifier(VIT), path)


def test_a_web_page_named_safetensors_is_reported_as_a_web_page(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"<!DOCTYPE html>quota exceeded")
    with pytest.raises(BadInput, match="a web page"):
        read_source(path)
    path.write_bytes(b"something else entirely")
    with pytest.raises(Damaged, match="no safetensors header"):
        read_source(path)
