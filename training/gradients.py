"""The gradients of a step's micro-batches, added up in the parameters' `grad`."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.precision import Precision


class BatchLoss:
    """The loss of a micro-batch, in two parts: see `training.graphed`."""

    def prepare(self, batch: Any) -> tuple[Tensor, ...]:
        """A batch on the device -> the tensors that the loss needs; what the host decides."""
        raise NotImplementedError

    def loss(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        """The loss, a scalar. Everything happens on the device: the host decides nothing here."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Both."""
        return self.loss(model, *self.prepare(batch))


class Gradients(Protocol):
    """How a step's gradients are computed."""

    model: nn.Module  # the module that is run

    def add(self, batch: Any, accum: int, last: bool) -> Tensor:
        """Add a micro-batch's gradients, divided by `accum` -> its loss on the device, divided too.

        After the `last` micro-batch of a step, they are the mean over the ranks.
        """

    def clear(self) -> None:
        """Forget the gradients: the next step begins."""


class Eager:
    """Operator by operator; DDP communicates while it computes."""

    def __init__(
        self,
        model: nn.Module,
        batch_loss: Callable[[nn.Module, Any], Tensor],
        precision: Precision,
    ) -> None:
        """`model` may be wrapped in DDP."""
        self.model, self.batch_loss, self.precision = model, batch_loss, precision

    def add(self, batch: Any, accum: int, last: bool) -> Tensor:
        """See Gradients."""
        silent = not last and isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if silent else nullcontext():
            with self.precision.autocast():
                loss = self.batch_loss(self.model, batch) / accum
            self.precision.scaler.scale(loss).backward()
        return loss.detach()

    def clear(self) -> None:
        """See Gradients."""
        self.model.zero_grad(set_to_none=True)
