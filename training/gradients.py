"""The gradients of a step's micro-batches, added up in the parameters' `grad`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.precision import Precision


class BatchLoss(ABC):
    """The loss of a micro-batch, in two parts: see `training.graphed`."""

    @abstractmethod
    def prepare(self, batch: Any) -> tuple[Tensor, ...]:
        """A batch on the device -> the tensors that the loss needs; what the host decides."""

    @abstractmethod
    def loss(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        """The loss, a scalar. Everything happens on the device: the host decides nothing here."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Both."""
        return self.loss(model, *self.prepare(batch))


class Gradients(Protocol):
    """How a step's gradients are computed."""

    model: nn.Module  # the module that is run

    def add(self, batch: Any, accum: int, last: bool) -> Tensor:
        """Add a micro-batch's gradients, divided by `accum` -> its loss on the device, divided too.

        With the `last` micro-batch before an update, gradients are averaged over the ranks.
        """

    def clear(self) -> None:
        """Forget the gradients: the next step begins."""


def add_gradients(loss: Callable[[], Tensor], precision: Precision, accum: int) -> Tensor:
    """Forward and backward pass of a micro-batch -> its loss, divided by `accum`.

    Gradients are divided, too, and scaled if `precision` scales losses.
    """
    with precision.autocast():
        value = loss() / accum
    precision.scaler.scale(value).backward()
    return value.detach()


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
            return add_gradients(lambda: self.batch_loss(self.model, batch), self.precision, accum)

    def clear(self) -> None:
        """See Gradients."""
        self.model.zero_grad(set_to_none=True)
