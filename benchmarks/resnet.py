"""A masked pre-training step of ResNet: gathered matrix products against torch's convolutions.

    python benchmarks/resnet.py [--models resnet18 resnet50] [--json FILE]

Forward and backward pass in fp32, mask ratio 0.6, equal weights and masks. `rows` is our way on a
CPU. `maps` is SparK's way, which we use on other devices: whole maps, masked, with batch norm over
the gathered visible cells. The optimizer is left out, as it is the same for both.
"""

import copy
import os
from functools import partial

import timing
import torch
from torch import Tensor, nn

from models_registry import create_pretrain_model

# (image size, patch size) in pixels: batch size.
CASES = {(224, 32): 8, (96, 16): 16, (48, 8): 32}
WAYS = {"rows": True, "maps": False}


def step(model: nn.Module, imgs: Tensor, noise: Tensor, own: bool) -> None:
    """Forward and backward pass; `own`: with gathered products."""
    os.environ["SFER_KERNELS"] = "cpu" if own else "reference"
    model.zero_grad()
    model(imgs, noise=noise).backward()


def check(model: nn.Module, imgs: Tensor, noise: Tensor) -> float:
    """The largest relative difference between gradients in float64; asserts that it is rounding."""
    found, model = [], copy.deepcopy(model).double()
    for own in WAYS.values():
        step(model, imgs.double(), noise, own)
        found.append([p.grad.clone() for p in model.parameters()])
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
    assert worst < 1e-9, worst
    return worst


def main() -> None:
    parser = timing.parser(__doc__.splitlines()[0], rounds=7)
    models = ["resnet18", "resnet34", "resnet50"]
    parser.add_argument(
        "--models", nargs="+", choices=models, default=models, help="models (default: all)"
    )
    args = parser.parse_args()
    timing.settle(args)
    report, rows = timing.Report("A masked pre-training step of ResNet, fp32", args), []
    for name in args.models:
        for (size, patch), batch in CASES.items():
            torch.manual_seed(0)
            model = create_pretrain_model(name, size, patch_size=patch, decoder_embed_dim=256)
            imgs, noise = torch.randn(batch, 3, size, size), torch.rand(batch, model.num_patches)
            off = check(model, imgs, noise)
            calls = {way: partial(step, model, imgs, noise, own) for way, own in WAYS.items()}
            times = timing.alternate(calls, args.rounds)
            ms = [1000 * times[way] for way in WAYS]
            rows.append([name, size, patch, batch, *ms, times["maps"] / times["rows"], off])
    columns = ["model", "px", "patch", "batch", "rows, ms", "maps, ms", "× maps", "gradient diff."]
    report.table("Forward and backward pass", columns, rows)
    report.close()


if __name__ == "__main__":
    main()
