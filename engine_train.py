"""The training loop: gradient accumulation, mixed precision, clipping, agreement between ranks.

An engine supplies the loss of a batch; a main supplies an observer that logs and saves. The loop
works in optimizer steps. In each, the host waits for one small tensor summed over the ranks: the
loss and the gradient norm, which are not finite if they are not finite on any rank, and whether any
rank was asked to stop. A fused optimizer is launched before that, others after.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from training.gradients import Gradients
from training.precision import Precision
from training.transfer import Batches, to_device, to_host
from util.distributed import ProcessInfo, broadcast_from_main, sum_over_ranks
from util.errors import Fault
from util.optim import set_rates, step_if_finite
from util.seeding import seed_globals
from util.stop import StopRequest, defer_worker_errors

MAX_SKIPPED = 5  # steps in a row with a non-finite loss or gradient, before the run fails


@dataclass
class Sums:
    """Totals over the current epoch, for its log line; equal on all ranks except for the times."""

    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    skipped: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds spent waiting for data


@dataclass
class Position:
    """Progress of training: with the weights, optimizer and scaler, all that a resume needs."""

    epoch: int = 0  # the epoch in progress
    step: int = 0  # optimizer steps done in this epoch
    sums: Sums = field(default_factory=Sums)
    skipped_in_row: int = 0
    best: float = -1.0  # highest accuracy so far on the split that selects the best epoch, in %
    best_epoch: int = -1

    def note(self, accuracy: float) -> None:
        """Record the current epoch as the best if its accuracy is the highest so far."""
        if accuracy > self.best:
            self.best, self.best_epoch = accuracy, self.epoch

    def next_epoch(self) -> None:
        """Move to the beginning of the next epoch."""
        self.epoch, self.step, self.sums = self.epoch + 1, 0, Sums()


@dataclass
class TrainState:
    """Everything that changes during training."""

    model: nn.Module  # not wrapped by DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    position: Position = field(default_factory=Position)
    ema: ModelEmaV3 | None = None  # exponential moving average of the weights

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; `epoch` is the last finished one, `step` those done since."""
        p = self.position
        ema = {"model_ema": self.ema.module.state_dict()} if self.ema else {}
        return {
            "model": self.model.state_dict(),
            **ema,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": p.epoch - 1,
            "step": p.step,
            "sums": asdict(p.sums),
            "skipped_in_row": p.skipped_in_row,
            "best": p.best,
            "best_epoch": p.best_epoch,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore `state_dict()`. Raises RuntimeError or ValueError if it is of another model."""
        self.model.load_state_dict(saved["model"])
        if self.ema:
            self.ema.module.load_state_dict(saved.get("model_ema", saved["model"]))
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # {} from a run without loss scaling
            self.scaler.load_state_dict(saved["scaler"])
        self.position.epoch, self.position.step = saved["epoch"] + 1, saved["step"]
        self.position.sums = Sums(**saved["sums"])
        for name in ("skipped_in_row", "best", "best_epoch"):
            setattr(self.position, name, saved.get(name, getattr(self.position, name)))


def restore_values(before: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Restore tensors, given as (tensor, saved value) pairs, to their saved values."""
    for tensor, value in before:
        tensor.copy_(value)


class StepResult(NamedTuple):
    loss: float  # mean over the global batch
    grad_norm: float  # before clipping
    skipped: bool
    stop: bool  # whether any rank was asked to stop
    lr: float
    seconds: float
    waited: float  # seconds that the device waited for data


class Observer(Protocol):
    """What a main does between steps: logging and saving."""

    last_saved: str  # the newest checkpoint, for messages

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Called on every rank after each step; may save, and may raise Stopped to end the run."""

    def save_unfinished(self, state: TrainState) -> None:
        """Save in the middle of a step, as of the step before (nothing has changed since)."""


class Trainer:
    """Runs epochs of optimizer steps."""

    def __init__(
        self,
        state: TrainState,
        gradients: Gradients,
        *,
        lr_at: Callable[[float], float],
        precision: Precision,
        process: ProcessInfo,
        stop: StopRequest,
        accum: int = 1,
        clip_grad: float | None = None,
        seed: int = 0,
        weight_decay_at: Callable[[float], float] | None = None,
    ) -> None:
        """`gradients` computes the gradients of a step's micro-batches, `accum` of them.

        `lr_at(epoch)` and `weight_decay_at(epoch)` give the learning rate and the weight decay at a
        fractional epoch; without the latter, weight decay stays constant.
        """
        self.state, self.gradients = state, gradients
        self.lr_at, self.precision, self.process, self.stop = lr_at, precision, process, stop
        self.accum, self.clip_grad, self.seed = accum, clip_grad, seed
        self.weight_decay_at = weight_decay_at
        self.is_consistent = True  # whether model and optimizer match the position
        # Forward passes update batch norm's running statistics before the step is complete.
        self.statistics = any("running_" in name for name, _ in state.model.named_buffers())
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device

    def fix_bucket_order(self, batch: Any) -> None:
        """Run one throw-away backward pass if the model is wrapped by DDP.

        DDP reorders its gradient buckets after the first backward pass, which changes the last bits
        of the gradients: without this, a resumed run would differ from an uninterrupted one.
        """
        if not isinstance(self.gradients.model, DistributedDataParallel):
            return
        before = self._statistics()
        self.gradients.add(to_device(batch, self.device), 1, last=True)
        self.gradients.clear()
        restore_values(before)

    def run_epoch(self, batches: Iterable, steps: int, observer: Observer) -> None:
        """Train the remaining steps of the current epoch, which has `steps` steps in total."""
        self.gradients.model.train()
        for module in self.state.model.modules():  # frozen batch norm keeps its statistics
            if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
                module.eval()
        position, batches = self.state.position, Batches(batches, self.device)
        while position.step < steps:
            with ExitStack() as held:
                epoch = position.epoch + position.step / steps
                result = self._step(batches, epoch, observer, held)
                position.step += 1
                self._account(position, result, observer)
                self.is_consistent = True
            observer.after_step(self.state, result)
        # Batch-norm statistics differ between ranks: use rank 0's, which checkpoints hold.
        if self.statistics:
            for model in (self.state.model, *([self.state.ema.module] if self.state.ema else [])):
                broadcast_from_main(model.buffers())

    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        """(buffer, copy of its value) for each buffer; empty if the model has no batch norm."""
        buffers = self.state.model.buffers() if self.statistics else ()
        return [(buffer, buffer.clone()) for buffer in buffers]

    def _step(
        self, batches: Batches, epoch: float, observer: Observer, held: ExitStack
    ) -> StepResult:
        """Make one optimizer step.

        From the first change of the weights on, SIGCHLD is held back through `held`, which the
        caller closes once the position counts the step.
        """
        start = time.perf_counter()
        state, scaler = self.state, self.precision.scaler
        lr = self.lr_at(epoch)
        weight_decay = self.weight_decay_at(epoch) if self.weight_decay_at else None
        set_rates(state.optimizer, lr, weight_decay)
        seed_globals(self.seed, state.position.epoch, state.position.step, self.process.rank)

        before = self._statistics()
        total = self._accumulate(batches, observer)
        scaler.unscale_(state.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        report = self._report(total, norm)
        answer = to_host(report)
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        # The device is still busy with the backward pass.
        self.save_if_overdue(observer)
        batches.fetch_ahead()
        held.enter_context(defer_worker_errors())
        self.is_consistent = False
        done = step_if_finite(state.optimizer, report[:2])
        loss, mean_norm, stop = answer().tolist()
        skipped = not (math.isfinite(loss) and math.isfinite(mean_norm))
        if skipped:
            restore_values(before)
        else:
            if not done:
                scaler.step(state.optimizer)
            if state.ema:
                state.ema.update(state.model)
        scaler.update()
        self.gradients.clear()
        seconds = time.perf_counter() - start
        return StepResult(
            loss,
            mean_norm,
            skipped=skipped,
            stop=stop > 0,
            lr=lr,
            seconds=seconds,
            waited=batches.waited(),
        )

    def _accumulate(self, batches: Batches, observer: Observer) -> Tensor:
        """Add up the gradients of a step's micro-batches -> their mean loss."""
        total = torch.zeros((), device=self.device)
        for k in range(self.accum):
            self.save_if_overdue(observer)
            batch = next(batches)
            self.is_consistent = not self.statistics
            total += self.gradients.add(batch, self.accum, last=k == self.accum - 1)
        return total

    def save_if_overdue(self, observer: Observer) -> None:
        """Save now if a stop was requested a while ago; called before what may take long."""
        if self.is_consistent and self.stop.overdue():
            observer.save_unfinished(self.state)

    def _report(self, total: Tensor, norm: Tensor) -> Tensor:
        """(3,): the step's mean loss and gradient norm, and how many ranks were asked to stop.

        A value that is not finite on one rank makes the mean not finite on all.
        """
        asked = torch.full_like(total, float(self.stop.asked()))
        world = self.process.world
        return sum_over_ranks(torch.stack([total / world, norm.to(total.dtype) / world, asked]))

    def _account(self, position: Position, result: StepResult, observer: Observer) -> None:
        sums = position.sums
        sums.seconds += result.seconds
        sums.waited += result.waited
        if not result.skipped:
            position.skipped_in_row = 0
            sums.steps += 1
            sums.loss += result.loss
            sums.grad_norm += result.grad_norm
            return
        sums.skipped += 1
        scaler = self.precision.scaler
        if scaler.is_enabled() and math.isfinite(result.loss) and scaler.get_scale() >= 1:
            return  # an fp16 overflow, from which the scaler adapts its scale
        position.skipped_in_row += 1
        if position.skipped_in_row >= MAX_SKIPPED:
            raise Fault(
                f"the loss or its gradient was not finite in {MAX_SKIPPED} steps in a row "
                f"(last: step {position.step - 1} of epoch {position.epoch}, learning rate "
                f"{result.lr:.3g}); last good checkpoint: {observer.last_saved}; "
                "lower --blr, set --clip_grad, or use --amp off"
            )
