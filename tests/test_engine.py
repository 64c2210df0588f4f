"""The training loop on models small enough to check by hand."""

import gc
import traceback
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine_train import MAX_SKIPPED, Trainer, TrainState
from training.gradients import Eager
from training.precision import Precision
from training.transfer import Batches
from util.distributed import ProcessInfo, gather_objects, join, leave
from util.errors import BadInput, Fault
from util.stop import StopRequest

CPU = torch.device("cpu")


class Recorder:
    """An observer that stores every result."""

    def __init__(self):
        self.results, self.unfinished, self.last_saved = [], 0, "epoch 0, step 2"

    def after_step(self, state, result):
        self.results.append(result)

    def save_unfinished(self, state):
        self.unfinished += 1


def make_trainer(batch_loss, accum=1, process=ProcessInfo(), stop=None, **options):  # noqa: B008
    torch.manual_seed(0)
    norm = options.pop("norm", False)
    model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)) if norm else nn.Linear(3, 1)
    optimizer = options.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=1.0)
    precision = Precision(options.pop("amp", "off"), CPU)
    ema = ModelEmaV3(model, 0.5) if norm else None
    state = TrainState(model, optimizer, precision.scaler, ema=ema)
    run = DistributedDataParallel(model) if process.world > 1 else model
    options = {"process": process, "stop": stop or StopRequest(), "accum": accum, **options}
    gradients = Eager(run, batch_loss, precision)
    return Trainer(state, gradients, lr_at=lambda _: 0.1, precision=precision, **options)


def square(model, batch):
    return model(batch).square().mean()


def test_accumulated_micro_batches_equal_one_large_batch():
    torch.manual_seed(1)
    data = torch.randn(8, 3)
    whole, parts = make_trainer(square), make_trainer(square, accum=4)
    results = Recorder()
    whole.run_epoch([data], 1, results)
    parts.run_epoch(data.chunk(4), 1, results)
    torch.testing.assert_close(whole.state.model.weight, parts.state.model.weight)
    assert results.results[0].loss == pytest.approx(results.results[1].loss, rel=1e-6)


def test_the_epochs_sums_add_up_its_steps():
    torch.manual_seed(1)
    data = torch.randn(5, 2, 3)
    trainer, recorder = make_trainer(square), Recorder()
    trainer.run_epoch(data, 5, recorder)
    sums = trainer.state.position.sums
    assert sums.steps == 5
    assert sums.loss == pytest.approx(sum(r.loss for r in recorder.results))
    assert trainer.state.position.step == 5


def test_clipping_bounds_the_update_and_reports_the_norm_before_clipping():
    data = torch.full((4, 3), 10.0)
    trainer, recorder = make_trainer(square, clip_grad=0.5), Recorder()
    before = torch.cat([p.detach().flatten().clone() for p in trainer.parameters])
    trainer.run_epoch([data], 1, recorder)
    after = torch.cat([p.detach().flatten() for p in trainer.parameters])
    assert recorder.results[0].grad_norm > 10
    assert float((after - before).norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)


def broken(where):
    """A loss that is NaN for batches marked with one."""

    def loss(model, batch):
        y = square(model, batch[1])
        return y * float("nan") if batch[0] in where else y

    return loss


FUSED = partial(torch.optim.AdamW, fused=True)  # decides itself whether to skip a step


@pytest.mark.parametrize("clip_grad", [None, 0.1])
@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, FUSED])
def test_a_non_finite_step_is_skipped_and_counted(optimizer, bad, clip_grad):
    batches = [(k, torch.randn(2, 3)) for k in range(4)]
    options = {"optimizer": optimizer, "clip_grad": clip_grad}
    trainer, recorder = make_trainer(broken({bad}), **options), Recorder()
    clean = make_trainer(broken(set()), **options)
    trainer.run_epoch(batches, 4, recorder)
    del batches[bad]
    clean.run_epoch(batches, 3, Recorder())
    assert [r.skipped for r in recorder.results] == [k == bad for k in range(4)]
    assert torch.equal(trainer.state.model.weight, clean.state.model.weight)
    ours, expected = (t.state.optimizer.state_dict()["state"] for t in (trainer, clean))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert (trainer.state.position.sums.skipped, trainer.state.position.sums.steps) == (1, 3)


def test_a_skipped_step_does_not_change_batch_norm_statistics():
    torch.manual_seed(1)
    data = torch.randn(3, 4, 3)
    trainer, clean = make_trainer(square, norm=True), make_trainer(square, norm=True)
    trainer.run_epoch([data[0], data[1] * torch.nan, data[2]], 3, Recorder())
    clean.run_epoch([data[0], data[2]], 2, Recorder())
    for model in ("model", "ema"):
        ours, expected = (getattr(t.state, model).state_dict() for t in (trainer, clean))
        assert all(torch.equal(ours[name], value) for name, value in expected.items()), model


def test_the_host_waits_for_the_device_only_after_giving_it_the_whole_step(monkeypatch):
    order = []

    def noting(name, function):
        def noted(*args):
            order.append(name)
            return function(*args)

        return noted

    def answer(report):
        order.append("copy")
        return noting("wait", report.cpu)

    monkeypatch.setattr("engine_train.to_host", answer)
    monkeypatch.setattr(Batches, "fetch_ahead", noting("fetch", Batches.fetch_ahead))
    trainer = make_trainer(noting("forward", square), accum=2, optimizer=FUSED)
    monkeypatch.setattr(trainer.state.optimizer, "step", noting("step", lambda: None))
    trainer.run_epoch(torch.randn(2, 4, 3), 1, Recorder())
    assert order == ["forward", "forward", "copy", "fetch", "step", "wait"]


