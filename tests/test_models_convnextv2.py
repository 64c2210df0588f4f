"""ConvNeXt V2 against timm's (dense) and a point-by-point sparse reference (packed)."""

import math
import re

import pytest
import timm
import torch

from backbones.convnextv2 import SIZES, ConvNeXtSize
from models_convnextv2 import FCMAE, Block, ConvNeXtV2, ConvNeXtV2Encoder
from models_registry import create_classifier, create_pretrain_model
from ops.packed import in_windows, on_canvas

SMALL = ConvNeXtSize((1, 2, 1, 1), (3, 4, 5, 6))


def randomise(model, std=0.3):
    """Random weights, so that every term matters (GRN is initialised with zeros)."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


# --- the slow, obvious reference: a dict from cell (row, column) to its channel vector ---


def layer_norm(v, module):
    return (v - v.mean()) / (v.var(unbiased=False) + 1e-6).sqrt() * module.weight + module.bias


def sparse_depthwise(points, conv):
    result = {}
    for r, c in points:
        total = conv.bias.clone()
        for dr in range(-3, 4):
            for dc in range(-3, 4):
                if (r + dr, c + dc) in points:
                    total = total + conv.weight[:, 0, dr + 3, dc + 3] * points[r + dr, c + dc]
        result[r, c] = total
    return result


def sparse_block(points, block):
    hidden = {}
    for place, v in sparse_depthwise(points, block.dwconv).items():
        h = block.pwconv1.weight @ layer_norm(v, block.norm) + block.pwconv1.bias
        hidden[place] = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    energy = torch.stack(list(hidden.values())).square().sum(0).sqrt()
    response = energy / (energy.mean() + 1e-6)
    result = {}
    for place, h in hidden.items():
        g = block.grn.gamma.flatten() * (h * response) + block.grn.beta.flatten() + h
        result[place] = points[place] + block.pwconv2.weight @ g + block.pwconv2.bias
    return result


def sparse_downsample(points, conv):
    k = conv.stride[0]
    result = {}
    for r, c in {(r // k, c // k) for r, c in points}:
        total = conv.bias.clone()
        for i in range(k):
            for j in range(k):
                total = total + conv.weight[:, :, i, j] @ points[r * k + i, c * k + j]
        result[r, c] = total
    return result


def sparse_encoder(encoder, image, kept, grid):
    """One image (3, H, W), numbers of visible patches -> {(row, column): features}."""
    points = {}
    for patch in kept:
        for i in range(32):
            for j in range(32):
                r, c = patch // grid * 32 + i, patch % grid * 32 + j
                points[r, c] = image[:, r, c]
    for i, (down, stage) in enumerate(zip(encoder.downsample_layers, encoder.stages, strict=True)):
        conv, norm = (down[0], down[1]) if i == 0 else (down[1], down[0])
        if i == 0:
            points = sparse_downsample(points, conv)
        points = {place: layer_norm(v, norm) for place, v in points.items()}
        if i > 0:
            points = sparse_downsample(points, conv)
        for block in stage:
            points = sparse_block(points, block)
    return points


def sparse_fcmae(model, image, noise, mask_ratio):
    """One image -> (loss, prediction (L, 32*32*3)), every patch by itself."""
    grid, length = model.grid, model.grid**2
    kept = sorted(range(length), key=lambda k: noise[k])[: int(length * (1 - mask_ratio) + 1e-6)]
    seen = sparse_encoder(model.encoder, image, kept, grid)
    points = {}
    for k in range(length):
        place = (k // grid, k % grid)
        points[place] = model.mask_token.flatten()
        if k in kept:
            points[place] = model.proj.weight[:, :, 0, 0] @ seen[place] + model.proj.bias
    for block in model.decoder:
        points = sparse_block(points, block)
    pred = [model.pred.weight[:, :, 0, 0] @ points[k // grid, k % grid] for k in range(length)]
    pred = torch.stack(pred) + model.pred.bias
    errors = []
    for k in set(range(length)) - set(kept):
        r, c = k // grid * 32, k % grid * 32
        target = image[:, r : r + 32, c : c + 32].permute(1, 2, 0).flatten()
        if model.norm_pix_loss:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append((pred[k] - target).square().mean())
    return torch.stack(errors).mean(), pred


@pytest.mark.parametrize(
    ("input_size", "mask_ratio", "norm_pix_loss"),
    [(64, 0.5, True), (96, 0.6, True), (96, 0.3, False)],
)
def test_packed_fcmae_equals_the_sparse_reference(input_size, mask_ratio, norm_pix_loss):
    model = FCMAE(SMALL, input_size, decoder_embed_dim=4, norm_pix_loss=norm_pix_loss)
    model = randomise(model).double()
    imgs = torch.randn(2, 3, input_size, input_size, dtype=torch.float64)
    noise = torch.rand(2, model.num_patches, dtype=torch.float64)

    loss = model(imgs, mask_ratio, noise)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    out = model.reconstruct(imgs, mask_ratio, noise)

    pairs = [sparse_fcmae(model, imgs[n], noise[n].tolist(), mask_ratio) for n in range(2)]
    expected = (pairs[0][0] + pairs[1][0]) / 2
    assert abs(float((loss - expected).detach())) < 1e-9
    for n in range(2):
        torch.testing.assert_close(out.pred[n], pairs[n][1], rtol=0, atol=1e-9)
    reference = torch.autograd.grad(expected, list(model.parameters()))
    for (name, _), ours, theirs in zip(model.named_parameters(), gradients, reference, strict=True):
        assert float(theirs.abs().max()) > 1e-9, f"{name} plays no part in this test"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("mask_ratio", [0.2, 0.6, 0.8])
@pytest.mark.parametrize("neighbours", [on_canvas, in_windows])
def test_a_packed_block_equals_the_sparse_one_at_each_resolution(stage, mask_ratio, neighbours):
    grid, b = 3, 8 >> stage
    block = randomise(ConvNeXtV2Encoder(SMALL)).double().stages[stage][0]
    visible = torch.rand(1, 9).argsort()[:, : int(9 * (1 - mask_ratio))]
    x = torch.randn(1, visible.shape[1], b, b, SMALL.dims[stage], dtype=torch.float64)
    x.requires_grad_()
    y = block(x, neighbours(visible, grid, b))

    places = [divmod(int(p), grid * b) for p in on_canvas(visible, grid, b).cells]
    points = dict(zip(places, x.reshape(len(places), -1), strict=True))
    reference = sparse_block(points, block)
    expected = torch.stack([reference[p] for p in places]).view_as(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    weight = torch.randn_like(y)
    wanted = [x, *block.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((y * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("wanted", "custom"), [("reference", False), ("cpu", True), ("", True)])
def test_the_environment_chooses_the_passes_of_a_block(wanted, custom, monkeypatch):
    monkeypatch.setenv("SFER_KERNELS", wanted)
    model, used = randomise(FCMAE(SMALL, 96, decoder_embed_dim=8)), []
    packed = Block._packed
    monkeypatch.setattr(Block, "_packed", lambda self, *a: used.append(1) or packed(self, *a))
    model(torch.randn(1, 3, 96, 96)).backward()
    assert bool(used) is custom
    assert ("windowed" in model.kernels(torch.device("cpu"), torch.float32)) is custom


def test_masked_pixels_never_reach_the_encoder():
    model = randomise(FCMAE(SMALL, 96, decoder_embed_dim=8))
    imgs, noise = torch.randn(2, 3, 96, 96), torch.rand(2, 9)
    pred, mask = model.reconstruct(imgs, noise=noise)
    removed = model.unpatchify(mask[:, :, None].expand(-1, -1, 3 * 32 * 32)).bool()
    changed = torch.where(removed, torch.full_like(imgs, float("nan")), imgs)
    assert torch.equal(model.reconstruct(changed, noise=noise).pred, pred)


def test_with_all_patches_visible_the_result_is_that_of_the_dense_network():
    encoder = randomise(ConvNeXtV2Encoder(SMALL)).double()
    imgs = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    every_patch = torch.rand(2, 9).argsort(dim=1)
    packed = encoder(imgs, every_patch)
    dense = encoder(imgs)
    assert dense.shape == (2, 1, 3, 3, 6)
    for n in range(2):
        order = every_patch[n]
        torch.testing.assert_close(packed[n, :, 0, 0], dense[n, 0].flatten(0, 1)[order])


def test_an_images_result_does_not_depend_on_its_batch():
    model = randomise(FCMAE(SMALL, 64, decoder_embed_dim=8)).double()
    imgs, noise = torch.randn(3, 3, 64, 64).double(), torch.rand(3, 4)
    together = model.reconstruct(imgs, noise=noise).pred
    alone = model.reconstruct(imgs[1:2], noise=noise[1:2]).pred
    torch.testing.assert_close(together[1:2], alone)


TIMM_NAMES = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"dwconv", "conv_dw"),
    (r"pwconv", "mlp.fc"),
    (r"grn\.gamma", "mlp.grn.weight"),
    (r"grn\.beta", "mlp.grn.bias"),
    (r"^head\.", "head.fc."),
    (r"^norm\.", "head.norm."),
]


def timm_state(state, theirs):
    """Our state dict under timm's names, and in the shapes of `theirs` (GRN 1-D, 1×1 MLPs)."""
    result = {}
    for name, value in state.items():
        for ours, timms in TIMM_NAMES:
            if not (ours.startswith("^stages") and ".downsample." in name):
                name = re.sub(ours, timms, name)
        result[name] = value.reshape(theirs[name].shape)
    return result


