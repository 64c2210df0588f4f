"""The Triton kernels: interpreted on the CPU and compared with float64, and compiled for GPUs."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from test_models_convnextv2 import randomise

import models_convnextv2
from backbones.convnextv2 import ConvNeXtSize
from benchmarks import traffic
from models_convnextv2 import FCMAE, Block, ConvNeXtV2
from models_registry import create_pretrain_model
from ops import choice, fused, tuning
from ops.choice import find_neighbours, kernels_for
from runs import ROOT
from util.errors import BadInput

pytestmark = pytest.mark.skipif(not choice.has_triton(), reason="Triton is not installed")
SMALL = ConvNeXtSize((1, 1, 1, 1), (3, 4, 5, 6))
# Patches in corners and in the middle, with and without neighbours, in random order.
VISIBLE = torch.tensor([[8, 0, 4, 1], [3, 2, 6, 7]])
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Triton's kernels on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SFER_KERNELS", "triton")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of which these small tensors fill several, but few where the interpreter is slow."""
    tiles = {8: (64, 8), 4: (32, 8), 2: (16, 8), 1: (8, 8)}
    monkeypatch.setattr(tuning, "DEPTHWISE", {b: tuning.Tile(*t, 4) for b, t in tiles.items()})
    monkeypatch.setattr(tuning, "HIDDEN", tuning.Tile(32, 16, 4))
    monkeypatch.setattr(tuning, "HIDDEN_CHUNK", 128)
    monkeypatch.setattr(tuning, "DEPTHWISE_CHUNK", 512)
    monkeypatch.setattr(tuning, "NORM_CHUNK", 256)


def kernels(kind, monkeypatch):
    monkeypatch.setenv("SFER_KERNELS", kind)


def gradients(model, run, dtype=torch.float64):
    """`run(model)` under autocast to `dtype`, and the gradients of its sum weighted by cosines."""
    with torch.autocast("cpu", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        out = run(model)
    weight = torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)
    return out.detach(), torch.autograd.grad((out * weight).sum(), list(model.parameters()))


def errors(found, exact):
    """The relative errors of the output and of each gradient."""
    pairs = zip([found[0], *found[1]], [exact[0], *exact[1]], strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def assert_close(ours, torchs, exact, dtype):
    """As close to float64 as torch's kernels are; float64 equals it but for the order of sums."""
    ours, torchs = errors(ours, exact), errors(torchs, exact)
    assert all(map(math.isfinite, ours)), ours
    # In bf16, GPUs and torch round, but Triton's interpreter truncates: errors are twice as large.
    factor = 2 if dtype == torch.bfloat16 else 1.2
    order = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 0)
    assert sum(ours) <= factor * sum(torchs) + order, (ours, torchs)
    assert max(ours) <= 1.5 * factor * max(torchs) + order, (ours, torchs)


CASES = [(b, torch.float64) for b in (8, 4, 2, 1)] + [(2, dtype) for dtype in PRECISIONS]


