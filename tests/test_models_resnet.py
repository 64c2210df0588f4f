"""ResNet against timm's (whole images) and a slow masked reference."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import main_finetune
import main_pretrain
from backbones.resnet import SIZES
from models_registry import create_classifier, create_pretrain_model
from models_saved import SavedEncoder, open_saved
from runs import finetune_options, load, run_here
from util.errors import BAD_INPUT, BadInput
from util.weights import load_pretrained

SIZE, WIDTH = 64, 16


def masked(patch=16, name="resnet18", size=SIZE):
    torch.manual_seed(0)
    model = create_pretrain_model(name, size, patch_size=patch, decoder_embed_dim=WIDTH)
    for module in model.modules():  # ones and zeros would hide mistakes
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.double()


# --- the slow, obvious reference: whole maps, set to zero where nothing is visible ---


def seen(visible, side, grid):
    """Visible patches (N, L) bool -> (N, 1, side, side); all ones if cells exceed patches."""
    if side < grid:
        return torch.ones(len(visible), 1, side, side, dtype=torch.float64)
    times = side // grid
    there = visible.view(-1, 1, grid, grid).double()
    return there.repeat_interleave(times, 2).repeat_interleave(times, 3)


def sparse_norm(x, norm, there):
    count = there.sum()
    mean = (x * there).sum((0, 2, 3), keepdim=True) / count
    var = ((x - mean).square() * there).sum((0, 2, 3), keepdim=True) / count
    weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
    return ((x - mean) / (var + norm.eps).sqrt() * weight + bias) * there


def sparse_block(x, block, visible, grid):
    def layer(z, conv, norm):
        z = F.conv2d(z, conv.weight, None, conv.stride, conv.padding)
        return sparse_norm(z, norm, seen(visible, z.shape[2], grid))

    numbers = [k for k in (1, 2, 3) if hasattr(block, f"conv{k}")]
    y = x
    for k in numbers:
        y = layer(y, getattr(block, f"conv{k}"), getattr(block, f"bn{k}"))
        y = y.clamp(min=0) if k != numbers[-1] else y
    return (y + (layer(x, *block.downsample) if block.downsample else x)).clamp(min=0)


def sparse_stages(encoder, imgs, visible, grid):
    x = imgs * seen(visible, imgs.shape[2], grid)
    x = F.conv2d(x, encoder.conv1.weight, None, 2, 3)
    x = sparse_norm(x, encoder.bn1, seen(visible, x.shape[2], grid)).clamp(min=0)
    x = F.max_pool2d(x, 3, 2, 1)
    x = x * seen(visible, x.shape[2], grid)
    maps = []
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        for block in stage:
            x = sparse_block(x, block, visible, grid)
        maps.append(x)
    return maps


def sparse_loss(model, imgs, noise):
    """SparK's masking with FCMAE's target and decoder, step by step."""
    grid = model.grid
    keep = int(grid**2 * (1 - model.mask_ratio) + 1e-6)
    visible = noise.argsort(1).argsort(1) < keep
    maps = sparse_stages(model.encoder, imgs, visible, grid)
    there, x = seen(visible, grid, grid), 0
    for conv, own in zip(model.proj, maps[-len(model.proj) :], strict=True):
        own = conv(own)
        if own.shape[2] == grid:
            own = own * there + model.mask_token * (1 - there)
        x = x + F.interpolate(own, (grid, grid), mode="bilinear", align_corners=False)
    for block in model.decoder:
        y = block.norm(block.dwconv(x).permute(0, 2, 3, 1))
        h = F.gelu(block.pwconv1(y))
        energy = h.square().sum((1, 2), keepdim=True).sqrt()
        response = h * energy / (energy.mean(3, keepdim=True) + 1e-6)
        h = block.grn.gamma * response + block.grn.beta + h
        x = x + block.pwconv2(h).permute(0, 3, 1, 2)
    pred = model.pred(x).flatten(2).transpose(1, 2)
    target = model.patchify(imgs)
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = (pred - target).square().mean(2)
    return error[~visible].mean()


@pytest.mark.parametrize(
    ("name", "patch"), [("resnet18", 32), ("resnet18", 16), ("resnet18", 8), ("resnet50", 16)]
)
@pytest.mark.parametrize("gathered", [True, False])
def test_masked_loss_and_every_gradient_equal_the_reference(gathered, name, patch, monkeypatch):
    """For both ways to compute it: on CPUs and on other devices."""
    monkeypatch.setenv("SFER_KERNELS", "cpu" if gathered else "reference")
    model = masked(patch, name)
    nn.init.normal_(model.decoder[0].grn.gamma)
    imgs = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    noise = torch.rand(3, model.num_patches, dtype=torch.float64)
    losses, gradients = [], []
    for make in (lambda: model(imgs, noise=noise), lambda: sparse_loss(model, imgs, noise)):
        model.zero_grad()
        losses.append(make())
        losses[-1].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    for parameter, gradient in gradients[1].items():
        error = (gradients[0][parameter] - gradient).abs().max()
        assert error <= 1e-8 * gradient.abs().max(), parameter


def test_gradients_have_the_strides_that_ddp_expects():
    """Otherwise DDP copies each of them and warns."""
    masking, classifier = masked(16).float(), create_classifier("resnet18", 7)
    (
        masking(torch.randn(2, 3, SIZE, SIZE)) + classifier(torch.randn(2, 3, SIZE, SIZE)).sum()
    ).backward()
    for model in (masking, classifier):
        for name, p in model.named_parameters():
            assert p.grad.stride() == p.stride(), name


@pytest.mark.parametrize("gathered", [True, False])
def test_bf16_is_close_to_fp32(gathered, monkeypatch):
    monkeypatch.setenv("SFER_KERNELS", "cpu" if gathered else "reference")
    model, imgs = masked(16).float(), torch.randn(4, 3, SIZE, SIZE)
    noise, results = torch.rand(4, 16), []
    for on in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = model(imgs, noise=noise)
        loss.backward()
        results.append((loss.item(), model.encoder.layer2[0].conv1.weight.grad.clone()))
    (exact, gradient), (loss, rounded) = results
    assert loss == pytest.approx(exact, rel=0.01)
    assert F.cosine_similarity(gradient.flatten(), rounded.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("patch", [8, 32])
def test_masked_pixels_change_neither_predictions_nor_statistics(patch):
    results = []
    for fill in (0.0, 7.0):
        model = masked(patch)
        torch.manual_seed(1)
        imgs = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
        noise = torch.rand(2, model.num_patches)
        visible = noise.argsort(1).argsort(1) < int(model.num_patches * 0.4 + 1e-6)
        hidden = seen(visible, SIZE, model.grid) == 0
        imgs = torch.where(hidden, fill, imgs)
        pred = model.reconstruct(imgs, noise=noise).pred
        results.append([pred, *(b.clone() for b in model.buffers())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_batch_norm_statistics_are_of_visible_cells():
    model = masked(32)
    imgs, noise = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64), torch.rand(2, 4)
    model(imgs, noise=noise)
    visible = noise.argsort(1).argsort(1) < 1
    x = F.conv2d(imgs * seen(visible, SIZE, 2), model.encoder.conv1.weight, None, 2, 3)
    values = x.transpose(0, 1)[:, seen(visible, 32, 2)[:, 0] > 0]
    torch.testing.assert_close(model.encoder.bn1.running_mean, 0.1 * values.mean(1))
    torch.testing.assert_close(model.encoder.bn1.running_var, 0.9 + 0.1 * values.var(1))


@pytest.mark.parametrize("name", SIZES)
def test_whole_images_are_classified_like_by_timm(name):
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7).double()
    ours = create_classifier(name, 7).double()
    state = theirs.state_dict()
    ours.load_state_dict({n.replace("fc.", "head."): value for n, value in state.items()})
    x = torch.randn(2, 3, 70, 50, dtype=torch.float64)
    for training in (True, False):
        answers = [model.train(training)(x) for model in (theirs, ours)]
        torch.testing.assert_close(*answers)
    torch.testing.assert_close(ours.head(ours.forward_features(x)), answers[0])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_training_step_equals_timms(name):
    theirs = timm.create_model(name, num_classes=7, drop_path_rate=0.5).double().train()
    ours = create_classifier(name, 7, drop_path=0.5).double().train()
    ours.load_state_dict({k.replace("fc.", "head."): v for k, v in theirs.state_dict().items()})
    imgs, wanted = torch.randn(2, 3, 48, 48, dtype=torch.float64), torch.tensor([0, 3])
    for model in (ours, theirs):
        torch.manual_seed(0)  # decides which blocks are dropped
        F.cross_entropy(model(imgs), wanted).backward()
    grads = {k: p.grad for k, p in ours.named_parameters()}
    for key, p in theirs.named_parameters():
        error = (grads[key.replace("fc.", "head.")] - p.grad).abs().max()
        assert error <= 1e-9 * p.grad.abs().max(), key
    state = ours.state_dict()
    for key, value in theirs.named_buffers():
        torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("counts", [True, False])
def test_weights_of_timm_and_torchvision_are_read(counts, tmp_path):
    """torchvision has timm's names; its older files have no num_batches_tracked."""
    theirs = timm.create_model("resnet18", num_classes=1000)
    state = {n: v for n, v in theirs.state_dict().items() if counts or "num_batches" not in n}
    torch.save(state, tmp_path / "resnet18.pth")
    model = create_classifier("resnet18", 7)
    report = load_pretrained(model, tmp_path / "resnet18.pth")
    assert (report.layout, report.replaced_head) == ("ResNet", "1000 -> 7 classes")
    assert report.missing == ["head.weight", "head.bias"]
    assert torch.equal(model.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_a_classifier_starts_from_a_pre_trained_encoder(tmp_path):
    model = create_pretrain_model("resnet18", 64, patch_size=16, decoder_embed_dim=WIDTH)
    torch.save({"model": model.state_dict()}, tmp_path / "masked.pth")
    classifier = create_classifier("resnet18", 7)
    report = load_pretrained(classifier, tmp_path / "masked.pth")
    assert report.layout == "masked ResNet with decoder"
    assert report.missing == ["head.weight", "head.bias"]
    assert torch.equal(classifier.bn1.running_var, model.encoder.bn1.running_var)


@pytest.mark.parametrize(
    ("held", "wanted", "advice"),
    [
        ("resnet34", "resnet50", "use --model resnet34"),
        ("resnet50", "resnet18", "use --model resnet50"),
        ("resnet18", "vit_tiny_patch16", "use --model resnet18"),
        ("resnet26", "resnet18", "we have no such model, the nearest is --model resnet50"),
    ],
)
def test_weights_of_another_network_are_refused(held, wanted, advice, tmp_path):
    torch.save(timm.create_model(held).state_dict(), tmp_path / "other.pth")
    with pytest.raises(BadInput, match=advice):
        load_pretrained(create_classifier(wanted, 7), tmp_path / "other.pth")


def test_weights_with_another_stem_are_refused(tmp_path):
    """Like the stem of ResNets for small images."""
    state = timm.create_model("resnet18").state_dict()
    torch.save({**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "small.pth")
    with pytest.raises(BadInput, match=r"its first convolution is 3×3 instead of 7×7"):
        load_pretrained(create_classifier("resnet18", 7), tmp_path / "small.pth")


@pytest.mark.parametrize("settings", [{}, {"args": {"patch_size": 8, "input_size": 40}}])
def test_a_file_with_only_an_encoder_is_opened(settings, tmp_path):
    model = timm.create_model("resnet18", num_classes=0).eval()
    torch.save({"model": model.state_dict(), **settings}, tmp_path / "encoder.pth")
    saved = open_saved(tmp_path / "encoder.pth")
    assert isinstance(saved, SavedEncoder)
    expected = (8, 40) if settings else (32, 224)
    assert (saved.model.patch_size, saved.preprocessing.input_size) == expected
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(saved.model.forward_features(x), model(x))


@pytest.mark.parametrize("how", ["--linear_probe", "--freeze_backbone"])
def test_a_frozen_backbone_keeps_its_batch_norm_statistics(how, sets, pretrained, tmp_path):
    more = f"--data_path {sets / 'rafdb'} --finetune {pretrained['resnet']} --epochs 1 {how}"
    assert run_here(main_finetune, finetune_options(tmp_path, "resnet", more)) == 0
    before, after = load(pretrained["resnet"].parent)["model"], load(tmp_path)["model"]
    names = [name for name in after if not name.startswith("head")]
    assert len(names) == 120
    assert all(torch.equal(after[name], before[f"encoder.{name}"]) for name in names)


@pytest.mark.parametrize(
    ("main", "more", "named"),
    [
        (main_pretrain, "--batch_size 1", "--batch_size 1"),
        (main_pretrain, "--patch_size 12", "--patch_size 12"),
        (main_pretrain, "--compile", "--compile"),
        (main_finetune, "--batch_size 1", "--batch_size 1"),
        (main_finetune, "--grad_checkpointing", "--grad_checkpointing"),
        (main_finetune, "--layer_decay_type group", "--layer_decay_type"),
        (main_finetune, "--patch_size 8", "--patch_size"),
    ],
)
def test_options_that_resnets_do_not_have_are_refused(main, more, named, tmp_path, capfd):
    options = f"--model resnet18 --output_dir {tmp_path} {more}"
    assert run_here(main, options.split()) == BAD_INPUT
    assert f"error: {named}" in capfd.readouterr().err


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="patch size 12: a ResNet takes"):
        create_pretrain_model("resnet18", 48, patch_size=12)
    with pytest.raises(ValueError, match="input size 80 is not a multiple of the patch size 32"):
        create_pretrain_model("resnet18", 80)
