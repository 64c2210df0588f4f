"""Masked pre-training of a ViT (MAE) or a ConvNeXt V2 (FCMAE) on images of faces.

    python main_pretrain.py                                    # synthetic faces, this machine
    torchrun --nproc_per_node=8 main_pretrain.py --model convnextv2_base --data_path … …

Start order: the newest good checkpoint of --output_dir, else --resume, else from nothing.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from backbones import family_of
from util.options.parser import launch, resume_options, saving
from util.options.pretrain import build_parser, check_options
from util.options.trained import difference_lines, differences
from util.program import run_program
from util.schedule import lr_at, resolution_at, scaled_lr

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from datasets import PretrainDataset
    from datasets.sampler import GlobalBatchSampler
    from datasets.transforms import Normalise
    from training.probe import Probe
    from training.run import Run
    from util.log import NullLog


def size_schedule(args: argparse.Namespace, patch: int) -> Callable[[int], int]:
    """An epoch's resolution: the same throughout, or `--progressive`."""
    low, high = args.progressive or (args.input_size, args.input_size)
    return partial(resolution_at, low=low, high=high, patch=patch, epochs=args.epochs)


def model_options(args: argparse.Namespace) -> dict[str, object]:
    """Keyword arguments of `create_pretrain_model`."""
    names = ["input_size", "mask_ratio", "norm_pix_loss", "decoder_embed_dim", "decoder_depth"]
    names += family_of(args.model).pretrain_options
    return {name: getattr(args, name) for name in names}


def work(args: argparse.Namespace) -> None:
    """Pre-train in the run's folder, with the other processes."""
    from training.run import run_in_folder

    run_in_folder(args.output_dir, launch(args), lambda run: pretrain(args, run))


def pretrain(args: argparse.Namespace, run: "Run") -> None:
    """Build the parts, go to where the run begins, run the epochs that are left."""
    import torch

    from datasets.transforms import Normalise
    from engine_pretrain import MaskedLoss, Reconstructions, Resolution, begin_with_weights
    from engine_train import Precision, Trainer, TrainState
    from models_registry import create_pretrain_model
    from training.bad_images import BadImages
    from training.resume import find_beginning, restore_state
    from training.run import (
        distribute,
        observe,
        open_log,
        run_epochs,
        step_line,
        warmup_lines,
        write_config,
    )
    from util.optim import adamw, parameter_groups

    torch.manual_seed(args.seed)
    model = create_pretrain_model(args.model, **model_options(args)).to(run.device)
    model.set_grad_checkpointing(args.grad_checkpointing)
    size_at = size_schedule(args, model.patch_size)
    dataset, sampler, loader, report, margin = build_data(args, run, model.num_patches, size_at)
    probe_margin = args.face_margin if margin is None else margin  # whose faces may have boxes
    args = args.but(face_margin=margin)
    lr = args.lr if args.lr is not None else scaled_lr(args.blr, sampler.global_batch)
    precision = Precision(args.amp, run.device)
    optimizer = adamw(parameter_groups(model, args.weight_decay), lr, betas=(0.9, 0.95))
    state = TrainState(model, optimizer, precision.scaler)

    identity = run_identity(args, lr, sampler.global_batch, precision.name, dataset.source.digest)
    path, weights, notes = find_beginning(run.output, resume_options(args))
    if weights:
        trained, told = begin_with_weights(model, weights)
        seen = {name: trained[name] for name in ("input_size", "face_margin") if name in trained}
        differ = differences(args, seen, {"face_margin": margin})
        notes += [*told, *difference_lines(differ, "continued", "begun")]
    notes += restore_state(path, resume_options(args), state, identity, sampler)
    log = open_log(run, args.log_dir, state, sampler.steps)
    parameters = sum(p.numel() for p in model.parameters())
    write_config(
        run,
        {**vars(args), "face_margin": probe_margin},
        model={"name": args.model, "parameters": parameters},
        data={
            "path": args.data_path,
            "count": len(dataset),
            "digest": dataset.source.digest,
        },
        global_batch=sampler.global_batch,
        lr=lr,
    )
    shape = (
        f"{args.model}: {parameters / 1e6:.1f} M parameters with decoder, {args.input_size} px, "
        f"{args.mask_ratio:.0%} of {model.num_patches} patches masked, "
        f"{args.predict_ratio:.0%} of those predicted; "
        f"{precision.name} on {run.device}, {model.kernels(run.device, precision.dtype)}"
    )
    lines = [*report, shape, step_line(sampler, args.data_path, lr)]
    for line in [*lines, *warmup_lines(args.warmup_epochs, args.epochs), *notes]:
        log.line(line)

    normalise = Normalise().to(run.device)
    loss = MaskedLoss(normalise)
    bad_images = BadImages(loss, len(dataset), run.output / "bad_images.txt", path is None, log)
    extra = {"args": vars(args), "run": identity, "preprocessing": preprocessing(args)}
    observer = observe(run, log, state, sampler, args.epochs, saving(args), bad_images.tell, extra)
    trainer = Trainer(
        state,
        distribute(model, run, args.compile),
        loss,
        lr_at=lambda epoch: lr_at(epoch, lr, args.min_lr, args.warmup_epochs, args.epochs),
        precision=precision,
        place=run.place,
        stop=run.stop,
        accum=args.accum_iter,
        clip_grad=args.clip_grad,
        seed=args.seed,
    )
    trainer.settle_buckets(loss.blank(args.batch_size, args.input_size, model.num_patches))
    pictures = None
    if run.folder and args.vis_freq:
        pictures = Reconstructions(
            dataset, normalise, run.output / "figures", args.vis_freq, args.crop_pct, args.seed
        )
    probe = build_probe(args.but(face_margin=probe_margin), run, normalise, log)
    resolution = Resolution(model, size_at, log)

    def measure(epoch: int) -> dict[str, float]:
        measured = resolution.end(epoch)
        if pictures and pictures.due(epoch, args.epochs):
            pictures.save(model, epoch, log)
        if probe and ((epoch + 1) % args.probe_freq == 0 or epoch + 1 == args.epochs):
            measured |= probe.measure(model, precision, lambda: trainer.save_if_overdue(observer))
        return measured

    run_epochs(trainer, observer, sampler, loader, measure, resolution.begin)
    log.close()


