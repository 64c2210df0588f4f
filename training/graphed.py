"""Forward and backward pass of a micro-batch as one CUDA graph, which the host launches at once.

Small models and small batches leave a GPU waiting for the host, which launches a thousand kernels
one by one. A graph records them once for each shape of a batch, then replays them: all tensors are
at the same addresses each time, so a batch is copied to where the graph expects it, and gradients
are added up in place. See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models_convnextv2 import Block
from training.gradients import BatchLoss
from training.precision import Precision
from util.distributed import ProcessInfo, broadcast_from_main, sum_over_ranks

WARM_UPS = 3  # passes before the recorded one: libraries choose kernels and allocate in the first


class Graph(NamedTuple):
    """A recorded pass."""

    inputs: Sequence[Tensor]  # to be overwritten before each replay
    loss: Tensor  # overwritten by each replay
    replay: Callable[[], None]


class Pass(nn.Module):
    """Forward and backward pass; a module, so that the model's weights can be exchanged in both."""

    def __init__(self, model: nn.Module, batch_loss: BatchLoss, precision: Precision) -> None:
        super().__init__()
        self.model, self.batch_loss, self.precision = model, batch_loss, precision

    def forward(self, accum: int, *tensors: Tensor) -> Tensor:
        """Add a micro-batch's gradients, divided by `accum` -> its loss, divided too."""
        with self.precision.autocast():
            loss = self.batch_loss.loss(self.model, *tensors) / accum
        self.precision.scaler.scale(loss).backward()
        return loss.detach()


class Graphed:
    """Replays a graph for each shape of micro-batches; computes as usual if none can be recorded.

    Two more things make a step shorter. Weights of linear layers are cast to autocast's dtype once
    per step rather than in each pass. And all gradients are parts of one tensor, cleared at once;
    ranks exchange it at once too, after the last backward pass, not during it as DDP does.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_loss: BatchLoss,
        precision: Precision,
        process: ProcessInfo,
        tell: Callable[[str], None],
    ) -> None:
        """`tell` gets a line for the log when a graph is recorded, and if none can be."""
        self.model, self.batch_loss, self.process, self.tell = model, batch_loss, process, tell
        broadcast_from_main([*model.parameters(), *model.buffers()])
        trained = [p for p in model.parameters() if p.requires_grad]
        self.device = trained[0].device
        self.flat = torch.zeros(sum(p.numel() for p in trained), device=self.device)
        for p, part in zip(trained, self.flat.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p)
        self._pass = Pass(model, batch_loss, precision)
        self._wide = linear_weights(self._pass) if precision.dtype != torch.float32 else {}
        self._narrow = [w.detach().to(precision.dtype) for w in self._wide.values()]
        self._graphs: dict[tuple, Graph] = {}
        self._possible = True

    def add(self, batch: Any, accum: int, last: bool) -> Tensor:
        """See Gradients; the loss is valid until the next call."""
        # Progressive resolution replaces buffers, so these are inputs of the graph, too.
        buffers = {name: b for name, b in self._pass.named_buffers() if b is not None}
        tensors = self.batch_loss.prepare(batch)
        inputs = [*tensors, *buffers.values()]

        def compute(given: Sequence[Tensor]) -> Tensor:
            own = dict(zip(buffers, given[len(tensors) :], strict=True))
            return self._compute(own, accum, *given[: len(tensors)])

        kind = (accum, *((x.shape, x.dtype) for x in inputs))
        if self._possible and kind not in self._graphs:
            self._record(kind, compute, inputs)
        if graph := self._graphs.get(kind):
            for place, x in zip(graph.inputs, inputs, strict=True):
                place.copy_(x)
            graph.replay()
        loss = graph.loss if graph else compute(inputs)
        if last and self.process.world > 1:
            sum_over_ranks(self.flat.div_(self.process.world))
        return loss

    @torch.no_grad()
    def clear(self) -> None:
        """See Gradients; the weights of the next step are known then."""
        self.flat.zero_()
        if self._narrow:
            torch._foreach_copy_(self._narrow, list(self._wide.values()))

    def _compute(self, buffers: Mapping[str, Tensor], accum: int, *tensors: Tensor) -> Tensor:
        """A pass with these buffers, and with cast weights."""
        narrow = [w.detach().requires_grad_() for w in self._narrow]
        weights = dict(zip(self._wide, narrow, strict=True))
        loss = functional_call(self._pass, {**weights, **buffers}, (accum, *tensors))
        for wide, w in zip(self._wide.values(), narrow, strict=True):
            if w.grad is not None:
                wide.grad += w.grad
        return loss

    def _record(
        self, kind: tuple, compute: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor]
    ) -> None:
        """Record a graph, and keep it if it computes what the same operators compute one by one."""
        sums = self.flat.clone()
        try:
            inputs = [x.clone() for x in inputs]
            with aside(self.device):
                for _ in range(WARM_UPS):
                    expected = self._result(lambda: compute(inputs))
            loss, replay = record(lambda: compute(inputs))
            graph = Graph(inputs, loss, replay)

            def replayed() -> Tensor:
                replay()
                return loss

            check(self._result(replayed), expected, self._pass.precision.dtype)
        except RuntimeError as error:
            self._possible = False
            self._graphs.clear()
            first = str(error).strip().partition("\n")[0]
            self.tell(f"warning: --cuda_graph has no effect: {first}")
        else:
            self._graphs[kind] = graph
            size = "×".join(map(str, inputs[0].shape))
            self.tell(f"recorded a CUDA graph for batches of {size}")
        finally:
            self.flat.copy_(sums)

    def _result(self, compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The loss and the gradients of one pass; random numbers are the same in each."""
        self.flat.zero_()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return compute().clone(), self.flat.clone()


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained weights and biases, by name, of the linear layers for which autocast casts them."""
    own = {
        layer for block in model.modules() if isinstance(block, Block) for layer in block.children()
    }
    return {
        f"{place}.{name}": p
        for place, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in own  # ConvNeXt V2's kernels use fp32
        for name, p in module.named_parameters(recurse=False)
        if p.requires_grad
    }


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run on another stream, as what comes before a recording must."""
    if device.type != "cuda":
        yield
        return
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        yield
    here.wait_stream(side)


def record(compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Record what `compute` does, without doing it -> its result's place, and a function to do it.

    Raises RuntimeError for what a graph cannot hold, such as waiting for the device.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, of data loading and NCCL, may call CUDA meanwhile.
    with torch.cuda.graph(graph, pool=memory(), capture_error_mode="thread_local"):
        result = compute()
    return result, graph.replay


@functools.cache
def memory() -> tuple[int, int]:
    """The memory of all graphs, which never run at the same time."""
    return torch.cuda.graph_pool_handle()


def check(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    """Compare losses and gradients. Raises RuntimeError if they differ by more than by rounding."""
    if not all(x.isfinite().all() for x in expected):
        return  # such a step is skipped anyway
    for x, y in zip(found, expected, strict=True):
        off = float((x - y).norm() / y.norm().clamp(min=1e-12))
        if not off <= (1e-4 if dtype == torch.float32 else 1e-2):
            raise RuntimeError(f"a replayed graph computed something else (off by {off:.1e})")