@pytest.mark.parametrize(
    ("name", "width"), [("convnextv2_atto", 64), ("convnextv2_atto", 96), ("convnextv2_nano", 96)]
)
def test_the_dense_network_equals_timms(name, width):
    """In training on CPUs, square images use our packed kernels, others torch's convolution."""
    ours = randomise(create_classifier(name, 7), std=0.05)
    theirs = timm.create_model(name, num_classes=7)
    theirs.load_state_dict(timm_state(ours.state_dict(), theirs.state_dict()))
    imgs = torch.randn(2, 3, 96, width)
    ours(imgs).square().sum().backward()
    logits = theirs(imgs)
    logits.square().sum().backward()
    torch.testing.assert_close(ours(imgs), logits, rtol=1e-4, atol=1e-5)
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    gradients = timm_state(gradients, theirs.state_dict())
    for n, p in theirs.named_parameters():
        error = (gradients[n] - p.grad).norm() / p.grad.norm()
        assert error < 1e-4, n
    assert ours.forward_features(imgs).shape == (2, SIZES[name].dims[-1])


def test_whole_images_use_packed_kernels_in_training_unless_a_layer_is_wrapped(monkeypatch):
    """A wrapped layer must be called; in evaluation, exports and hooks must see plain layers."""
    used, packed = [], Block._packed
    monkeypatch.setattr(Block, "_packed", lambda self, *a: used.append(1) or packed(self, *a))
    model, imgs = ConvNeXtV2(SMALL, 7), torch.randn(1, 3, 64, 64)
    model(imgs)
    assert len(used) == sum(SMALL.depths)
    used.clear()
    model.eval()(imgs)
    model.train()(imgs[..., :32])
    assert used == []
    called = []
    model.stages[1][1].pwconv1.register_forward_hook(lambda *_: called.append(1))
    model(imgs)
    assert called == [1]
    assert len(used) == sum(SMALL.depths) - SMALL.depths[1]


