"""A fine-tuning step of ConvNeXt V2 against timm's model with the same weights.

    python benchmarks/finetune.py [--models atto tiny base] [--sizes 224 96] [--json FILE]

Forward pass, cross-entropy and backward pass in fp32, in training mode without drop path. The
optimizer is left out, as it is the same for both. timm's model is timed in both memory layouts.
ViTs are not measured, because ours are timm's.
"""

from functools import partial

import timing
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.convnextv2 import TO_TIMM
from models_registry import create_classifier
from util.states import renamed

CLASSES = 7
BATCH = {"atto": 16, "tiny": 8, "base": 4}  # at 224 px; four times as many at 112 px or less


def build(name: str) -> dict[str, nn.Module]:
    """Ours and timm's, with the same random weights."""
    torch.manual_seed(0)
    ours = create_classifier(f"convnextv2_{name}", CLASSES, head_init_scale=1.0)
    for block in (module for stage in ours.stages for module in stage):
        nn.init.normal_(block.grn.gamma, std=0.5)  # zeros by default, which would hide errors
    candidates = {"ours": ours}
    for title, layout in (
        ("timm", torch.contiguous_format),
        ("timm, channels last", torch.channels_last),
    ):
        theirs = timm.create_model(f"convnextv2_{name}", num_classes=CLASSES)
        wanted = theirs.state_dict()
        state = renamed(ours.state_dict(), TO_TIMM)
        theirs.load_state_dict({k: v.reshape(wanted[k].shape) for k, v in state.items()})
        candidates[title] = theirs.to(memory_format=layout)
    return {title: model.train() for title, model in candidates.items()}


def step(model: nn.Module, imgs: Tensor, labels: Tensor) -> None:
    """Forward and backward pass."""
    model.zero_grad()
    F.cross_entropy(model(imgs), labels).backward()


def check(candidates: dict[str, nn.Module], imgs: Tensor, labels: Tensor) -> float:
    """The largest relative difference of a gradient from timm's; asserts that it is rounding."""
    found = {}
    for title, model in candidates.items():
        step(model, imgs, labels)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found[title] = renamed(gradients, TO_TIMM) if title == "ours" else gradients
    pairs = [(found["ours"][name].flatten(), g.flatten()) for name, g in found["timm"].items()]
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    assert worst < 1e-4, worst
    return worst


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
        "--sizes",
        nargs="+",
        type=int,
        default=[224, 96],
        metavar="PIXELS",
        help="side lengths of the images in pixels (default: 224 96)",
    )
    args = parser.parse_args()
    timing.settle(args)
    report, rows = timing.Report("A fine-tuning step of ConvNeXt V2, fp32", args), []
    for name in args.models:
        candidates = build(name)
        for size in args.sizes:
            batch = BATCH[name] * (4 if size <= 112 else 1)
            imgs, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % CLASSES
            off = check(candidates, imgs, labels)
            calls = {k: partial(step, model, imgs, labels) for k, model in candidates.items()}
            times = timing.alternate(calls, args.rounds)
            fastest = min(seconds for title, seconds in times.items() if title != "ours")
            rows += [
                [name, size, batch, title, 1000 * seconds, fastest / seconds, off]
                for title, seconds in times.items()
            ]
    columns = ["model", "px", "batch", "candidate", "ms", "× faster timm", "gradient difference"]
    report.table("Forward and backward pass", columns, rows)
    report.close()


if __name__ == "__main__":
    main()
