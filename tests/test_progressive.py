"""Progressive resolution: small images first, full size at the end, reproducible runs."""

import math
import os
import signal
from functools import partial

import pytest
import torch

import main_pretrain
from datasets import build_loader, build_pretrain_dataset
from datasets.sampler import GlobalBatchSampler
from models_mae import sincos_position_embedding
from models_registry import create_pretrain_model
from runs import ROOT, assert_same_run, finish, launched, load, log, run_here
from training.observer import RunObserver
from util.errors import BAD_INPUT, DONE, RESUMABLE
from util.schedule import resolution_at

SMALL = "--decoder_embed_dim 32 --decoder_depth 1"
FAMILIES = {  # mae: 32, 48, 64 px; fcmae: 64, 96 px
    "mae": f"--model mae_vit_tiny_patch16 {SMALL} --decoder_num_heads 2 --input_size 64 "
    "--progressive 32:64",
    "fcmae": f"--model convnextv2_atto {SMALL} --input_size 96 --progressive 64:96",
}
FAMILIES["resnet"] = f"--model resnet18 --patch_size 16 {SMALL} --input_size 64 --progressive 32:64"
FAMILIES["half"] = f"{FAMILIES['mae']} --predict_ratio 0.5"  # of the masked patches
RUN = (
    "--data_path synthetic:32 --batch_size 8 --epochs 3 --warmup_epochs 1 --num_workers 0 "
    "--vis_freq 1 --print_freq 1"
)
RESOLUTIONS = {name: [64, 64, 96] if name == "fcmae" else [32, 48, 64] for name in FAMILIES}


def build(family, size):
    torch.manual_seed(0)
    more = {"fcmae": {}, "resnet": {"patch_size": 16}, "half": {"predict_ratio": 0.5}}
    options = more.get(family, {})
    options |= {} if family in ("fcmae", "resnet") else {"decoder_num_heads": 2}
    names = {"fcmae": "convnextv2_atto", "resnet": "resnet18"}
    name = names.get(family, "mae_vit_tiny_patch16")
    return create_pretrain_model(name, size, decoder_embed_dim=32, decoder_depth=1, **options)


def batch(model):
    generator = torch.Generator().manual_seed(1)
    imgs = torch.randn(2, 3, model.input_size, model.input_size, generator=generator)
    return imgs, torch.rand(2, model.num_patches, generator=generator)


def loss(model):
    imgs, noise = batch(model)
    return model(imgs, noise=noise)


def run(output, family, more=""):
    options = f"{RUN} {FAMILIES[family]} --output_dir {output} {more}".split()
    return run_here(main_pretrain, options)


@pytest.mark.parametrize("epochs", [2, 3, 7, 30, 300])
@pytest.mark.parametrize(("low", "patch"), [(128, 32), (128, 16), (192, 32), (32, 16)])
def test_the_resolution_rises_by_patches_and_is_full_for_the_last_third(low, patch, epochs):
    sizes = [resolution_at(epoch, low, 224, patch, epochs) for epoch in range(epochs)]
    assert sizes[0] == low
    assert sizes == sorted(sizes)
    assert all(size % patch == 0 for size in sizes)
    assert sizes.count(224) == math.ceil(epochs / 3)
    if epochs >= 30:
        shares = [sizes.count(size) for size in range(low, 224, patch)]
        assert max(shares) - min(shares) <= 1, "every lower resolution has an equal share"


def test_a_single_epoch_and_equal_sizes_are_at_full_size():
    assert resolution_at(0, 128, 224, 16, 1) == 224
    assert {resolution_at(epoch, 224, 224, 32, 9) for epoch in range(9)} == {224}


def embedding(dim, places):
    """The embedding of patches at `places` along both axes, computed number by number."""
    quarter = dim // 4
    omegas = [10000 ** -(i / quarter) for i in range(quarter)]
    rows = [
        [f(at * omega) for at in (x, y) for f in (math.sin, math.cos) for omega in omegas]
        for y in places
        for x in places
    ]
    return torch.tensor([[0.0] * dim, *rows])[None]


def test_positions_at_full_size_are_exact_integers():
    for grid in (3, 14, 16):
        expected = embedding(64, range(grid))
        torch.testing.assert_close(sincos_position_embedding(64, grid), expected, atol=1e-6, rtol=0)
        whole = sincos_position_embedding(64, grid, grid)
        assert torch.equal(whole, sincos_position_embedding(64, grid))


