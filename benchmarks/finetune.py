"""A fine-tuning step of ConvNeXt V2 against timm's model with the same weights.

    python benchmarks/finetune.py [--models atto tiny base] [--sizes 224 96] [--json FILE]

Forward pass, cross-entropy and backward pass in training mode without drop path. The optimizer is
left out, as it is the same for both. timm's model is timed in both memory layouts. Gradients are
compared in fp32. ViTs are not measured, because ours are timm's.
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
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = {"atto": 16, "tiny": 8, "base": 4}  # at 224 px; four times as many at 112 px or less


def build(name: str, device: torch.device) -> dict[str, nn.Module]:
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
    return {title: model.to(device).train() for title, model in candidates.items()}


def step(model: nn.Module, precision: str, imgs: Tensor, labels: Tensor) -> None:
    """Forward and backward pass."""
    model.zero_grad()
    dtype = PRECISIONS[precision]
    with torch.autocast(imgs.device.type, dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(model(imgs), labels)
    loss.backward()


def check(candidates: dict[str, nn.Module], imgs: Tensor, labels: Tensor) -> float:
    """The largest relative difference of a gradient from timm's in fp32."""
    found = {}
    for title, model in candidates.items():
        step(model, "fp32", imgs, labels)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found[title] = renamed(gradients, TO_TIMM) if title == "ours" else gradients
    pairs = [(found["ours"][name].flatten(), g.flatten()) for name, g in found["timm"].items()]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


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
    parser.add_argument(
        "--batch_size",
        type=int,
        help="images per step at 224 px; four times as many at 112 px or less (default: "
        f"{', '.join(f'{name} {n}' for name, n in BATCH.items())})",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=["fp32"],
        help="precisions to measure (default: fp32)",
    )
    args = parser.parse_args()
    device = timing.settle(args)
    report, rows = timing.Report("A fine-tuning step of ConvNeXt V2", args), []
    for name in args.models:
        candidates = build(name, device)
        for size in args.sizes:
            batch = (args.batch_size or BATCH[name]) * (4 if size <= 112 else 1)
            imgs = torch.randn(batch, 3, size, size, device=device)
            labels = torch.arange(batch, device=device) % CLASSES
            off = check(candidates, imgs, labels)
            if not off < 1e-4:
                report.doubt(f"{name}, {size} px: a gradient differs from timm's by {off:.2g}")
            for precision in args.precisions:
                calls = {
                    k: partial(step, model, precision, imgs, labels)
                    for k, model in candidates.items()
                }
                times = timing.alternate(calls, args.rounds)
                fastest = min(seconds for title, seconds in times.items() if title != "ours")
                rows += [
                    [name, size, batch, precision, title, 1000 * seconds, fastest / seconds, off]
                    for title, seconds in times.items()
                ]
    columns = ["model", "px", "batch", "precision", "candidate", "ms", "× faster timm"]
    report.table("Forward and backward pass", [*columns, "gradient difference, fp32"], rows)
    report.close()


if __name__ == "__main__":
    main()
