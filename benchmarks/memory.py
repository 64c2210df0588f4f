"""Count the GPU memory that a training step needs, per model, precision and image: arithmetic.

    python benchmarks/memory.py [--models mae_vit_base_patch16 …] [--json FILE]

Forward and backward passes run on fake tensors (`fake_gpu.py`), so no GPU is needed. The count is
the highest sum of all tensors alive at the same time, each rounded up to 512 bytes as by torch's
allocator: weights, gradients, AdamW's two moments, and what grows with the batch. Neither compiled
blocks nor the memory of CUDA and its libraries is counted. With `--device cuda`, steps are also
measured.

`mae_…` and `convnextv2_…` are pre-trained, `vit_…` and `convnextv2_…:finetune` fine-tuned, all at
224 px.
"""

import argparse
import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import timing
import torch
from fake_gpu import PRECISIONS, absent_gpu, backward, build, loss_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from util.optim import adamw, parameter_groups

MODELS = [
    *(f"mae_vit_{size}_patch16" for size in ("tiny", "small", "base", "large")),
    *(f"convnextv2_{size}" for size in ("atto", "tiny", "base")),
    *("vit_small_patch16", "vit_base_patch16", "convnextv2_base:finetune"),
]
CARDS = (8, 16, 24, 40, 80)  # GB
BLOCK = 512  # bytes
# Available per card: a tenth is lost to fragmentation, and CUDA and the workspaces of its libraries
# need a gigabyte.
SHARE, RESERVED = 0.9, 1e9


class Live(TorchDispatchMode):
    """Adds up the storages that are alive, and remembers the highest sum, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._known.add(storage._cdata)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


class Need(NamedTuple):
    """Memory per step, in bytes: for the model, and for each image."""

    fixed: float
    image: float

    def largest_batch(self, card: float) -> int:
        """For a card of so many bytes: a multiple of 8 from 8 on; 0 if none fits."""
        batch = int((SHARE * card - RESERVED - self.fixed) // self.image)
        return max(0, batch - batch % 8 if batch >= 8 else batch)


def peak(make: Callable[[], nn.Module], batch: int, precision: str) -> int:
    """The bytes of a step: the highest sum of live tensors, and AdamW's moments.

    Gradients exist already, as after another micro-batch, and two fetched batches are there.
    """
    with torch.device("meta"):
        model = make()
    with absent_gpu():
        model.to_empty(device="cuda")
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.empty_like(p)
        with Live() as live:
            for tensor in (*model.parameters(), *(p.grad for p in trained)):
                live.add(tensor)
            fetched = [torch.empty(batch, 3, 224, 224, dtype=torch.uint8) for _ in range(2)]
            backward(lambda: loss_of(model, torch.empty(batch, 3, 224, 224), precision))
            del fetched
    moments = 8 * sum(p.numel() for p in trained)
    gc.collect()
    return live.peak + moments


def count(name: str, precision: str, recompute: bool) -> Need:
    """The need of a model, from two batches."""
    few, many = (peak(lambda: build(name, recompute), n, precision) for n in (16, 32))
    image = (many - few) / 16
    return Need(few - 16 * image, image)


def measure(name: str, recompute: bool, imgs: Tensor, precision: str) -> int:
    """The highest sum of live tensors on the GPU, images included, over two steps, in bytes."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - imgs.nbytes
    model = build(name, recompute).to(imgs.device)
    optimizer = adamw(parameter_groups(model, 0.05), lr=1e-5, betas=(0.9, 0.95))
    for _ in range(2):
        loss_of(model, imgs, precision).backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=MODELS, help="models to count (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=32,
        help="images of a measured step, with --device cuda (default: %(default)s)",
    )
    args = parser.parse_args()
    report = timing.Report("Memory of a training step, 224 px", args)
    needs = {
        (name, precision, recompute): count(name, precision, recompute)
        for name in args.models
        for precision in PRECISIONS
        for recompute in (False, True)
    }
    rows = []
    for name in args.models:
        found = {key[1:]: need for key, need in needs.items() if key[0] == name}
        fixed = max(need.fixed for need in found.values())
        rows.append([name, fixed / 1e9, *(need.image / 1e6 for need in found.values())])
    columns = [f"{p}{', checkpointing' * c}" for p in PRECISIONS for c in (False, True)]
    report.table("Counted: GB for the model, MB per image", ["model", "GB", *columns], rows)
    for recompute in (False, True):
        rows = [
            [name, *(needs[name, "bf16", recompute].largest_batch(1e9 * gb) for gb in CARDS)]
            for name in args.models
        ]
        title = f"Largest batch in bf16{', with --grad_checkpointing' * recompute}"
        report.table(title, ["model", *(f"{gb} GB" for gb in CARDS)], rows)
    if args.device.startswith("cuda"):
        compare(report, args, needs)
    report.close()


def compare(
    report: timing.Report, args: argparse.Namespace, needs: dict[tuple[str, str, bool], Need]
) -> None:
    """A table of counted and measured memory."""
    imgs = torch.rand(args.batch_size, 3, 224, 224, device=timing.settle(args))
    rows = []
    for (name, precision, recompute), need in needs.items():
        counted = (need.fixed + len(imgs) * need.image) / 1e9
        try:
            measured = measure(name, recompute, imgs, precision) / 1e9
        except torch.OutOfMemoryError:
            measured = None
        gc.collect()
        ratio = measured / counted if measured else None
        rows.append([name, len(imgs), precision, recompute, counted, measured, ratio])
    columns = ["model", "batch", "precision", "checkpointing", "counted, GB", "measured, GB"]
    report.table("Counted and measured", [*columns, "measured / counted"], rows)


if __name__ == "__main__":
    main()
