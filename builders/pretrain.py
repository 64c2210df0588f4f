"""From the options of pre-training to its parts: model, data, optimizer, pictures, probe."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch.utils.data import DataLoader

from backbones import family_of
from datasets import (
    Images,
    PretrainDataset,
    build_loader,
    open_images,
    open_labelled,
    plain,
    synthetic_size,
)
from datasets.duplicates import duplicate_warnings
from datasets.finetune import choose_splits
from datasets.labelled import describe_labelled
from datasets.sampler import GlobalBatchSampler
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, Normalise
from datasets.unreadable import check_readable
from engine_pretrain import Reconstructions
from engine_train import TrainState
from models_masked import MaskedAutoencoder
from models_registry import create_pretrain_model
from training.precision import Precision
from training.probe import Probe
from training.run import Run, loading, same_everywhere
from util.log import NullLog
from util.optim import adamw, parameter_groups
from util.schedule import resolution_at


class PretrainData(NamedTuple):
    """The images, their order, and the workers that read them."""

    dataset: PretrainDataset
    sampler: GlobalBatchSampler
    loader: DataLoader
    notes: list[str]  # to be printed
    face_margin: float | None  # that faces are cut with; None: images are used whole


def build_model(args: Namespace, run: Run) -> MaskedAutoencoder:
    """The masked autoencoder, on its device."""
    model = create_pretrain_model(args.model, **model_options(args)).to(run.device)
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def model_options(args: Namespace) -> dict[str, object]:
    """Keyword arguments of `create_pretrain_model`."""
    names = ["input_size", "mask_ratio", "norm_pix_loss", "decoder_embed_dim", "decoder_depth"]
    names += family_of(args.model).pretrain_options
    return {name: getattr(args, name) for name in names}


def size_schedule(args: Namespace, patch: int) -> Callable[[int], int]:
    """The resolution of an epoch: always the same, or `--progressive`."""
    low, high = args.progressive or (args.input_size, args.input_size)
    return partial(resolution_at, low=low, high=high, patch=patch, epochs=args.epochs)


def open_data(
    args: Namespace, run: Run, num_patches: int, size_at: Callable[[int], int]
) -> PretrainData:
    """The images of `--data_path`, the same on all ranks."""

    def build() -> Images:
        images = open_images(args.data_path, synthetic_size(args.input_size), args.face_margin)
        check_readable(images.source)
        return images

    what = f"--data_path {args.data_path}"
    images = same_everywhere(what, build, lambda images: images.source.digest)
    dataset = PretrainDataset(
        images.source, args.input_size, patches=num_patches, seed=args.seed, size_at=size_at
    )
    sampler = GlobalBatchSampler(
        len(dataset), args.batch_size, accum=args.accum_iter, process=run.process, seed=args.seed
    )
    loader = build_loader(dataset, sampler, **workers(args, run))
    return PretrainData(
        dataset, sampler, loader=loader, notes=images.notes, face_margin=images.face_margin
    )


def workers(args: Namespace, run: Run) -> dict[str, object]:
    """Settings of data workers, as arguments of the loaders."""
    return loading(run, args.num_workers, args.pin_mem, args.dist_timeout)


def build_state(
    args: Namespace, model: MaskedAutoencoder, lr: float, precision: Precision
) -> TrainState:
    """The model with its optimizer, as in MAE (appendix A.1, table 8)."""
    optimizer = adamw(parameter_groups(model, args.weight_decay), lr, betas=(0.9, 0.95))
    return TrainState(model, optimizer, precision.scaler)


def run_identity(
    args: Namespace, data: PretrainData, lr: float, precision: Precision
) -> dict[str, object]:
    """Everything that determines a run's result: it only resumes a checkpoint with the same."""
    names = ["warmup_epochs", "min_lr", "weight_decay", "clip_grad", "seed", "epochs"]
    names += ["progressive"]
    return {
        "model": args.model,
        **model_options(args),
        **{name: getattr(args, name) for name in names},
        "lr": lr,
        "global_batch": data.sampler.global_batch,
        "amp": precision.name,
        "data": data.dataset.source.digest,
        "images": f"{len(data.dataset):,} images",
    }


def describe_model(
    args: Namespace, run: Run, model: MaskedAutoencoder, precision: Precision
) -> str:
    """A log line about the model."""
    parameters = sum(p.numel() for p in model.parameters())
    predicted = f", {args.predict_ratio:.0%} of those predicted" * (args.predict_ratio < 1)
    return (
        f"{args.model}: {parameters / 1e6:.1f} M parameters with decoder, {args.input_size} px, "
        f"{args.mask_ratio:.0%} of {model.num_patches} patches masked{predicted}; "
        f"{precision.name} on {run.device}, {model.kernels(run.device, precision.dtype)}"
    )


def preprocessing(args: Namespace) -> dict[str, object]:
    """How images are preprocessed in pre-training; stored in checkpoints."""
    return {
        "face_margin": args.face_margin,  # None: images of faces, used whole
        "input_size": args.input_size,
        "crop_pct": None,
        "interpolation": "bicubic",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }


def build_pictures(
    args: Namespace, run: Run, data: PretrainData, normalise: Normalise
) -> Reconstructions | None:
    """Reconstructions drawn while training, on rank 0."""
    if not (run.folder and args.vis_freq):
        return None
    folder = run.output / "figures"
    return Reconstructions(
        data.dataset,
        normalise,
        folder=folder,
        every=args.vis_freq,
        crop_pct=args.crop_pct,
        seed=args.seed,
    )


def build_probe(
    args: Namespace, run: Run, normalise: Normalise, face_margin: float | None, log: NullLog
) -> Probe | None:
    """`--probe_data_path`: tests how well the frozen features predict expressions."""
    if not args.probe_data_path:
        return None
    data = same_everywhere(
        f"--probe_data_path {args.probe_data_path}",
        lambda: open_labelled(
            args.probe_data_path, face_margin=face_margin, size=synthetic_size(args.input_size)
        ),
        lambda data: data.digest,
    )
    train, tests, _, notes = choose_splits(
        data, None, select="test", share=0.1, seed=args.seed, path=args.probe_data_path
    )
    shared = duplicate_warnings({"train": train, **tests}) if run.folder else []
    for line in ("probed on:", *describe_labelled(data), *notes, *shared):
        log.line(line)
    view, how = plain(args.input_size), workers(args, run)
    return Probe(
        train,
        tests["test"],
        classes=data.classes,
        view=view,
        normalise=normalise,
        process=run.process,
        **how,
    )
