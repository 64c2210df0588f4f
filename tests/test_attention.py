"""Attention maps of classifiers: equal to other libraries and plain loops, without side effects."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from inference.explanation import attention_map, attention_rollout, grad_cam
from models_registry import create_classifier, create_pretrain_model, normalise_head_input

SIZE, GRID = 64, 4


def vit(pool="avg"):
    torch.manual_seed(0)
    model = create_classifier("vit_tiny_patch16", 5, SIZE, global_pool=pool)
    for block in model.blocks:  # uniform attention would hide mistakes
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.15)
    return model


def convnext():
    torch.manual_seed(0)
    return create_classifier("convnextv2_atto", 5, head_init_scale=30.0)


def resnet():
    torch.manual_seed(0)
    return create_classifier("resnet18", 5)


def in_transformers(model):
    """The weights of our ViT in a model that returns its attention."""
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=SIZE,
        num_labels=5,
        layer_norm_eps=1e-6,
        attn_implementation="eager",
    )
    own = model.state_dict()
    embeddings = "vit.embeddings."
    state = {
        f"{embeddings}cls_token": own["cls_token"],
        f"{embeddings}position_embeddings": own["pos_embed"],
        "vit.layernorm.weight": own["norm.weight"],
        "vit.layernorm.bias": own["norm.bias"],
        "classifier.weight": own["head.weight"],
        "classifier.bias": own["head.bias"],
    }
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
    }
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for kind in ("weight", "bias"):
        state[f"{embeddings}patch_embeddings.projection.{kind}"] = own[f"patch_embed.proj.{kind}"]
        for i in range(12):
            for ours, theirs in names.items():
                state[f"vit.layers.{i}.{theirs}.{kind}"] = own[f"blocks.{i}.{ours}.{kind}"]
            parts = own[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                state[f"vit.layers.{i}.attention.{letter}_proj.{kind}"] = part
    other = ViTForImageClassification(config)
    other.load_state_dict(state)
    return other.eval()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_rollout_equals_a_plain_loop_over_the_attention_from_transformers(pool):
    model, x = vit(pool).eval(), torch.randn(3, 3, SIZE, SIZE)
    other = in_transformers(vit("token") if pool == "avg" else model)
    with torch.no_grad():
        out = other(x, output_attentions=True)
        if pool == "token":  # both models are the same
            torch.testing.assert_close(model(x), out.logits, atol=1e-4, rtol=1e-4)
        ours = attention_rollout(model, x)
    for n in range(3):
        rollout = torch.eye(1 + GRID**2)
        for layer in out.attentions:
            mixed = sum(layer[n][head] for head in range(3)) / 3 + torch.eye(1 + GRID**2)
            rollout = (mixed / mixed.sum(dim=1, keepdim=True)) @ rollout
        rows = [0] if pool == "token" else range(1, 1 + GRID**2)
        row = sum(rollout[r] for r in rows) / len(rows)
        torch.testing.assert_close(ours[n].flatten(), row[1:], atol=1e-5, rtol=1e-4)
        assert row[1:].max() > 1.5 * row[1:].min()  # else the test would show nothing


@pytest.mark.parametrize(("make", "probe"), [(convnext, False), (convnext, True), (resnet, False)])
def test_grad_cam_equals_the_gradient_through_the_whole_model(make, probe):
    model, x = make(), torch.randn(3, 3, 96, 96)
    if probe:
        normalise_head_input(model)
        model.head[0].running_mean.uniform_(-1, 1)
        model.head[0].running_var.uniform_(0.5, 2)
    model.eval()
    kept = []
    last = model.layer4[-1] if make is resnet else model.stages[-1][-1]
    hook = last.register_forward_hook(lambda *args: kept.append(args[2]))
    logits = model(x)
    hook.remove()
    cells = kept[0].permute(0, 2, 3, 1) if make is resnet else kept[0][:, 0]
    for target in (None, torch.tensor([4, 0, 2])):
        classes = logits.argmax(1) if target is None else target
        ours = grad_cam(model, x, target)
        for n in range(3):
            chosen = logits[n, classes[n]]
            gradient = torch.autograd.grad(chosen, kept[0], retain_graph=True)[0]
            gradient = gradient.permute(0, 2, 3, 1)[n] if make is resnet else gradient[n, 0]
            expected = torch.zeros(3, 3)
            for channel in range(gradient.shape[2]):
                expected += gradient[:, :, channel].mean() * cells[n, :, :, channel].detach()
            torch.testing.assert_close(ours[n], expected.clamp(min=0), atol=1e-5, rtol=1e-4)
    assert not torch.equal(grad_cam(model, x, torch.zeros(3, dtype=int)), ours)


@pytest.mark.parametrize("make", [vit, convnext, resnet])
def test_maps_have_the_images_size_and_are_scaled_to_their_own_maximum(make):
    model, x = make().eval(), torch.randn(3, 3, SIZE, SIZE)
    heat = attention_map(model, x)
    assert (heat.shape, heat.dtype) == ((3, SIZE, SIZE), torch.float32)
    assert heat.min() >= 0
    maxima = heat.amax(dim=(1, 2))
    assert all(m == 0 or m == pytest.approx(1) for m in maxima.tolist())
    assert maxima.max() == 1
    torch.testing.assert_close(attention_map(model, x[1:2])[0], heat[1], atol=1e-4, rtol=1e-4)


def test_a_model_that_ignores_its_image_gives_an_empty_map():
    model = convnext()
    torch.nn.init.zeros_(model.head.weight)
    heat = attention_map(model, torch.randn(2, 3, SIZE, SIZE))
    assert torch.equal(heat, torch.zeros(2, SIZE, SIZE))


@pytest.mark.parametrize("make", [vit, convnext, resnet])
def test_the_model_stays_unchanged(make):
    model, x = make().train(), torch.randn(2, 3, SIZE, SIZE, requires_grad=True)
    next(model.children()).eval()
    frozen = next(model.parameters()).requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    heat = attention_map(model, x)
    assert not heat.requires_grad
    assert modes == [module.training for module in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert x.grad is None
    assert frozen.grad is None
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert [g.tolist() for g in grads] == [torch.ones_like(model.head.weight).tolist()]
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        torch.testing.assert_close(attention_map(model, x), heat)
    with pytest.raises((ValueError, AssertionError, RuntimeError)):
        # A ResNet accepts images of any size.
        attention_map(model, torch.randn(1, 4 if make is resnet else 3, 50, 50))
    assert modes == [module.training for module in model.modules()]
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("corner", [(0, 0), (3, 0), (1, 3)])
def test_a_vit_made_to_attend_to_a_bright_patch_shows_that_patch(pool, corner):
    model = vit(pool)
    with torch.no_grad():
        model.pos_embed.zero_()
        model.patch_embed.proj.weight.zero_()[0] = 0.01  # channel 0: the brightness of a patch
        for block in model.blocks:  # every token attends to it, and nothing else happens
            block.attn.qkv.weight.zero_()[192, 0] = 1
            block.attn.qkv.bias.zero_()[0] = 10
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
    x = torch.zeros(1, 3, SIZE, SIZE)
    down, right = (slice(16 * i, 16 * i + 16) for i in corner)
    x[0, :, down, right] = 3
    heat = attention_map(model, x)[0]
    assert heat[down, right].mean() > 4 * heat.mean()
    assert heat.argmax() in torch.arange(SIZE**2).view(SIZE, SIZE)[down, right]


@pytest.mark.parametrize("corner", [(0, 0), (2, 0), (1, 2)])
def test_a_convnext_made_to_classify_by_one_region_shows_that_region(corner):
    model = convnext().eval()
    torch.manual_seed(1)
    x = 0.2 * torch.randn(1, 3, 192, 192)
    down, right = (slice(64 * i, 64 * i + 64) for i in corner)
    x[0, :, down, right] += 3 * torch.randn(3, 64, 64)
    with torch.no_grad():
        cells = model.encode(x)[0, 0]
        there = cells.unflatten(0, (3, 2)).unflatten(2, (3, 2)).mean(dim=(1, 3))
        model.head.weight[0] = there[corner] - there.mean(dim=(0, 1))
    heat = attention_map(model, x, torch.tensor([0]))[0]
    others = F.avg_pool2d(heat[None], 64)[0]
    assert others.flatten().argmax() == 3 * corner[0] + corner[1]
    assert others[corner] > 2 * others.mean()


@pytest.mark.parametrize("make", [vit, convnext, resnet])
def test_a_map_is_computed_in_fp32_even_under_autocast(make):
    model, x = make().eval(), torch.randn(2, 3, SIZE, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        heat = attention_map(model, x)
    assert torch.equal(heat, attention_map(model, x))


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="not implemented for MaskedAutoencoderViT"):
        attention_map(create_pretrain_model("mae_vit_tiny_patch16", 32), torch.zeros(1, 3, 32, 32))
