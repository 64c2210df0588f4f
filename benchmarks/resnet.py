"""A masked pre-training step of ResNet by gathered products against the library's convolutions.

    python benchmarks/resnet.py [--models resnet18 resnet50] [--json FILE]

Forward and backward in fp32, mask ratio 0.6, equal weights and masks. `maps` is SparK's way, which
other devices take: whole maps, masked, with batch norms of gathered cells. The optimizer is left
out: it is the same for both.
"""

import copy
from functools import partial

import timing
import torch
from torch import Tensor, nn

import models_resnet
from models_registry import create_pretrain_model

# Side lengths in pixels of image and patch: batch size.
CASES = {(224, 32): 8, (96, 16): 16, (48, 8): 32}
WAYS = {"rows": True, "maps": False}


def step(model: nn.Module, imgs: Tensor, noise: Tensor, own: bool) -> None:
    """Forward and backward, `own`: by gathered products."""
    models_resnet.has_own_passes = lambda device: own
    model.zero_grad()
    model(imgs, noise=noise).backward()


def check(model: nn.Module, imgs: Tensor, noise: Tensor) -> float:
    """The largest relative difference of a gradient in float64; asserts that it is rounding."""
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
    columns = ["model", "px", "patch", "batch", "rows, ms", "maps, ms", "× maps", "gradients apart"]
    report.table("Forward and backward", columns, rows)
    report.close()


if __name__ == "__main__":
    main()
