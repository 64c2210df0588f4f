"""MAE against transformers' ViTMAE on the same weights, images and noise."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from backbones.vit import ViTSize
from benchmarks.peer_mae import renamed, to_transformers
from models_mae import MaskedAutoencoderViT, sincos_position_embedding
from models_masked import take_tokens
from models_registry import create_classifier, create_pretrain_model, list_models
from util.errors import BadInput
from util.patch_counts import predicted_patches

SIZES = {
    "narrow": (ViTSize(48, 2, 3, 8), 32, 64, 2, 4),
    "deep": (ViTSize(32, 3, 4, 16), 80, 48, 1, 2),
}


def build_pair(which, norm_pix_loss, predict_ratio=1.0):
    """Our model and theirs, which predicts all patches, with equal random weights."""
    torch.manual_seed(0)
    size, input_size, width, depth, heads = SIZES[which]
    ours = MaskedAutoencoderViT(
        size,
        input_size,
        norm_pix_loss=norm_pix_loss,
        decoder_embed_dim=width,
        decoder_depth=depth,
        decoder_num_heads=heads,
        predict_ratio=predict_ratio,
    )
    for p in ours.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return ours.train(), to_transformers(ours, "eager")


def partial_loss(theirs, imgs, noise, count):
    """transformers' loss if its decoder gets tokens for `count` of the masked patches only.

    These are the patches with the smallest noise; tokens are in the order of their patches.
    """
    decoder, pos = theirs.decoder, theirs.decoder.decoder_pos_embed[0]
    encoded = theirs.vit(imgs, noise=noise)
    x, targets, errors = decoder.decoder_embed(encoded[0]), theirs.patchify(imgs), []
    visible = x.shape[1] - 1
    for n, places in enumerate(encoded.ids_restore.tolist()):  # patch -> place in the noise
        tokens, masked = [x[n, 0] + pos[0]], []
        for patch, place in enumerate(places):
            if place < visible:
                tokens.append(x[n, 1 + place] + pos[1 + patch])
            elif place < visible + count:
                masked.append((patch, len(tokens)))
                tokens.append(decoder.mask_token[0, 0] + pos[1 + patch])
        hidden = torch.stack(tokens)[None]
        for layer in decoder.decoder_layers:
            hidden = layer(hidden)
        pred = decoder.decoder_pred(decoder.decoder_norm(hidden))[0]
        for patch, token in masked:
            target = targets[n, patch]
            if theirs.config.norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((pred[token] - target).square().mean())
    assert len(errors) == count * len(imgs)
    return torch.stack(errors).mean()


def relative_error(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@pytest.mark.parametrize("predict_ratio", [1, 0.25])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("which", SIZES)
def test_loss_reconstruction_mask_and_gradients_equal_transformers(
    which, norm_pix_loss, predict_ratio
):
    ours, theirs = build_pair(which, norm_pix_loss, predict_ratio)
    imgs = torch.randn(3, 3, ours.input_size, ours.input_size)
    noise = torch.rand(3, ours.num_patches)
    out = theirs(imgs, noise=noise)
    count = {"narrow": 3, "deep": 4}[which]  # a quarter of 12 and of 19
    expected_loss = out.loss if predict_ratio == 1 else partial_loss(theirs, imgs, noise, count)
    loss = ours(imgs, noise=noise)
    seen = ours.reconstruct(imgs, noise=noise)

    assert relative_error(loss, expected_loss) < 1e-4
    assert torch.equal(seen.mask, out.mask)
    assert relative_error(seen.pred, out.logits) < 1e-4, "all patches, whatever the loss is of"

    loss.backward()
    expected_loss.backward()
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    mapped = renamed(gradients, expected)
    for name, gradient in expected.items():
        if name.endswith(("key.bias", "k_proj.bias")):
            continue  # softmax ignores a constant added to the keys: both are rounding noise
        assert relative_error(mapped[name], gradient) < 1e-4, name
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == set(gradients), "every trained parameter must get a gradient"


@pytest.mark.parametrize("mask_ratio", [0.3, 0.75])
def test_loss_is_the_masked_mean_of_the_full_reconstruction(mask_ratio):
    model, _ = build_pair("narrow", True)
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    pred, mask = model.reconstruct(imgs, mask_ratio, noise)
    patches = model.patchify(imgs)
    target = (patches - patches.mean(-1, keepdim=True)) / (
        patches.var(-1, keepdim=True) + 1e-6
    ).sqrt()
    expected = ((pred - target) ** 2).mean(-1).mul(mask).sum() / mask.sum()
    torch.testing.assert_close(model(imgs, mask_ratio, noise), expected)


@pytest.mark.parametrize(("predict_ratio", "predicted"), [(1, 12), (0.25, 3), (0.1, 1), (1e-9, 1)])
def test_the_decoder_has_tokens_for_visible_and_predicted_patches_only(predict_ratio, predicted):
    model, _ = build_pair("narrow", False, predict_ratio)
    imgs, noise, seen = torch.randn(2, 3, 32, 32), torch.rand(2, 16), []
    model.decoder_embed.register_forward_hook(lambda _, __, x: seen.append(x.shape[1]))
    model.decoder_blocks[0].register_forward_hook(lambda _, __, x: seen.append(x.shape[1]))
    model.decoder_pred.register_forward_hook(lambda _, __, x: seen.append(x.shape[1]))
    model(imgs, noise=noise)
    model.reconstruct(imgs, noise=noise)
    assert seen == [5, 5 + predicted, predicted, 5, 17, 16]  # including the class token


def test_by_default_all_masked_patches_are_predicted():
    model, _ = build_pair("narrow", True)
    one, _ = build_pair("narrow", True, predict_ratio=1)
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    ids = noise.argsort(1)
    pred = model.forward_decoder(model.forward_encoder(imgs, ids[:, :4]), ids, 4)
    target = model.normalise_patches(take_tokens(model.patchify(imgs), ids[:, 4:]))[0]
    loss = model(imgs, noise=noise)
    assert torch.equal(loss, (pred - target).square().mean())
    assert torch.equal(loss, one(imgs, noise=noise))


def test_the_number_of_predicted_patches_is_rounded_down_but_not_by_float_errors():
    assert predicted_patches(147, 0.25) == 36
    assert predicted_patches(100, 0.29) == 29  # 100 * 0.29 is 28.999…
    assert predicted_patches(3, 0.25) == 1
    assert all(predicted_patches(masked, 1) == masked for masked in range(1, 300))


def test_masked_pixels_never_reach_the_encoder():
    model, _ = build_pair("deep", False)
    imgs, noise = torch.randn(2, 3, 80, 80), torch.rand(2, 25)
    pred, mask = model.reconstruct(imgs, noise=noise)
    removed = model.unpatchify(mask[:, :, None].expand(-1, -1, 3 * 16 * 16)).bool()
    changed = torch.where(removed, torch.full_like(imgs, float("nan")), imgs)
    assert torch.equal(model.reconstruct(changed, noise=noise).pred, pred)


def test_ratio_0_8_leaves_20_of_100_patches_visible_and_ties_go_by_position():
    model = create_pretrain_model("mae_vit_tiny_patch16", input_size=160, decoder_depth=1)
    mask = model.reconstruct(torch.zeros(1, 3, 160, 160), 0.8, torch.zeros(1, 100)).mask
    assert mask[0].tolist() == [0.0] * 20 + [1.0] * 80


def test_patchify_and_unpatchify_are_inverse_and_channels_come_last():
    model, _ = build_pair("narrow", False)
    imgs = torch.randn(2, 3, 32, 32)
    patches = model.patchify(imgs)
    assert patches.shape == (2, 16, 8 * 8 * 3)
    assert torch.equal(patches[1, 6].view(8, 8, 3), imgs[1, :, 8:16, 16:24].permute(1, 2, 0))
    assert torch.equal(model.unpatchify(patches), imgs)


def test_options_reach_the_model_and_wrong_ones_are_refused():
    model = create_pretrain_model(
        "mae_vit_tiny_patch16",
        input_size=32,
        patch_size=8,
        in_chans=1,
        decoder_embed_dim=64,
        decoder_depth=2,
        decoder_num_heads=2,
        norm_pix_loss=True,
        mask_ratio=0.5,
        predict_ratio=0.5,
    )
    assert model.predict_ratio == 0.5
    out = model.reconstruct(torch.randn(2, 1, 32, 32))
    assert out.pred.shape == (2, 16, 64)
    assert out.mask.sum(1).tolist() == [8, 8]
    with pytest.raises(ValueError, match="multiple of the patch size"):
        create_pretrain_model("mae_vit_tiny_patch16", input_size=100)
    for ratio in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"predict_ratio .*: must be above 0 and at most 1"):
            create_pretrain_model("mae_vit_tiny_patch16", predict_ratio=ratio)
    with pytest.raises(ValueError, match="leaves 0 of"):
        model(torch.randn(1, 1, 32, 32), mask_ratio=0.99)
    with pytest.raises(BadInput, match="mae_vit_tiny_patch16"):
        create_pretrain_model("mae_vit_tinny_patch16")


@pytest.mark.parametrize("predict_ratio", [1, 0.25])
def test_gradient_checkpointing_changes_no_gradient(predict_ratio):
    model, _ = build_pair("narrow", False, predict_ratio)
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    model(imgs, noise=noise).backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(imgs, noise=noise).backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_the_classifier_equals_timms_vit(pool):
    ours = create_classifier("mae_vit_tiny_patch16", 7, input_size=64, global_pool=pool).eval()
    theirs = VisionTransformer(
        img_size=64,
        embed_dim=192,
        num_heads=3,
        num_classes=7,
        global_pool=pool,
        norm_layer=lambda *a, **k: torch.nn.LayerNorm(*a, eps=1e-6, **k),
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    imgs = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(imgs), theirs(imgs))
    assert ours.forward_features(imgs).shape == (2, 192)
    assert torch.equal(ours.pos_embed, sincos_position_embedding(192, 4))


def test_models_have_the_published_sizes():
    """Encoder parameters without the position embedding, in millions (ViT and DeiT papers)."""
    published = {"tiny": 5.5, "small": 21.6, "base": 85.6, "large": 303.1}
    for size, millions in published.items():
        with torch.device("meta"):
            model = create_classifier(f"vit_{size}_patch16", 1)
        count = sum(p.numel() for n, p in model.named_parameters() if "pos_embed" not in n)
        assert round(count / 1e6, 1) == pytest.approx(millions, abs=0.15), size
    assert len(list_models()) == 16
    assert "mae_vit_huge_patch14" in list_models()
