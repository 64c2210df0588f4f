"""A whole optimizer step of MAE, compared with the official code and transformers' ViTMAE.

    python benchmarks/mae.py [--models tiny small base] [--batches 8 32] [--compile] [--json FILE]
                             [--predict_ratio 0.25]

224 px, mask ratio 0.75, official decoder. The peers use torch's AdamW with its defaults, as the
official code does; ours uses the fused one. `official` is the papers' formulation with step-by-step
attention, `official, SDPA` with torch's fused attention kernel; `transformers` uses SDPA too, its
faster choice, and is left out where that library is not installed. With `--predict_ratio`, ours is
also timed while it predicts only that share of the masked patches, which no peer does: see the last
table.
"""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import timing
import torch
from peer_mae import OfficialMAE, TransformersMAE, our_name
from torch import Tensor, nn

from models_mae import MaskedAutoencoderViT
from models_registry import compile_blocks, create_pretrain_model
from util.optim import adamw, parameter_groups

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Candidate:
    """One way to train an MAE, with its own copy of the weights."""

    def __init__(self, model: nn.Module, fused: bool = False) -> None:
        self.model = model
        if fused:
            self.optimizer = adamw(parameter_groups(model, 0.05), lr=1e-5, betas=(0.9, 0.95))
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95))

    def step(self, precision: str, imgs: Tensor, noise: Tensor) -> None:
        """Forward pass, backward pass, update."""
        self.loss(precision, imgs, noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, precision: str, imgs: Tensor, noise: Tensor) -> Tensor:
        dtype = PRECISIONS[precision]
        with torch.autocast(imgs.device.type, dtype, enabled=dtype != torch.float32):
            return self.model(imgs, noise=noise)


def build(
    name: str, device: torch.device, compiled: bool, predict_ratio: float
) -> dict[str, Candidate]:
    """All candidates that can predict this share of the masked patches, with equal weights."""
    torch.manual_seed(0)
    model = create_pretrain_model(f"mae_vit_{name}_patch16", predict_ratio=predict_ratio).to(device)
    peers: dict[str, Callable[[MaskedAutoencoderViT], nn.Module]] = {
        "official": partial(OfficialMAE, fused_attention=False),
        "official, SDPA": partial(OfficialMAE, fused_attention=True),
    }
    if predict_ratio == 1 and find_spec("transformers"):
        peers["transformers"] = TransformersMAE
    candidates = {"ours": Candidate(copy.deepcopy(model), fused=True)}
    if compiled:
        ours = copy.deepcopy(model)
        compile_blocks(ours)
        candidates["ours, compiled"] = Candidate(ours, fused=True)
    return candidates | {k: Candidate(make(copy.deepcopy(model))) for k, make in peers.items()}


def check(
    candidates: dict[str, Candidate], precision: str, imgs: Tensor, noise: Tensor
) -> tuple[list[list[object]], str]:
    """Compare losses and gradients with the official formulation's in fp32.

    -> a row per candidate, and what differs too much, or "".

    In fp32 they may differ by the order of summation only; in bf16 they must be about as close as
    the official formulation's own.
    """
    truth, rows, errors = gradients(candidates["official"], "fp32", imgs, noise), [], {}
    for name, candidate in candidates.items():
        loss, found = gradients(candidate, precision, imgs, noise)
        # transformers keeps query, key and value apart: the other tensors are compared.
        off = [float((found[k] - g).norm() / g.norm()) for k, g in truth[1].items() if k in found]
        errors[name] = max(off)
        rows.append([name, abs(loss / truth[0] - 1), sum(off) / len(off), errors[name]])
    limit = 1e-4 if precision == "fp32" else 1.2 * errors["official"]
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    return rows, f"gradients differ, {precision}: {wrong}" if wrong else ""


def gradients(
    candidate: Candidate, precision: str, imgs: Tensor, noise: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """The loss and all gradients, under our parameter names."""
    loss = candidate.loss(precision, imgs, noise)
    loss.backward()
    named = candidate.model.named_parameters()
    found = {our_name(k.removeprefix("model.")): p.grad for k, p in named if p.grad is not None}
    candidate.optimizer.zero_grad()
    return loss.item(), found


def main() -> None:
    parser = timing.parser(__doc__.splitlines()[0], rounds=7)
    sizes = ["tiny", "small", "base"]
    parser.add_argument(
        "--models", nargs="+", choices=sizes, default=sizes, help="sizes of ViT (default: all)"
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        type=int,
        default=[8, 32],
        metavar="N",
        help="images per step, one or more values (default: 8 32)",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="precisions to measure (default: both)",
    )
    parser.add_argument("--compile", action="store_true", help="also measure our compiled blocks")
    parser.add_argument(
        "--predict_ratio",
        type=float,
        default=1,
        help="also measure ours predicting only this share of the masked patches (default: "
        "%(default)s)",
    )
    args = parser.parse_args()
    device = timing.settle(args)
    report = timing.Report("MAE: a whole optimizer step, 224 px, mask 0.75", args)
    if not find_spec("transformers"):
        print("\ntransformers is not installed: its ViTMAE is left out", flush=True)
    equality, times, shares = [], [], []
    for name in args.models:
        for batch in args.batches:
            data = (
                torch.randn(batch, 3, 224, 224, device=device),
                torch.rand(batch, 196, device=device),
            )
            calls = {}
            for ratio in dict.fromkeys([1, args.predict_ratio]):
                candidates = build(name, device, args.compile, ratio)
                for precision in args.precisions:
                    report.keep_working(candidates, gradients, precision, *data)
                    rows, problem = check(candidates, precision, *data)
                    if problem:
                        report.doubt(f"{name}, batch {batch}: {problem}")
                    equality += [[name, batch, ratio, precision, *row] for row in rows]
                    calls |= {
                        (ratio, key, precision): partial(candidate.step, precision, *data)
                        for key, candidate in candidates.items()
                        if ratio == 1 or key.startswith("ours")
                    }
            taken = timing.alternate(calls, args.rounds)
            usual = {call[1:]: s for call, s in taken.items() if call[0] == 1}
            times += [[name, batch, *row] for row in compared(usual)]
            shares += [
                [name, batch, key, precision, ratio, 1000 * s, taken[1, key, precision] / s]
                for (ratio, key, precision), s in taken.items()
                if ratio != 1
            ]
    head = ["model", "batch"]
    columns = ["predicted", "precision", "candidate", "loss", "gradients, mean", "gradients, worst"]
    report.table("Relative difference from `official` in fp32", head + columns, equality)
    columns = ["candidate", "precision", "ms", "× official", "× SDPA", "× transformers", "× fp32"]
    report.table("Times", head + columns, times)
    if shares:
        columns = ["candidate", "precision", "predicted", "ms", "× predicting all"]
        report.table("Predicting a share of the masked patches", head + columns, shares)
    report.close()


def compared(taken: dict[tuple[str, str], float]) -> list[list[object]]:
    """A row per candidate: how many times as fast it is as each peer in the same precision.

    The last column compares with the fastest peer in fp32.
    """
    peers = ("official", "official, SDPA", "transformers")
    slow = min((taken[peer, "fp32"] for peer in peers if (peer, "fp32") in taken), default=0.0)
    return [
        [
            *(key, precision, 1000 * s),
            *(taken[peer, precision] / s if (peer, precision) in taken else None for peer in peers),
            slow / s if slow else None,
        ]
        for (key, precision), s in taken.items()
    ]


if __name__ == "__main__":
    main()
