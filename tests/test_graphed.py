"""Passes replayed from a graph, with CUDA graphs replaced by a stand-in that keeps their rules."""

import copy
from contextlib import nullcontext

import pytest
import torch
from test_engine import Recorder, two_ranks
from torch import nn

from datasets.transforms import Normalise
from engine_finetune import ClassifierLoss
from engine_pretrain import MaskedLoss
from engine_train import Trainer, TrainState
from models_registry import create_classifier, create_pretrain_model
from replay import capture
from training import graphed
from training.gradients import BatchLoss, Eager
from training.graphed import Graphed
from training.precision import Precision
from training.run import Run, gradients_of
from util.distributed import ProcessInfo
from util.errors import BadInput, Fault
from util.optim import adamw, parameter_groups
from util.stop import StopRequest

CPU = torch.device("cpu")
SMALL = {"decoder_embed_dim": 32, "decoder_depth": 2, "input_size": 64}
MODELS = {
    "mae": lambda: create_pretrain_model("mae_vit_tiny_patch16", decoder_num_heads=2, **SMALL),
    "fcmae": lambda: create_pretrain_model("convnextv2_atto", **SMALL | {"decoder_depth": 1}),
    "vit": lambda: create_classifier("vit_tiny_patch16", 5, input_size=64, drop_path=0.3),
    "convnext": lambda: create_classifier("convnextv2_atto", 5, drop_path=0.3),
}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(graphed, "capture", capture)


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    masked = name in ("mae", "fcmae")
    return model, MaskedLoss(Normalise()) if masked else ClassifierLoss(Normalise(), 0.1)