@pytest.mark.parametrize(("b", "dtype"), CASES, ids=str)
def test_a_block_equals_the_reference(b, dtype, small_tiles, monkeypatch):
    block = randomise(Block(5)).double()
    block.x = torch.nn.Parameter(torch.randn(2, 4, b, b, 5, dtype=torch.float64))

    def run(block):
        return block(block.x, find_neighbours(VISIBLE, 3, b))

    kernels("reference", monkeypatch)
    exact = gradients(block, run)
    block = block if dtype == torch.float64 else block.float()
    torchs = gradients(block, run, dtype)
    kernels("triton", monkeypatch)
    assert_close(gradients(block, run, dtype), torchs, exact, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_an_fcmae_equals_the_reference(dtype, small_tiles, monkeypatch):
    """Loss, prediction and every gradient, with b = 8, 4, 2 and 1."""
    model = randomise(FCMAE(SMALL, 64, decoder_embed_dim=5, mask_ratio=0.5)).double()
    imgs, noise, preds = torch.randn(2, 3, 64, 64).double(), torch.rand(2, 4), []

    def loss(model):
        score = type(model).forward_loss
        model.forward_loss = lambda imgs, *a: preds.append(a[0]) or score(model, imgs, *a)
        return model(imgs.to(next(model.parameters()).dtype), noise=noise)

    kernels("reference", monkeypatch)
    exact, torchs = gradients(model, loss), gradients(model.float(), loss, dtype)
    kernels("triton", monkeypatch)
    assert "Triton" in model.kernels(CPU, dtype)
    ours, preds = gradients(model, loss, dtype), [(pred.detach(), []) for pred in preds]
    assert_close(ours, torchs, exact, dtype)
    assert_close(preds[2], preds[1], preds[0], dtype)


def test_more_channels_than_a_program_takes_and_tiles_as_on_a_gpu(monkeypatch):
    block = randomise(Block(65), std=0.1)
    block.x = torch.nn.Parameter(torch.randn(1, 18, 1, 1, 65))
    visible = torch.rand(1, 25).argsort()[:, :18]

    def run(block):
        return block(block.x, find_neighbours(visible, 5, 1))

    ours = gradients(block, run)
    kernels("reference", monkeypatch)
    torchs = gradients(block, run)
    assert_close(ours, torchs, gradients(block.double(), run), torch.float32)


@pytest.mark.parametrize("width", [64, 32])
def test_whole_images_are_convolved_by_torch(width, small_tiles, monkeypatch):
    """In fine-tuning; only the rest of a block is ours."""
    model = randomise(ConvNeXtV2(SMALL, 7)).double()
    imgs = torch.randn(2, 3, 64, width).double()
    monkeypatch.setattr(fused.TiledDepthwise, "apply", None)

    def run(model):
        return model(imgs)

    ours, evaluated = gradients(model, run), model.eval()(imgs)
    kernels("reference", monkeypatch)
    exact = gradients(model.train(), run)
    assert max(errors(ours, exact)) < 1e-12
    torch.testing.assert_close(evaluated, exact[0])


def test_compiled_and_checkpointed_blocks_have_the_same_gradients(small_tiles):
    model = randomise(ConvNeXtV2(ConvNeXtSize((1, 1, 1, 1), (1, 2, 3, 4)), 3)).double()
    near = find_neighbours(VISIBLE, 3, 1)
    block = model.stages[3][0]
    block.x = torch.nn.Parameter(torch.randn(2, 4, 1, 1, 4).double())
    eager = gradients(block, lambda block: block(block.x, near))

    def recomputed(block):
        return torch.utils.checkpoint.checkpoint(block, block.x, near, use_reentrant=False)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for found in (
        gradients(block, recomputed),
        gradients(block, lambda block: compiled(block.x, near)),
    ):
        assert max(errors(found, eager)) < 1e-12


def test_operators_describe_their_outputs_and_what_they_change(small_tiles):
    """For torch.compile, which sees nothing else of them."""
    near, draw = find_neighbours(VISIBLE, 3, 1), torch.randn
    x, h, vector, wide = draw(8, 4), draw(2, 4, 16), draw(4), draw(16)
    per_image, sums = draw(2, 16).abs(), draw(2, 1, 16).abs()
    for operator, *inputs in [
        (fused.convolve_tiles, x, draw(49, 4), vector, *near),
        (fused.convolve_tiles, x, draw(49, 4), None, *near),
        (fused.correlate_tiles, x, x.clone(), *near),
        (fused.layer_norm, x, vector, vector.clone()),
        (fused.layer_norm_backward, x, x.clone(), vector, vector.clone()),
        (fused.cell_sums, h, None),
        (fused.grn, sums, wide),
        (fused.grn_backward, sums, per_image, wide),
        (fused.respond, h, per_image, wide),
        (fused.respond_backward, h, h.clone(), per_image, per_image.clone(), wide),
    ]:
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, tuple(inputs), test_utils=tests)


def test_six_tensors_are_stored_per_block(small_tiles):
    block, stored = Block(4), {}
    x = torch.randn(2, 4, 4, 4, 4, requires_grad=True)
    near = find_neighbours(VISIBLE, 3, 4)

    def note(tensor):
        stored[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x, near)
    assert sum(size for size in stored.values() if size >= x.numel()) == 6 * x.numel()