@pytest.mark.parametrize(
    ("grid", "full", "places"),
    [
        (2, 4, [0.5, 2.5]),  # each covers two patches, and is at their middle
        (3, 5, [1 / 3, 2, 11 / 3]),  # the centre stays, the ends are symmetric
        (1, 14, [6.5]),
        (4, 2, [-0.25, 0.25, 0.75, 1.25]),
    ],
)
def test_a_location_in_the_image_keeps_its_position_at_every_resolution(grid, full, places):
    found = sincos_position_embedding(64, grid, full)
    torch.testing.assert_close(found, embedding(64, places), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters_learn_at_another_resolution_and_full_size_is_restored(family):
    model = build(family, 96)
    model.train(family != "resnet")  # whose batch norms would change
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    full = loss(model)
    model.set_resolution(64)
    small = loss(model)
    assert small.isfinite()
    assert small != full
    small.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad.isfinite().all(), name
    imgs, noise = batch(model)
    assert imgs.shape[2] == 64
    pred, mask = model.reconstruct(imgs, noise=noise)
    assert model.unpatchify(pred).shape == imgs.shape
    assert mask.shape == noise.shape
    assert model.forward_features(imgs).isfinite().all()
    with pytest.raises(ValueError, match="96x96, but the model is set to 64 px"):
        model(torch.zeros(1, 3, 96, 96))
    model.set_resolution(96)
    assert torch.equal(loss(model), full)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_set_to_a_resolution_equals_one_built_for_it(family):
    model, small = build(family, 96), build(family, 64)
    model.set_resolution(64)
    state = model.state_dict()
    for name in ("pos_embed", "decoder_pos_embed") if "pos_embed" in state else ():
        state[name] = sincos_position_embedding(state[name].shape[2], 4, 6)
    small.load_state_dict(state)
    assert torch.equal(loss(model), loss(small))


def test_a_resolution_that_is_not_a_multiple_of_the_patch_size_is_refused():
    for family in FAMILIES:
        with pytest.raises(ValueError, match="not a multiple of the patch size"):
            build(family, 96).set_resolution(72)


def test_samples_have_the_size_of_their_epoch():
    size_at = partial(resolution_at, low=32, high=64, patch=16, epochs=3)
    dataset = build_pretrain_dataset("synthetic:16", 64, 16, size_at=size_at)
    for epoch, size in enumerate(RESOLUTIONS["mae"]):
        image, noise, _ = dataset[epoch, 3]
        assert image.shape == (3, size, size)
        assert noise.shape == ((size // 16) ** 2,)
    plain = build_pretrain_dataset("synthetic:16", 64, 16)
    assert all(torch.equal(a, b) for a, b in zip(dataset[2, 3][:2], plain[2, 3][:2], strict=True))
    assert torch.equal(dataset.view(3, 0.875), plain.view(3, 0.875))


def test_data_workers_use_the_size_of_each_epoch():
    size_at = partial(resolution_at, low=32, high=64, patch=16, epochs=3)
    dataset = build_pretrain_dataset("synthetic:16", 64, 16, size_at=size_at)
    sampler = GlobalBatchSampler(16, 8)
    loader = build_loader(dataset, sampler, 1)
    for epoch in (1, 2):
        sampler.start_at(epoch)
        assert {imgs.shape[2] for imgs, _, _ in loader} == {RESOLUTIONS["mae"][epoch]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Uninterrupted runs by family, made on first use."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            assert run(made[family], family) == DONE
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_stopped_at_a_low_resolution_resumes_bit_for_bit(
    family, undisturbed, tmp_path, monkeypatch, capfd
):
    after_step = RunObserver.after_step

    def stop(self, state, result):
        if (state.position.epoch, state.position.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)  # takes effect after the next step
        after_step(self, state, result)

    with monkeypatch.context() as patch:
        patch.setattr(RunObserver, "after_step", stop)
        assert run(tmp_path, family) == RESUMABLE
    saved = load(tmp_path)
    assert (saved["epoch"], saved["step"]) == (0, 3)
    assert run(tmp_path, family) == DONE
    assert_same_run(tmp_path, undisturbed(family))
    sizes = RESOLUTIONS[family]
    assert [record["resolution"] for record in log(tmp_path)] == sizes
    assert f"epoch 2: {sizes[2]} px from now on" in capfd.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_are_of_a_model_at_full_size(family, undisturbed):
    model = build(family, RESOLUTIONS[family][-1])
    model.load_state_dict(load(undisturbed(family))["model"])


def test_resuming_with_another_schedule_is_refused(undisturbed, capfd):
    folder = undisturbed("mae")
    assert run(folder, "mae", "--progressive 48:64 --epochs 4") == BAD_INPUT
    assert "progressive (32, 64) -> (48, 64)" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"resnet"}))  # see docs/deviations.md
def test_two_processes_are_close_to_one(family, undisturbed, tmp_path):
    options = f"{RUN} {FAMILIES[family]} --batch_size 4 --output_dir {tmp_path}"
    finish(launched("main_pretrain.py", options.split(), processes=2))
    for two, one in zip(log(tmp_path), log(undisturbed(family)), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert two["resolution"] == one["resolution"]


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"resnet"}))  # ResNets are not compiled
def test_a_compiled_run_is_close_to_the_eager_one(family, undisturbed, tmp_path):
    assert run(tmp_path, family, "--compile") == DONE
    for compiled, eager in zip(log(tmp_path), log(undisturbed(family)), strict=True):
        assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--progressive 128", ["--progressive", "LOW:HIGH, such as 128:224", "'128'"]),
        ("--progressive 128:224:256", ["LOW:HIGH", "'128:224:256'"]),
        ("--progressive 0:224", ["LOW:HIGH", "'0:224'"]),
        ("--progressive 224:224", ["LOW:HIGH", "'224:224'"]),
        ("--progressive 128:192", ["--progressive 128:192", "--input_size 224"]),
        ("--progressive 100:224", ["100 is not a multiple of the patch size, 16", "try 96"]),
        (
            "--model convnextv2_atto --progressive 112:224",
            ["112 is not a multiple of the patch size, 32", "try"],
        ),
        (
            "--model convnextv2_atto --progressive 32:224",
            ["--progressive 32:224: at 32 px", "leaves 0 of 1", "start higher"],
        ),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, expected, tmp_path, capfd):
    assert run_here(main_pretrain, f"--output_dir {tmp_path} {options}".split()) == BAD_INPUT
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    for text in expected:
        assert text in lines[0]


@pytest.mark.parametrize("name", ["mae_vit_base", "mae_vit_small", "convnextv2_base"])
def test_a_fast_recipe_differs_from_the_published_one_only_in_speed_options(name):
    parsed = [
        vars(main_pretrain.build_parser().parse([f"@{ROOT}/recipes/pretrain_{name}{kind}.args"]))
        for kind in ("", "_fast")
    ]
    published, fast = parsed
    assert {key for key in fast if fast[key] != published[key]} == {"progressive", "amp", "compile"}
    assert fast["progressive"] == (128, 224)