def batches(count, model, size=64, images=3):
    torch.manual_seed(1)
    for _ in range(count):
        imgs = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
        if hasattr(model, "mask_ratio"):
            yield imgs, torch.rand(images, (size // model.patch_size) ** 2), []
        else:
            yield imgs, torch.rand(images, 5).softmax(dim=1), []


def trainer_with(gradients, model, precision, accum=2, process=ProcessInfo(), **options):  # noqa: B008
    optimizer = adamw(parameter_groups(model, 0.05), 1e-3)
    state = TrainState(model, optimizer, precision.scaler)
    return Trainer(
        state,
        gradients,
        lr_at=lambda epoch: 1e-3,
        precision=precision,
        process=process,
        stop=StopRequest(),
        accum=accum,
        **options,
    )


def weights_after(steps, name, kind, amp="off", told=None, checkpointing=False, scaled=False):
    """The losses and the weights after some steps of two micro-batches."""
    model, loss = build(name)
    if checkpointing:
        model.set_grad_checkpointing()
    precision = Precision(amp, CPU)
    if scaled:
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    if kind is Graphed:
        lines = [] if told is None else told
        gradients = Graphed(model, loss, precision, ProcessInfo(), tell=lines.append)
    else:
        gradients = kind(model, loss, precision)
    recorder = Recorder()
    trainer = trainer_with(gradients, model, precision, clip_grad=1.0)
    trainer.run_epoch(batches(2 * steps, model), steps, recorder)
    return [r.loss for r in recorder.results], model.state_dict()


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_trains_like_the_operators_one_by_one(name, amp):
    """Also with drop path, whose random numbers are those of the step in both."""
    told = []
    expected = weights_after(3, name, Eager, amp)
    found = weights_after(3, name, Graphed, amp, told)
    assert told == ["recorded a CUDA graph for batches of 3×3×64×64"]
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_gradients_are_recomputed_with_the_cast_weights():
    expected = weights_after(2, "mae", Eager, "bf16", checkpointing=True)
    told = []
    found = weights_after(2, "mae", Graphed, "bf16", told, checkpointing=True)
    assert "warning" not in told[0]
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_scaled_losses_give_the_same_weights():
    expected = weights_after(3, "mae", Eager, scaled=True)
    found = weights_after(3, "mae", Graphed, scaled=True)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def graphed_model(name, told, process=ProcessInfo()):  # noqa: B008
    model, loss = build(name)
    return model, Graphed(model, loss, Precision("off", CPU), process, tell=told.append)


def test_each_resolution_has_its_own_graph():
    """Its position embeddings are new tensors in each epoch."""
    told = []
    model, gradients = graphed_model("mae", told)
    twin, loss = build("mae")
    eager = Eager(twin, loss, Precision("off", CPU))
    for size in (32, 64, 32, 48, 32):
        for each in (model, twin):
            each.set_resolution(size)
        [batch] = batches(1, model, size)
        for each in (gradients, eager):
            each.clear()
        assert gradients.add(batch, 1, last=True) == eager.add(batch, 1, last=True)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert q.grad is None or torch.equal(p.grad, q.grad)
    assert [line.split()[-1] for line in told] == ["3×3×32×32", "3×3×64×64", "3×3×48×48"]


class Waiting(BatchLoss):
    """A loss whose forward pass reads a value from the device."""

    def prepare(self, batch):
        return (batch,)

    def loss(self, model, x):
        y = model(x).square().mean()
        return y * (2 if y.item() > 0 else 1)


class Constant(Waiting):
    """A loss that depends on a value that the host has in each pass."""

    count = 0

    def loss(self, model, x):
        self.count += 1
        return model(x).square().mean() * self.count


def test_a_pass_that_no_graph_can_hold_ends_the_run():
    told, model = [], nn.Linear(3, 1)
    gradients = Graphed(model, Waiting(), Precision("off", CPU), ProcessInfo(), tell=told.append)
    why = r"cannot be recorded \(operation not permitted .*\); leave it out"
    with pytest.raises(Fault, match=f"--cuda_graph: a pass {why}"):
        gradients.add(torch.randn(4, 3), 1, last=True)
    assert told == []


def test_a_graph_that_computes_something_else_is_not_used():
    told, model = [], nn.Linear(3, 1)
    gradients = Graphed(model, Constant(), Precision("off", CPU), ProcessInfo(), tell=told.append)
    twin = copy.deepcopy(model)
    for _ in range(2):
        x = torch.randn(4, 3)
        gradients.clear()
        value = gradients.add(x, 1, last=True)
        factor = gradients.batch_loss.count
        twin.zero_grad()
        (twin(x).square().mean() * factor).backward()
        torch.testing.assert_close(model.weight.grad, twin.weight.grad)
        assert value.item() == pytest.approx(twin(x).square().mean().item() * factor)
    assert len(told) == 1
    assert told[0].startswith("warning: --cuda_graph has no effect: its results differ by ")


def test_nothing_is_recorded_while_losses_overflow():
    told = []
    model, gradients = graphed_model("vit", told)
    model.head.weight.data.fill_(torch.inf)
    [batch] = batches(1, model)
    assert not gradients.add(batch, 1, last=True).isfinite()
    assert told == []
    model.head.weight.data.fill_(0.1)
    gradients.clear()
    assert gradients.add(batch, 1, last=True).isfinite()
    assert len(told) == 1


def test_a_shape_seen_in_mid_step_keeps_the_gradients_before():
    told = []
    model, gradients = graphed_model("vit", told)
    twin, loss = build("vit")
    for each in (model, twin):
        each.eval()  # without drop path
    eager = Eager(twin, loss, Precision("off", CPU))
    for images in (3, 2):
        [batch] = batches(1, model, images=images)
        for each in (gradients, eager):
            each.add(batch, 2, last=images == 2)
    assert len(told) == 2
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


def check_ranks(process):
    """Two ranks begin and stay equal, and train as with DDP."""
    graphed.capture = capture
    weights = {}
    for kind in ("graphed", "ddp"):
        torch.manual_seed(process.rank)  # different weights, until rank 0's are everyone's
        model, loss = nn.Linear(3, 1), Squared()
        precision = Precision("off", CPU)
        if kind == "graphed":
            gradients = Graphed(model, loss, precision, process, tell=lambda line: None)
        else:
            gradients = Eager(nn.parallel.DistributedDataParallel(model), loss, precision)
        torch.manual_seed(7)
        data = torch.randn(2, 4, 2, 3)[process.rank]
        trainer_with(gradients, model, precision, process=process).run_epoch(data, 2, Recorder())
        weights[kind] = model.weight.detach().clone()
        del gradients
    torch.testing.assert_close(weights["graphed"], weights["ddp"])
    total = weights["graphed"].clone()
    torch.distributed.all_reduce(total)
    assert torch.equal(total, 2 * weights["graphed"])


class Squared(Waiting):
    def loss(self, model, x):
        return model(x).square().mean()


def test_two_ranks_train_as_with_ddp(tmp_path):
    two_ranks(check_ranks, tmp_path)


class Recording:
    """torch.cuda.graph as far as it can be seen without a GPU."""

    def __init__(self, graph, **options):
        self.graph, self.options = graph, options

    def __enter__(self):
        self.graph.done.append(("begin", self.options))

    def __exit__(self, kind, error, trace):
        self.graph.done.append("end")
        if error:
            raise RuntimeError("operation failed due to a previous error during capture")


class CUDAGraph:
    done = []  # noqa: RUF012

    def replay(self):
        self.done.append("replay")


@pytest.fixture
def cuda(monkeypatch):
    """What CUDA was asked for."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(graphed, "memory", lambda: (0, 1))
    CUDAGraph.done = []
    return CUDAGraph


def test_recording_asks_cuda_for_a_graph(cuda):
    result, replay = graphed.record(lambda: cuda.done.append("compute") or torch.ones(()))
    replay()
    options = {"capture_error_mode": "thread_local", "pool": (0, 1)}
    assert cuda.done == [("begin", options), "compute", "end", "replay"]
    assert result == 1


def test_a_failed_recording_names_its_cause(cuda):
    def compute():
        raise RuntimeError("operation not permitted\nand many more lines")

    with pytest.raises(graphed.RecordingFailed, match=r"^operation not permitted$"):
        graphed.record(compute)
    assert cuda.done[-1] == "end"


def test_another_stream_is_waited_for_even_after_an_error(monkeypatch):
    waits = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            waits.append((self.name, other.name))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("here"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with pytest.raises(ValueError, match="in between"), graphed.aside(torch.device("cuda")):
        raise ValueError("in between")
    assert waits == [("side", "here"), ("here", "side")]


@pytest.mark.parametrize(
    ("device", "model", "why"),
    [
        ("cpu", nn.Linear(3, 1), "needs a CUDA GPU; leave it out on cpu"),
        ("cuda", nn.BatchNorm1d(3), "batch norm is not supported; leave it out"),
    ],
)
def test_unsupported_runs_are_refused(device, model, why, tmp_path):
    run = Run(ProcessInfo(), torch.device(device), StopRequest(), tmp_path, folder=None, cores=1)
    with pytest.raises(BadInput, match=f"--cuda_graph: {why}"):
        gradients_of(
            model,
            Squared(),
            Precision("off", CPU),
            run,
            compiled=False,
            graphed=True,
            tell=print,
        )
