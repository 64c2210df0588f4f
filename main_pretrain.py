"""Masked pre-training of a ViT (MAE) or a ConvNeXt V2 (FCMAE) on images of faces.

    python main_pretrain.py                                    # synthetic faces, this machine
    torchrun --nproc_per_node=8 main_pretrain.py --model convnextv2_base --data_path … …

Start order: the newest good checkpoint of --output_dir, else --resume, else from nothing.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from util.distributed import Place
from util.errors import BadInput
from util.options import (
    RATIO,
    SIZE,
    Parser,
    add_machine,
    add_output,
    add_training,
    fill_defaults,
    flag,
    number,
)
from util.program import run_program
from util.schedule import lr_at, scaled_lr
from util.sizes import CONVNEXT_PATCH, PRETRAIN_SIZES, family, find_size, kept_patches

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    from datasets import PretrainDataset
    from datasets.sampler import GlobalBatchSampler
    from engine_train import TrainState
    from util.rundir import RunDir
    from util.stop import StopRequest

FAMILY_DEFAULTS = {
    "mae": {
        "mask_ratio": 0.75,
        "norm_pix_loss": False,
        "blr": 1e-3,
        "epochs": 400,
        "decoder_depth": 8,
        "decoder_num_heads": 16,
    },
    "convnextv2": {
        "mask_ratio": 0.6,
        "norm_pix_loss": True,
        "blr": 1.5e-4,
        "epochs": 800,
        "decoder_depth": 1,
    },
}


def build_parser() -> Parser:
    """All options; those without a default here take the one of the model's family."""
    parser = Parser("Masked pre-training of MAE ViTs and ConvNeXt V2 (FCMAE) on face images.")
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="mae_vit_base_patch16", help="mae_vit_* or convnextv2_*")
    group.add_argument("--input_size", type=SIZE, default=224, help="pixels a side")
    group.add_argument("--patch_size", type=SIZE, help="pixels a side of a ViT's patch")
    group.add_argument("--mask_ratio", type=RATIO, help="share removed (MAE 0.75, FCMAE 0.6)")
    flag(group, "--norm_pix_loss", None, "normalise each target patch (MAE off, FCMAE on)")
    group.add_argument("--decoder_embed_dim", type=SIZE, default=512)
    group.add_argument("--decoder_depth", type=SIZE, help="blocks (MAE 8, FCMAE 1)")
    group.add_argument("--decoder_num_heads", type=SIZE, help="of MAE's decoder (16)")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="synthetic",
        help="folder of images, text or CSV list of files, or synthetic[:COUNT] (default)",
    )
    group.add_argument(
        "--crop_pct", type=number(float, above=0, high=1), help="centre shown in pictures (0.875)"
    )
    add_training(parser, weight_decay=0.05)
    add_machine(parser)
    add_output(parser)
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Fill in the family's defaults and refuse what cannot work, before torch is imported."""
    size = find_size(args.model, PRETRAIN_SIZES)
    kind = family(args.model)
    if kind == "convnextv2":
        for name in ("patch_size", "decoder_num_heads"):
            if getattr(args, name) is not None:
                raise BadInput(
                    f"--{name}: {args.model} has none; it is an option of mae_vit models"
                )
    fill_defaults(args, FAMILY_DEFAULTS[kind])
    fill_defaults(args, {"crop_pct": 0.875 if args.input_size <= 224 else 1.0})
    patch = CONVNEXT_PATCH if kind == "convnextv2" else args.patch_size or size.patch
    if args.input_size % patch:
        nearest = max(1, round(args.input_size / patch)) * patch
        raise BadInput(
            f"--input_size {args.input_size}: not a multiple of the patch, {patch}; try {nearest}"
        )
    kept_patches((args.input_size // patch) ** 2, args.mask_ratio)
    width, heads = args.decoder_embed_dim, args.decoder_num_heads
    if kind == "mae" and (width % heads or width % 4):
        raise BadInput(
            f"--decoder_embed_dim {width}: must be divisible by --decoder_num_heads {heads} and 4"
        )
    if args.start_epoch >= args.epochs:
        raise BadInput(f"--start_epoch {args.start_epoch}: the run ends at --epochs {args.epochs}")
    if not args.output_dir:
        raise BadInput("--output_dir: name a folder to write to")


def model_options(args: argparse.Namespace) -> dict[str, object]:
    """Keyword arguments of `create_pretrain_model`."""
    names = ["input_size", "mask_ratio", "norm_pix_loss", "decoder_embed_dim", "decoder_depth"]
    if family(args.model) == "mae":
        names += ["decoder_num_heads", "patch_size"]
    return {name: getattr(args, name) for name in names}


def train(args: argparse.Namespace) -> None:
    """Lock the folder, meet the other processes, pre-train, part."""
    from util import distributed
    from util.report import write_report
    from util.rundir import RunDir
    from util.stop import StopRequest

    place = distributed.find_place(args.world_size, args.local_rank, args.dist_on_itp)
    folder = RunDir(args.output_dir) if place.main else None
    stop = StopRequest()
    stop.install()
    device = distributed.pick_device(args.device, place)
    distributed.join(place, device, args.dist_url, args.dist_timeout)
    pretrain(args, place, device, stop, folder)
    if folder:
        folder.write_status("done")
        try:
            print(f"report: {write_report(folder.path)}")
        except OSError as error:
            print(f"warning: no report was written: {error}")
        folder.release()


def pretrain(
    args: argparse.Namespace,
    place: Place,
    device: "torch.device",
    stop: "StopRequest",
    folder: "RunDir | None",
) -> None:
    """Build the parts, go to where the run begins, run the epochs that are left."""
    import torch

    from datasets.transforms import Normalise
    from engine_observe import RunObserver, Saver
    from engine_pretrain import BadImages, MaskedLoss, Reconstructions, finish_epoch
    from engine_train import Precision, Trainer, TrainState
    from models_registry import create_pretrain_model
    from util.log import Meter, NullLog, RunLog
    from util.optim import adamw

    torch.manual_seed(args.seed)
    model = create_pretrain_model(args.model, **model_options(args)).to(device)
    model.set_grad_checkpointing(args.grad_checkpointing)
    dataset, sampler, loader = build_data(args, place, model.num_patches, device)
    lr = args.lr if args.lr is not None else scaled_lr(args.blr, sampler.global_batch)
    precision = Precision(args.amp, device)
    optimizer = adamw(model, lr, args.weight_decay, betas=(0.9, 0.95))
    state = TrainState(model, optimizer, precision.scaler)

    identity = run_identity(args, lr, sampler.global_batch, precision.name, dataset.source.digest)
    fresh, notes = start(args, state, identity)
    position = state.position
    log = NullLog()
    if folder:
        events = Path(args.log_dir or args.output_dir)
        log = RunLog(folder.path, events, position.epoch, position.step / sampler.steps)
        write_config(args, folder, model, dataset, sampler.global_batch, lr)
    for line in [*describe(args, model, sampler, lr, precision.name, device), *notes]:
        log.line(line)

    normalise = Normalise().to(device)
    loss = MaskedLoss(normalise, device)
    output = Path(args.output_dir)
    bad_images = BadImages(loss, len(dataset), output / "bad_images.txt", fresh, log)
    extra = {"args": vars(args), "run": identity}
    saver = Saver(
        output if folder else None, extra, args.save_ckpt_freq, args.save_ckpt_num, args.epochs
    )
    observer = RunObserver(
        log,
        saver if args.save_ckpt else None,
        Meter((args.epochs - position.epoch) * sampler.steps - position.step),
        bad_images.tell,
        device.type,
        sampler.steps,
        args.epochs,
        sampler.global_batch,
        args.print_freq,
        args.save_steps,
    )
    trainer = Trainer(
        state,
        distribute(model, device, place, args.compile),
        loss,
        lambda epoch: lr_at(epoch, lr, args.min_lr, args.warmup_epochs, args.epochs),
        precision,
        place,
        stop,
        args.accum_iter,
        args.clip_grad,
        args.seed,
    )
    trainer.settle_buckets(loss.blank(args.batch_size, args.input_size, model.num_patches))
    pictures = None
    if folder and args.vis_freq:
        pictures = Reconstructions(
            dataset, normalise, output / "figures", args.vis_freq, args.crop_pct, args.seed
        )
    while position.epoch < args.epochs:
        sampler.start_at(position.epoch, position.step)
        trainer.run_epoch(loader, sampler.steps, observer)
        finish_epoch(trainer, observer, pictures)
    log.close()


def build_data(
    args: argparse.Namespace, place: Place, num_patches: int, device: "torch.device"
) -> tuple["PretrainDataset", "GlobalBatchSampler", "DataLoader"]:
    """The images, their order, and the workers that read them; every rank must see the same."""
    from datasets import build_loader, build_pretrain_dataset
    from datasets.sampler import GlobalBatchSampler
    from engine_pretrain import check_readable
    from util.distributed import on_main

    cache = Path(args.output_dir) / "file_list.bin" if place.main else None

    def build() -> "PretrainDataset":
        return build_pretrain_dataset(
            args.data_path, args.input_size, num_patches, args.seed, cache
        )

    def check() -> tuple[int, str]:
        dataset = build()
        check_readable(dataset)
        return len(dataset), dataset.source.digest

    count, digest = on_main(check)
    dataset = build()
    if dataset.source.digest != digest:
        raise BadInput(
            f"--data_path {args.data_path}: process {place.rank} finds {len(dataset)} images, "
            f"process 0 {count}; every machine must see the same files"
        )
    sampler = GlobalBatchSampler(len(dataset), args.batch_size, args.accum_iter, place, args.seed)
    workers = args.num_workers
    if workers is None:
        workers = min(10, available_cores() // place.local_world)
    pin = args.pin_mem and device.type == "cuda"
    return dataset, sampler, build_loader(dataset, sampler, workers, pin, args.dist_timeout)


def available_cores() -> int:
    """The cores this process may use, which containers and schedulers restrict."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_identity(
    args: argparse.Namespace, lr: float, global_batch: int, precision: str, data: str
) -> dict[str, object]:
    """What determines the result of a run: a checkpoint of another one is not gone on from."""
    names = ["warmup_epochs", "min_lr", "weight_decay", "clip_grad", "seed", "epochs"]
    return {
        "model": args.model,
        **model_options(args),
        **{name: getattr(args, name) for name in names},
        "lr": lr,
        "global_batch": global_batch,
        "amp": precision,
        "data": data,
    }


def start(
    args: argparse.Namespace, state: "TrainState", identity: dict[str, object]
) -> tuple[bool, list[str]]:
    """Bring `state` to where the run begins; -> whether from nothing, and lines that say so."""
    from util.checkpoint import check_same_run, find_start, read_checkpoint
    from util.distributed import on_main

    path, notes = on_main(lambda: find_start(Path(args.output_dir), args.auto_resume, args.resume))
    if path is None:
        state.position.epoch = args.start_epoch
        return True, notes
    saved = read_checkpoint(path)
    note = check_same_run(path, saved, identity, args.override_resume)
    state.load_state_dict(saved)
    position = state.position
    if position.step and saved["run"].get("global_batch") != identity["global_batch"]:
        position.step, position.sums = 0, type(position.sums)()  # steps are of another size now
    at = f"at epoch {position.epoch}, step {position.step}"
    return False, [*notes, *([note] if note else []), at]


def distribute(
    model: "nn.Module", device: "torch.device", place: Place, compiled: bool
) -> "nn.Module":
    """The model as it is run: perhaps compiled, wrapped by DDP when there are several ranks."""
    from torch.nn.parallel import DistributedDataParallel

    if compiled:
        model.compile()
    if place.world == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def describe(
    args: argparse.Namespace,
    model: "nn.Module",
    sampler: "GlobalBatchSampler",
    lr: float,
    precision: str,
    device: "torch.device",
) -> list[str]:
    """The first lines of a run."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    lines = [
        f"{args.model}: {parameters:.1f} M parameters with decoder, {args.input_size} px, "
        f"{args.mask_ratio:.0%} of {model.num_patches} patches removed; {precision} on {device}",
        f"{sampler.count} images of {args.data_path}, {sampler.steps} steps an epoch; a step is "
        f"--batch_size {args.batch_size} × --accum_iter {args.accum_iter} × {sampler.place.world} "
        f"processes = {sampler.global_batch} images, learning rate {lr:.3g}",
    ]
    if args.warmup_epochs >= args.epochs:
        lines.append(
            f"warning: --warmup_epochs {args.warmup_epochs:g} is not over within --epochs "
            f"{args.epochs}: the learning rate only rises"
        )
    return lines


def write_config(
    args: argparse.Namespace,
    folder: "RunDir",
    model: "nn.Module",
    dataset: "PretrainDataset",
    global_batch: int,
    lr: float,
) -> None:
    """`config.json`: everything needed to do the run again."""
    from util.files import write_json
    from util.rundir import provenance

    folder.clear_status()
    parameters = sum(p.numel() for p in model.parameters())
    config = {
        "options": vars(args),
        **provenance(),
        "model": {"name": args.model, "parameters": parameters},
        "data": {
            "path": args.data_path,
            "count": len(dataset),
            "digest": dataset.source.digest,
        },
        "global_batch": global_batch,
        "lr": lr,
    }
    write_json(folder.path / "config.json", config)


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, train))