def build_data(
    args: argparse.Namespace, run: "Run", num_patches: int, size_at: Callable[[int], int]
) -> tuple["PretrainDataset", "GlobalBatchSampler", "DataLoader", list[str], float | None]:
    """The images, their order, and the workers that read them; every rank must see the same.

    Also what to print of the images, and the margin that faces are cut with.
    """
    from datasets import Images, PretrainDataset, build_loader, drawn_size, open_images
    from datasets.sampler import GlobalBatchSampler
    from datasets.unreadable import check_readable
    from training.run import loading, same_everywhere

    cache = run.output / "file_list.bin" if run.folder else None

    def build() -> Images:
        images = open_images(args.data_path, cache, drawn_size(args.input_size), args.face_margin)
        check_readable(images.source)
        return images

    images = same_everywhere(
        f"--data_path {args.data_path}", build, lambda images: images.source.digest
    )
    dataset = PretrainDataset(images.source, args.input_size, num_patches, args.seed, size_at)
    sampler = GlobalBatchSampler(
        len(dataset), args.batch_size, args.accum_iter, run.place, args.seed
    )
    how = loading(run, args.num_workers, args.pin_mem, args.dist_timeout)
    loader = build_loader(dataset, sampler, **how)
    return dataset, sampler, loader, images.notes, images.face_margin


def preprocessing(args: argparse.Namespace) -> dict[str, object]:
    """What pictures went through in pre-training; travels in its checkpoints."""
    from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD

    return {
        "face_margin": args.face_margin,  # None: pictures of faces, used whole
        "input_size": args.input_size,
        "crop_pct": None,
        "interpolation": "bicubic",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }


def build_probe(
    args: argparse.Namespace, run: "Run", normalise: "Normalise", log: "NullLog"
) -> "Probe | None":
    """`--probe_data_path`: what the features of the model so far tell about expressions."""
    if not args.probe_data_path:
        return None
    from datasets import drawn_size, open_labelled, plain
    from datasets.duplicates import duplicates
    from datasets.finetune import choose_splits
    from datasets.labelled import describe
    from training.probe import Probe
    from training.run import loading, same_everywhere

    data = same_everywhere(
        f"--probe_data_path {args.probe_data_path}",
        lambda: open_labelled(
            args.probe_data_path,
            face_margin=args.face_margin,
            size=drawn_size(args.input_size),
        ),
        lambda data: data.digest,
    )
    train, tests, _, notes = choose_splits(data, None, "test", 0.1, args.seed, args.probe_data_path)
    shared = duplicates({"train": train, **tests}) if run.folder else []
    for line in ("probed on:", *describe(data), *notes, *shared):
        log.line(line)
    how = loading(run, args.num_workers, args.pin_mem, args.dist_timeout)
    view = plain(args.input_size)
    return Probe(train, tests["test"], data.classes, view, normalise, run.place, **how)


def run_identity(
    args: argparse.Namespace, lr: float, global_batch: int, precision: str, data: str
) -> dict[str, object]:
    """What determines the result of a run: a checkpoint of another one is not gone on from."""
    names = ["warmup_epochs", "min_lr", "weight_decay", "clip_grad", "seed", "epochs"]
    names += ["progressive"]
    return {
        "model": args.model,
        **model_options(args),
        **{name: getattr(args, name) for name in names},
        "lr": lr,
        "global_batch": global_batch,
        "amp": precision,
        "data": data,
    }


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
