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
from training.gradients import BatchLoss, add_gradients
from training.precision import Precision
from util.distributed import ProcessInfo, broadcast_from_main, gather_objects, sum_over_ranks
from util.errors import Fault

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
        """See `add_gradients`."""
        return add_gradients(
            lambda: self.batch_loss.loss(self.model, *tensors), self.precision, accum
        )


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
        self._begun = False  # whether there are gradients in this step yet

    def add(self, batch: Any, accum: int, last: bool) -> Tensor:
        """See Gradients; the loss is valid until the next call."""
        # Progressive resolution replaces buffers, so these are inputs of the graph, too.
        buffers = dict(self._pass.named_buffers())
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
        self._begun = True
        if last and self.process.world > 1:
            sum_over_ranks(self.flat.div_(self.process.world))
        return loss

    @torch.no_grad()
    def clear(self) -> None:
        """See Gradients; the weights of the next step are known then."""
        self.flat.zero_()
        self._begun = False
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
        """Record a graph, and keep it if it computes what the same operators compute one by one.

        All ranks record at the same time, and keep theirs only if all can. Raises Fault if a pass
        cannot be recorded: CUDA is not usable in every version of torch after that.
        """
        sums = self.flat.clone() if self._begun else None
        graph, problem, fatal = None, "", ""
        try:
            inputs = [x.clone() for x in inputs]
            with aside(self.device):
                for _ in range(WARM_UPS):
                    loss = self._alone(lambda: compute(inputs))
                expected = self.flat.clone()
            # fp16's first losses may overflow, and such a step is skipped: record in a later one.
            finite = bool(loss.isfinite() & expected.isfinite().all())
            if finite:
                graph = Graph(inputs, *record(lambda: compute(inputs)))
                found = self._alone(lambda: graph.replay() or graph.loss)
                limit = 1e-4 if self._pass.precision.dtype == torch.float32 else 1e-2
                off = max(difference(found, loss), difference(self.flat, expected))
                problem = "" if off <= limit else f"its results differ by {off:.1e}"
        except RecordingFailed as error:
            fatal = str(error)
        self.flat.zero_()
        if sums is not None:
            self.flat.copy_(sums)
        outcomes = gather_objects((problem, fatal, graph is not None))
        if fatal := next(filter(None, (fatal for _, fatal, _ in outcomes)), ""):
            raise Fault(f"--cuda_graph: a pass cannot be recorded ({fatal}); leave it out")
        if problem := next(filter(None, (problem for problem, _, _ in outcomes)), ""):
            self._possible = False
            self._graphs.clear()
            self.tell(f"warning: --cuda_graph has no effect: {problem}")
        elif all(made for _, _, made in outcomes):
            self._graphs[kind] = graph
            size = "×".join(map(str, inputs[0].shape))
            self.tell(f"recorded a CUDA graph for batches of {size}")

    def _alone(self, compute: Callable[[], Tensor]) -> Tensor:
        """Let `flat` hold one pass's gradients -> its loss. Random numbers are always the same."""
        self.flat.zero_()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return compute().clone()


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
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        here.wait_stream(side)


class RecordingFailed(Exception):
    """A graph cannot hold what was to be recorded; the message says why."""


def record(compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Record what `compute` does, without doing it -> its result's place, and a function to do it.

    Raises RecordingFailed for what a graph cannot hold, such as waiting for the device.
    """
    try:
        return capture(compute)
    except RuntimeError as error:
        cause = error.__context__ or error  # ending the recording raises a second error
        raise RecordingFailed(str(cause).strip().partition("\n")[0]) from error


def capture(compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """What of `record` is CUDA's."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, of data loading and NCCL, may call CUDA meanwhile.
    with torch.cuda.graph(graph, pool=memory(), capture_error_mode="thread_local"):
        result = compute()
    return result, graph.replay


@functools.cache
def memory() -> tuple[int, int]:
    """The memory of all graphs, which never run at the same time."""
    return torch.cuda.graph_pool_handle()


def difference(x: Tensor, y: Tensor) -> float:
    """The relative difference of x from y. Overwrites y, as there may be little memory."""
    norm = float(y.norm())
    return float(y.sub_(x).norm()) / max(norm, 1e-12)
