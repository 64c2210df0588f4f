"""Count the bytes that ConvNeXt V2 moves on a GPU with torch's kernels and with ours: arithmetic.

    python benchmarks/traffic.py [--models tiny base] [--batch_size 64]

Every operator of a forward and a backward pass at 224 px is taken to read each of its inputs and to
write each of its outputs once; all is bf16. Nothing is computed, so no GPU is needed.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models_convnextv2
from models_registry import create_classifier, create_pretrain_model

# Operators that move nothing.
FREE = "view _unsafe_view _reshape_alias alias as_strided detach expand permute select slice split "
FREE += "squeeze squeeze_ t transpose unsqueeze empty empty_like new_empty device"


class Traffic(TorchDispatchMode):
    """Counts operators, and the bytes that each kind moves."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.operators = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        name = operator._schema.name.split("::")[1]
        if name not in FREE.split():
            self.operators += 1
            moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            # A tensor expanded from one value is not read from memory.
            self.bytes[name] += sum(t.nbytes for t in moved if 0 not in t.stride())
        return out


def count(model: torch.nn.Module, batch: int, kind: str) -> Traffic:
    """The traffic of a forward and a backward pass with this kind of kernels."""
    os.environ["SFER_KERNELS"] = kind
    model.to("meta", torch.bfloat16)
    imgs = torch.empty(batch, 3, 224, 224, device="meta", dtype=torch.bfloat16)
    with Traffic() as traffic:
        model(imgs).sum().backward()
    return traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["atto", "tiny", "base"], help="sizes of ConvNeXt V2"
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images per step (default: %(default)s)"
    )
    parser.add_argument(
        "--most", type=int, default=0, metavar="N", help="also list the N largest operators"
    )
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # or Triton's kernels would need a GPU
    # Autocast, which this asks for, has no rules for tensors without data.
    models_convnextv2.matmul_dtype = lambda x: x.dtype
    print("| model | training | torch's, GB | operators | ours, GB | operators |")
    print("|---|---|---|---|---|---|")
    for name in args.models:
        models = create_pretrain_model, lambda name: create_classifier(name, 7)
        for training, create in zip(("FCMAE", "fine-tuning"), models, strict=True):
            found = []
            for kind in ("reference", "triton"):
                traffic = count(create(f"convnextv2_{name}"), args.batch_size, kind)
                found += [f"{traffic.bytes.total() / 1e9:.1f}", str(traffic.operators)]
                for operator, moved in traffic.bytes.most_common(args.most):
                    print(f"{kind} {operator}: {moved / 1e9:.2f} GB", file=sys.stderr)
            print(f"| {name.title()} | {training} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
