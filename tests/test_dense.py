"""Depthwise convolution of whole images: torch's results, and one memory layout when compiled."""

import pytest
import torch
import torch.nn.functional as F

from models_registry import compile_blocks, create_classifier, create_pretrain_model
from ops import dense
from ops.dense import DenseDepthwise, depthwise_forward


def inputs(dtype):
    torch.manual_seed(0)
    shapes = [(2, 9, 6, 8), (8, 1, 7, 7), (8,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_and_gradients_are_those_of_torch(dtype):
    ours, theirs = inputs(dtype), inputs(dtype)
    y = DenseDepthwise.apply(*ours)
    expected = F.conv2d(theirs[0].permute(0, 3, 1, 2), *theirs[1:], padding=3, groups=8)
    assert torch.equal(y, expected.permute(0, 2, 3, 1))
    assert torch.equal(depthwise_forward(*ours), y)
    for out in (y, expected.permute(0, 2, 3, 1)):
        (out * out.detach().sin()).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert a.grad.stride() == a.stride()


def test_fp32_filters_get_fp32_gradients_from_a_bf16_pass():
    x, weight, bias = inputs(torch.float32)
    DenseDepthwise.apply(x.bfloat16(), weight, bias).sum().backward()
    assert {p.grad.dtype for p in (x, weight, bias)} == {torch.float32}


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True)])
def test_only_wanted_gradients_are_computed(wanted, monkeypatch):
    seen, compute = [], dense.backward
    monkeypatch.setattr(dense, "backward", lambda *given: seen.append(given[3]) or compute(*given))
    x, weight, bias = inputs(torch.float64)
    for tensor, want in zip((x, weight, bias), wanted, strict=True):
        tensor.requires_grad_(want)
    DenseDepthwise.apply(x, weight, bias).sum().backward()
    assert [tensor.grad is not None for tensor in (x, weight, bias)] == list(wanted)
    assert seen == [list(wanted)]


@pytest.mark.parametrize("upstream", ["expanded", "transposed"])
def test_any_upstream_gradient_will_do(upstream):
    ours, theirs = inputs(torch.float64), inputs(torch.float64)
    g = torch.randn(2, 6, 9, 8, dtype=torch.float64).transpose(1, 2)
    g = g[:, :1, :1].expand(2, 9, 6, 8) if upstream == "expanded" else g
    DenseDepthwise.apply(*ours).backward(g)
    depthwise_forward(*theirs).backward(g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["fine-tuning", "pre-training"])
def test_compiled_blocks_keep_maps_channels_last(name, monkeypatch):
    """Neither are maps transposed for the backward pass, nor do gradients get other strides."""
    monkeypatch.setenv("SFER_KERNELS", "reference")
    copied, seen, compute = [], [], dense.backward

    def watched(g, *others):
        seen.append(g.shape)
        return compute(g, *others)

    usual = torch.Tensor.contiguous

    def contiguous(tensor, *options):
        copied.append(not tensor.is_contiguous())
        return usual(tensor, *options)

    monkeypatch.setattr(dense, "backward", watched)
    torch._dynamo.reset()
    torch.manual_seed(0)
    if name == "fine-tuning":
        model = create_classifier("convnextv2_atto", 3)
    else:
        model = create_pretrain_model(
            "convnextv2_atto", input_size=64, decoder_embed_dim=32, norm_pix_loss=False
        )
    compile_blocks(model)
    loss = model(torch.randn(2, 3, 64, 64)).sum()
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    loss.backward()
    assert len(seen) == 12 + (name == "pre-training")  # one per block
    assert copied
    assert not any(copied)
    for parameter, p in model.named_parameters():
        assert p.grad.stride() == p.stride(), parameter
