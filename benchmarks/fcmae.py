"""Packed FCMAE against the same network as a masked dense convolution.

    python benchmarks/fcmae.py [--models atto tiny base] [--compile] [--json FILE]

There are two peers: `dense` is a masked dense convolution with torch's kernels; `dense, tuned` (CPU
only) also has our gradients of the depthwise convolution, so that the remaining difference is the
effect of packing. On GPUs, `packed, torch's` is packed, too, but with torch's kernels for
everything. Times are for forward and backward passes of the encoder alone (`encode`) and for whole
optimizer steps with decoder, loss and fused AdamW (`step`). Memory is the allocator's peak, without
weights and gradients.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from unittest import mock

import timing
import torch
from peer_convnextv2 import MaskedDense, tuned_depthwise
from torch import Tensor, nn

from models_convnextv2 import FCMAE
from models_registry import compile_blocks, create_pretrain_model
from ops.choice import VARIABLE
from util.optim import adamw, parameter_groups

BATCH = {"atto": 16, "tiny": 8, "base": 8}
PEERS = ("dense", "dense, tuned")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Candidate:
    """One way to compute an FCMAE, with its own copy of the weights."""

    def __init__(
        self,
        model: FCMAE,
        peer: Callable[[FCMAE], MaskedDense] | None = None,
        kernels: str = "",
    ) -> None:
        """`kernels`: a value of SFER_KERNELS, or "" for the usual ones."""
        self.model, self.kernels = copy.deepcopy(model), kernels
        self.peer = peer(self.model) if peer else None
        self.optimizer = adamw(parameter_groups(self.model, 0.05), lr=1e-5, betas=(0.9, 0.95))

    def compile(self) -> "Candidate":
        compile_blocks(self.model)
        return self

    def encode(self, precision: str, imgs: Tensor, noise: Tensor) -> None:
        """Forward and backward pass of the encoder; the gradient of its output x is sin(x)."""
        ids = noise.argsort(dim=1, stable=True)[:, : self.keep(noise)]
        with autocast(precision, imgs.device), chosen(self.kernels):
            if self.peer is None:
                x = self.model.encoder(imgs, ids)
            else:
                grid = self.model.grid
                seen = torch.zeros_like(noise).scatter(1, ids, 1.0).view(-1, grid, grid)
                x = self.peer.encode(imgs, seen)
        (x * x.detach().sin()).sum().backward()
        self.optimizer.zero_grad()  # as before each pass of a real step

    def keep(self, noise: Tensor) -> int:
        return int(noise.shape[1] * (1 - self.model.mask_ratio) + 1e-6)

    def loss(self, precision: str, imgs: Tensor, noise: Tensor) -> Tensor:
        with autocast(precision, imgs.device), chosen(self.kernels):
            loss = (self.peer or self.model)(imgs, noise=noise)
        loss.backward()
        return loss.detach()

    def step(self, precision: str, imgs: Tensor, noise: Tensor) -> None:
        """A whole optimizer step."""
        self.loss(precision, imgs, noise)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(name: str, device: torch.device, compiled: bool) -> dict[str, Candidate]:
    """All candidates, with equal weights; GRN's, zeros by default, are random to be tested too."""
    torch.manual_seed(0)
    model = create_pretrain_model(f"convnextv2_{name}").to(device)
    for key, p in model.named_parameters():
        if key.endswith(("gamma", "beta")):
            nn.init.normal_(p, std=0.2)
    candidates = {"packed": Candidate(model), "dense": Candidate(model, MaskedDense)}
    if device.type == "cpu":
        tuned = partial(MaskedDense, depthwise=tuned_depthwise)
        candidates["dense, tuned"] = Candidate(model, tuned)
    else:
        candidates["packed, torch's"] = Candidate(model, kernels="reference")
    if compiled:
        candidates["packed, compiled"] = Candidate(model).compile()
    return candidates


@contextmanager
def chosen(kernels: str) -> Iterator[None]:
    """Forward passes in this context use these kernels; the usual ones if it is empty."""
    with mock.patch.dict(os.environ, {VARIABLE: kernels} if kernels else {}):
        yield