def test_gradients_have_the_strides_that_ddp_expects(small_tiles):
    block = randomise(Block(4))
    block(torch.randn(2, 4, 1, 1, 4), find_neighbours(VISIBLE, 3, 1)).sum().backward()
    for name, p in block.named_parameters():
        assert p.grad.stride() == p.stride(), name


@pytest.mark.parametrize(
    ("device", "capability", "chosen"),
    [
        ("cuda", (9, 0), "triton"),
        ("cuda", (8, 0), "triton"),
        ("cuda", (7, 5), "reference"),
        ("mps", None, "reference"),
        ("cpu", None, "cpu"),
    ],
)
def test_kernels_are_chosen_by_device(device, capability, chosen, monkeypatch):
    monkeypatch.delenv("SFER_KERNELS")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(choice, "passes_trial", lambda device: True)
    assert kernels_for(torch.device(device)) == chosen
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    assert kernels_for(torch.device(device)) == ("cpu" if device == "cpu" else "reference")


def broken(*inputs):
    raise RuntimeError("no such instruction\nat line 1")


@pytest.mark.parametrize(
    ("convolve", "told"),
    [
        (fused.convolve_tiles, ""),
        (lambda x, *_: 1.1 * torch.ones_like(x), "their results are wrong by"),
        (lambda x, *_: x * torch.nan, "their results are wrong by nan"),
        (broken, "they fail (RuntimeError: no such instruction)"),
    ],
)
def test_kernels_that_are_wrong_on_a_gpu_are_not_used(
    convolve, told, small_tiles, monkeypatch, capfd
):
    monkeypatch.setattr(fused, "convolve_tiles", convolve)
    choice.passes_trial.cache_clear()
    assert choice.passes_trial(CPU) == (not told)
    assert told in capfd.readouterr().err
    choice.passes_trial.cache_clear()


def test_interpreted_kernels_are_never_chosen_by_default(monkeypatch):
    monkeypatch.delenv("SFER_KERNELS")
    assert kernels_for(CUDA) == "reference"


@pytest.mark.parametrize(
    ("wanted", "device", "reason"),
    [
        ("fast", CPU, "give reference, cpu, triton"),
        ("cpu", CUDA, "do not run on cuda"),
        ("triton", CPU, "on cpu only with TRITON_INTERPRET=1"),
        ("triton", CUDA, "compute capability 8.0 or newer"),
    ],
)
def test_kernels_that_cannot_be_used_are_refused(wanted, device, reason, monkeypatch):
    kernels(wanted, monkeypatch)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(BadInput, match=f"^SFER_KERNELS={wanted}: .*{reason}"):
        kernels_for(device)


def test_a_missing_triton_is_reported(monkeypatch):
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    with pytest.raises(BadInput, match="SFER_KERNELS=triton: Triton is not installed"):
        kernels_for(CPU)


def test_half_as_many_bytes_are_moved_in_pre_training(monkeypatch):
    monkeypatch.setattr(models_convnextv2, "matmul_dtype", lambda x: x.dtype)
    model = create_pretrain_model("convnextv2_atto")
    torchs, ours = (traffic.count(model, 64, kind) for kind in ("reference", "triton"))
    assert ours.bytes.total() < 0.5 * torchs.bytes.total()
    assert ours.operators < torchs.operators


EVERY = "--sides 8 4 2 1 --dims 40 704 1408 2816 --dtypes float32 bfloat16 float16"


@pytest.mark.parametrize(
    ("sizes", "times"),
    [("--sides 8 --dims 40", 1), pytest.param(EVERY, 12, marks=pytest.mark.long)],
)
def test_kernels_compile_for_gpus_that_are_not_there(sizes, times, tmp_path):
    """For sm_80 and sm_90, with few enough registers for 12 warps at a time."""
    from triton.knobs import nvidia

    try:
        assert nvidia.ptxas
        assert nvidia.cuobjdump
    except RuntimeError as error:
        pytest.skip(str(error))  # Cannot find ptxas
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kernels.py", *sizes.split()],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    used = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(used) == 2 * 11 * times
    assert [k for k in used if k["registers"] > 168 or k["spilled"] > 16] == []