def test_several_skipped_steps_in_a_row_end_the_run():
    batches = [(k, torch.ones(2, 3)) for k in range(20)]
    trainer = make_trainer(broken(set(range(3, 20))))
    with pytest.raises(Fault, match=r"step 7 of epoch 0, learning rate 0\.1") as fault:
        trainer.run_epoch(batches, 20, Recorder())
    assert f"in {MAX_SKIPPED} steps in a row" in str(fault.value)
    assert "last good checkpoint: epoch 0, step 2" in str(fault.value)
    assert torch.isfinite(trainer.state.model.weight).all()


def test_a_step_with_a_finite_loss_but_infinite_gradient_is_skipped():
    def loss(model, batch):
        return (model.weight.sum() * 0).sqrt() + model(batch).sum() * 0

    trainer, recorder = make_trainer(loss), Recorder()
    trainer.run_epoch([torch.ones(1, 3)], 1, recorder)
    assert recorder.results[0].skipped
    assert torch.isfinite(trainer.state.model.weight).all()


def test_a_stop_request_in_a_long_step_saves_before_the_step_ends(monkeypatch):
    monkeypatch.setattr("util.stop.PATIENCE", 0.0)
    stop = StopRequest()
    stop._handle(15, None)
    trainer, recorder = make_trainer(square, accum=3, stop=stop), Recorder()
    trainer.run_epoch([torch.ones(2, 3)] * 3, 1, recorder)
    assert recorder.unfinished == 1
    assert recorder.results[0].stop


def test_fp16_on_the_cpu_is_refused_and_bf16_trains():
    with pytest.raises(BadInput, match="--amp fp16"):
        Precision("fp16", CPU)
    assert Precision("auto", CPU).name == "fp32"
    trainer, recorder = make_trainer(square, amp="bf16"), Recorder()
    trainer.run_epoch([torch.ones(2, 3)], 1, recorder)
    assert trainer.state.model.weight.dtype == torch.float32


def as_rank(rank, meeting, check):
    torch.set_num_threads(1)
    process = ProcessInfo(rank, 2, rank, 2)
    join(process, CPU, f"file://{meeting}", 60)
    check(process)
    gc.collect()
    leave()


def two_ranks(check, folder):
    mp.spawn(as_rank, (folder / "meeting", check), nprocs=2)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Raises what a check has raised. All run in the same two processes: these start slowly."""
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks(partial(check_all, folder), folder)

    def raise_failures(check):
        failed = sorted(folder.glob(f"{check.__name__}-*"))
        assert not failed, failed[0].read_text()

    return raise_failures


def check_all(folder, process):
    for check in (check_agreement, check_statistics, check_stop, check_communication):
        try:
            check(process)
        except Exception:
            (folder / f"{check.__name__}-{process.rank}").write_text(traceback.format_exc())
            return  # the other rank may still be in this check
        gc.collect()


def check_agreement(process):
    """Rank 1's second step is not finite: both skip it, and their weights stay equal."""
    batches = [(k, torch.full((2, 3), 1.0 + process.rank)) for k in range(4)]
    trainer = make_trainer(broken({1} if process.rank == 1 else set()), process=process)
    recorder = Recorder()
    trainer.run_epoch(batches, 4, recorder)
    assert [r.skipped for r in recorder.results] == [False, True, False, False]
    weight = trainer.state.model.weight.detach()
    total = weight.clone()
    torch.distributed.all_reduce(total)
    assert torch.equal(total, 2 * weight)


def test_a_non_finite_loss_on_one_rank_is_seen_by_all(checked):
    checked(check_agreement)


def check_statistics(process):
    torch.manual_seed(2)
    data = torch.randn(2, 3, 4, 3)
    trainer = make_trainer(square, process=process, norm=True)
    trainer.run_epoch(data[process.rank], 3, Recorder())
    for model in (trainer.state.model, trainer.state.ema.module):
        means = gather_objects([buffer.tolist() for buffer in model.buffers()])
        assert means[0] == means[1]
        assert means[0][0] != [0.0]


def test_after_an_epoch_all_ranks_have_equal_batch_norm_statistics(checked):
    """Otherwise each rank would evaluate its share of the images with another model."""
    checked(check_statistics)


def check_stop(process):
    stop = StopRequest()
    if process.rank == 1:
        stop._handle(15, None)
    recorder = Recorder()
    make_trainer(square, process=process, stop=stop).run_epoch([torch.ones(2, 3)], 1, recorder)
    assert recorder.results[0].stop


def test_a_stop_request_to_one_rank_is_seen_by_all(checked):
    checked(check_stop)


def check_communication(process):
    """Gradients of four micro-batches are reduced once and equal those of one large batch."""
    reduced = []

    def count(state, bucket):
        reduced.append(1)
        future = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    torch.manual_seed(3)
    data = torch.randn(2, 8, 3)
    trainer = make_trainer(square, accum=4, process=process)
    trainer.gradients.model.register_comm_hook(None, count)
    recorder = Recorder()
    trainer.run_epoch(data[process.rank].chunk(4), 1, recorder)
    assert len(reduced) == 1

    alone = make_trainer(square)
    loss = square(alone.state.model, data.flatten(0, 1)).item()
    assert recorder.results[0].loss == pytest.approx(loss, rel=1e-6)
    alone.run_epoch([data.flatten(0, 1)], 1, Recorder())
    torch.testing.assert_close(trainer.state.model.weight, alone.state.model.weight)


def test_accumulation_communicates_once_per_step_and_two_ranks_equal_one(checked):
    checked(check_communication)