def check(
    candidates: dict[str, Candidate], precision: str, imgs: Tensor, noise: Tensor
) -> tuple[list[list[object]], str]:
    """Compare losses and gradients with the dense peer's in fp32.

    -> a row per candidate, and what differs too much, or "".
    In fp32 they may differ by the order of summation only; in bf16 they must be about as close as
    the dense peer's own. The mean is the better measure: the worst gradient is a LayerNorm's,
    where almost everything cancels, and differs by a fifth between equally good passes.
    """
    truth, rows = gradients(candidates["dense"], "fp32", imgs, noise), []
    means, worst = {}, {}
    for name, candidate in candidates.items():
        loss, found = gradients(candidate, precision, imgs, noise)
        off = [float((a - b).norm() / b.norm()) for a, b in zip(found, truth[1], strict=True)]
        means[name], worst[name] = sum(off) / len(off), max(off)
        rows.append([name, abs(loss / truth[0] - 1), means[name], worst[name]])
    fp32 = precision == "fp32"
    mean_limit, limit = (2e-5, 2e-5) if fp32 else (1.1 * means["dense"], 1.5 * worst["dense"])
    wrong = [k for k in candidates if not (means[k] <= mean_limit and worst[k] <= limit)]
    return rows, f"gradients differ, {precision}: {', '.join(wrong)}" if wrong else ""


def gradients(
    candidate: Candidate, precision: str, imgs: Tensor, noise: Tensor
) -> tuple[float, list[Tensor]]:
    """The loss and all gradients."""
    loss = candidate.loss(precision, imgs, noise)
    found = [p.grad for p in candidate.model.parameters()]
    candidate.model.zero_grad()
    return loss.item(), found


def autocast(precision: str, device: torch.device) -> torch.autocast:
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(candidate: Candidate, precision: str, imgs: Tensor, noise: Tensor) -> float:
    """Peak memory of an encoder pass in MB, without weights and gradients."""
    for p in candidate.model.parameters():
        p.grad = torch.zeros_like(p)
    if imgs.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate.encode(precision, imgs, noise)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(profile_memory=True) as profile:
            candidate.encode(precision, imgs, noise)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        peak = max(accumulate(event.nbytes() for event in events))
    candidate.model.zero_grad()
    return peak / 1e6


def ratio(peer: float | None, own: float) -> float | None:
    """How many times as fast; None without the peer."""
    return peer / own if peer else None


def main() -> None:
    parser = timing.parser(__doc__.splitlines()[0], rounds=7)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=BATCH,
        default=list(BATCH),
        help="sizes of ConvNeXt V2 (default: all)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        help=f"images per step (default: {', '.join(f'{name} {n}' for name, n in BATCH.items())})",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="precisions to measure (default: both)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also measure compiled packed blocks"
    )
    args = parser.parse_args()
    device = timing.settle(args)
    report = timing.Report("FCMAE: packed against masked dense convolution, 224 px, mask 0.6", args)
    equality, times, memory = [], [], []
    for name in args.models:
        batch = args.batch_size or BATCH[name]
        torch.manual_seed(0)
        data = torch.randn(batch, 3, 224, 224, device=device), torch.rand(batch, 49, device=device)
        for precision in args.precisions:
            candidates, where = build(name, device, args.compile), [name, batch, precision]
            report.keep_working(candidates, gradients, precision, *data)
            rows, problem = check(candidates, precision, *data)
            equality += [where + row for row in rows]
            if problem:
                report.doubt(f"{name}: {problem}")
            for part in ("encode", "step"):
                calls = {
                    key: partial(getattr(candidate, part), precision, *data)
                    for key, candidate in candidates.items()
                }
                taken = timing.alternate(calls, args.rounds)
                times += [
                    [*where, part, key, 1000 * s, *(ratio(taken.get(p), s) for p in PEERS)]
                    for key, s in taken.items()
                ]
            used = {key: peak_memory(c, precision, *data) for key, c in candidates.items()}
            memory += [[*where, key, mb, used["dense"] / mb] for key, mb in used.items()]
    head = ["model", "batch", "precision"]
    errors = ["candidate", "loss", "gradients, mean", "gradients, worst"]
    report.table("Relative difference from the dense peer in fp32", head + errors, equality)
    peers = [f"× {peer}" for peer in PEERS]
    report.table("Times", [*head, "part", "candidate", "ms", *peers], times)
    report.table("Peak memory, encoder", [*head, "candidate", "MB", "dense / this"], memory)
    report.close()


if __name__ == "__main__":
    main()