def test_the_initial_loss_is_near_one():
    """Targets have variance one and predictions start near zero (deviation 1 would give 16)."""
    torch.manual_seed(0)
    model = create_pretrain_model("convnextv2_atto", input_size=96)
    with torch.no_grad():
        assert float(model(torch.randn(8, 3, 96, 96))) == pytest.approx(1.0, abs=0.1)


def test_state_dict_has_the_official_names_and_shapes():
    model = create_pretrain_model("convnextv2_atto")
    shapes = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    assert {n.split(".")[0] for n in shapes} == {"encoder", "proj", "mask_token", "decoder", "pred"}
    assert shapes["encoder.downsample_layers.0.0.weight"] == (40, 3, 4, 4)
    assert shapes["encoder.downsample_layers.1.1.weight"] == (80, 40, 2, 2)
    assert shapes["encoder.stages.2.5.dwconv.weight"] == (160, 1, 7, 7)
    assert shapes["encoder.stages.0.1.grn.gamma"] == (1, 1, 1, 160)
    assert shapes["mask_token"] == (1, 512, 1, 1)
    assert shapes["proj.weight"] == (512, 320, 1, 1)
    assert shapes["pred.weight"] == (3072, 512, 1, 1)
    classifier = create_classifier("convnextv2_atto", 8).state_dict()
    encoder = {n.removeprefix("encoder."): s for n, s in shapes.items() if n.startswith("encoder.")}
    rest = {n for n in classifier if n not in encoder}
    assert rest == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_models_have_the_published_sizes():
    """Parameters with a 1000-class head, in millions (ConvNeXt V2, table 14)."""
    published = (3.7, 5.2, 9.1, 15.6, 28.6, 89, 198, 660)
    for name, millions in zip(SIZES, published, strict=True):
        with torch.device("meta"):
            model = create_classifier(name, 1000)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert count == pytest.approx(millions, rel=0.01), name


def test_gradient_checkpointing_changes_no_gradient():
    model = randomise(FCMAE(SMALL, 64, decoder_embed_dim=8))
    imgs, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 4)
    plain = torch.autograd.grad(model(imgs, noise=noise), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(imgs, noise=noise), list(model.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_drop_path_rises_with_depth_and_the_head_is_scaled():
    torch.manual_seed(0)
    model = ConvNeXtV2(SMALL, 7, drop_path=0.4, head_init_scale=0.001)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert 0 < model.head.weight.abs().max().item() < 1e-4


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        create_classifier("convnextv2_atto", 7)(torch.randn(1, 3, 100, 100))
    with pytest.raises(ValueError, match="multiple of the patch size 32"):
        create_pretrain_model("convnextv2_atto", input_size=112)
