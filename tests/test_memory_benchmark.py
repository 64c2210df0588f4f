"""benchmarks/memory.py: its count against counting by hand, saved tensors and torch's engine.

In benchmarks/fake_gpu.py is what it shares with benchmarks/arithmetic.py.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models_registry import create_classifier, create_pretrain_model
from runs import ROOT


@pytest.fixture
def memory():
    """benchmarks/memory.py; tests/helpers has a module of the same name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("benchmarks.memory")


def small_models():
    vit = {"input_size": 32, "decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
    yield "mae_vit_tiny_patch16", create_pretrain_model("mae_vit_tiny_patch16", **vit)
    yield "convnextv2_atto", create_pretrain_model("convnextv2_atto", input_size=64)
    yield "vit_tiny_patch16", create_classifier("vit_tiny_patch16", 7, input_size=32)
    yield "resnet18", create_classifier("resnet18", 7)


MODELS = [pytest.param(model.train(), id=name) for name, model in small_models()]


def loss_of(model, imgs):
    if hasattr(model, "mask_ratio"):
        return model(imgs, noise=torch.rand(len(imgs), model.num_patches))
    return model(imgs).square().mean()


def test_a_network_counted_by_hand(memory, monkeypatch):
    monkeypatch.setattr(memory, "BLOCK", 1)
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    weights = 4 * (8 * 16 + 16 * 4)
    with memory.Live() as live:
        for p in net.parameters():
            live.add(p)
        loss = net(torch.ones(3, 8)).square().sum()
        # ReLU stores its output only, so that of the first layer is freed.
        kept = 3 * 8 + 3 * 16 + 3 * 4 + 1
        assert live.bytes == weights + 4 * kept
        loss.backward()
        del loss
        assert live.bytes == 2 * weights  # and their gradients


def test_storages_take_whole_blocks_and_count_once(memory):
    with memory.Live() as live:
        x = torch.ones(129)
        views = x[1:], x.view(3, 43)
        assert live.bytes == 1024
        del x
        assert live.bytes == 1024
        del views
        assert live.bytes == 0


@pytest.mark.parametrize("model", MODELS[::2])  # others store more than tensors
def test_what_lives_after_the_forward_pass_is_what_autograd_saved(memory, model, monkeypatch):
    monkeypatch.setattr(memory, "BLOCK", 1)
    imgs, saved = torch.rand(2, 3, 32, 32), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    given = [imgs, *model.parameters()]
    with memory.Live() as live, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for tensor in given:
            live.add(tensor)
        before = live.bytes
        loss = loss_of(model, imgs)
    known = {t.untyped_storage().data_ptr() for t in (loss, *given)}
    expected = loss.nbytes + sum(size for place, size in saved.items() if place not in known)
    assert live.bytes - before == expected


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_and_peak_are_those_of_torchs_engine(memory, model, recompute, monkeypatch):
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(recompute)
    size, found = getattr(model, "input_size", 32), []
    imgs = torch.rand(2, 3, size, size)

    def step(run):
        torch.manual_seed(0)
        model.zero_grad()
        with memory.Live() as live:
            run(lambda: loss_of(model, imgs))
        found.append(([p.grad for p in model.parameters() if p.grad is not None], live.peak))

    step(lambda compute: compute().backward())
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 0)
    step(memory.backward)
    (theirs, highest), (ours, peak) = found
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, theirs, strict=True)
    )
    assert peak == pytest.approx(highest, rel=0.05)


class Flat(nn.Module):
    """A linear classifier of pixels."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 224 * 224, 7)

    def forward(self, imgs):
        return self.head(imgs.flatten(1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_counted_by_hand(memory, precision):
    pixels, n = 3 * 224 * 224, 4
    weights = 7 * pixels
    state = 4 * weights * 4  # weights, gradients, two moments
    fetched = 2 * n * pixels  # batches of bytes
    # When the new gradient is added, in fp32 the images are still there, which the layer stored. In
    # bf16 it stored a copy, already freed; the gradient exists twice, in bf16 and cast to fp32.
    last = 4 * n * pixels + 4 * weights if precision == "fp32" else (2 + 4) * weights
    assert memory.peak(Flat, n, precision) == pytest.approx(state + fetched + last, rel=0.001)


def test_autocast_follows_the_rules_of_cuda(memory):
    with memory.absent_gpu(), torch.autocast("cuda", torch.bfloat16):
        x = torch.empty(4, 8, dtype=torch.bfloat16)
        assert x.device.type == "cuda"
        assert F.layer_norm(x, (8,)).dtype == torch.float32
        assert F.linear(x.float(), torch.empty(3, 8)).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cuda")


def test_fewer_bytes_in_bf16_and_with_recomputation(memory):
    needs = {
        (precision, recompute): memory.count("convnextv2_atto", precision, recompute)
        for precision in memory.PRECISIONS
        for recompute in (False, True)
    }
    fp32, fp32_again, bf16, bf16_again = (need.image for need in needs.values())
    assert fp32 > bf16 > bf16_again
    assert fp32 > fp32_again > bf16_again
    parameters = sum(p.numel() for p in create_pretrain_model("convnextv2_atto").parameters())
    assert needs["fp32", False].fixed == pytest.approx(16 * parameters, rel=0.1)


def test_the_largest_batch_leaves_a_margin(memory):
    need = memory.Need(fixed=1e9, image=1e8)
    assert need.largest_batch(8e9) == 48  # (0.9 * 8 - 1 - 1) / 0.1 = 52
    assert need.largest_batch(3e9) == 7
    assert need.largest_batch(1e9) == 0


def test_memory_is_measured_beside_the_count_on_a_gpu(memory, monkeypatch):
    """With a stand-in for CUDA's allocator; one model does not fit."""
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10**9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 4 * 10**9)
    monkeypatch.setattr(memory.timing, "settle", lambda options: torch.device("cpu"))
    options = SimpleNamespace(device="cpu", batch_size=1)
    needs = {("convnextv2_atto", "fp32", False): memory.Need(1e9, 2e9)}
    needs[("convnextv2_large", "fp32", False)] = memory.Need(1e9, 2e9)
    build, tables = memory.build, []

    def built(name, recompute):
        if name.endswith("large"):
            raise torch.OutOfMemoryError
        return build(name, recompute)

    monkeypatch.setattr(memory, "build", built)
    report = SimpleNamespace(table=lambda *table: tables.append(table))
    memory.compare(report, options, needs)
    ((_, columns, (fits, fails)),) = tables
    assert len(columns) == len(fits) == len(fails)
    assert fits[4:] == pytest.approx([3.0, 3.0, 1.0], rel=0.001)
    assert fails[4:] == [3.0, None, None]
