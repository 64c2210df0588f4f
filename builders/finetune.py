"""From the options of fine-tuning to its parts: model, sampler, augmentation, loss, evaluator."""

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import nn

import training.run
from backbones import family_of
from builders.labelled_data import FinetuneData
from datasets import (
    Augment,
    LabelledSet,
    PlainImages,
    build_test_loader,
    plain,
)
from datasets.finetune import match_classes
from datasets.sampler import GlobalBatchSampler
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, Normalise
from engine_finetune import (
    ClassifierLoss,
    Evaluator,
    freeze_backbone,
    layer_rates,
    reset_head,
)
from engine_train import TrainState
from models_registry import create_classifier, normalise_head_input
from models_saved import open_classifier
from training.distill import Teacher
from training.evaluate import TestSet
from training.precision import Precision
from training.run import Run, same_everywhere
from util.distributed import ProcessInfo
from util.errors import BadInput
from util.optim import create_optimizer, parameter_groups
from util.options.finetune import DECIDES_RESULT, augmentation, mixes
from util.options.parser import Options
from util.options.trained import difference_lines, differences, trained_with


def build_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """The classifier, newly initialised, on the CPU."""
    family = family_of(args.model)
    own = family.classifier_options(args)
    model = create_classifier(args.model, classes, args.input_size, drop_path=args.drop_path, **own)
    if args.head_init_std is not None:
        reset_head(model, args.head_init_std)
    # With --eval and --knn, the checkpoint decides the model, after options were checked.
    if args.freeze_pos_embed and "freeze_pos_embed" in family.finetune_options:
        model.pos_embed.requires_grad_(False)
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def build_sampler(args: argparse.Namespace, run: Run, data: FinetuneData) -> GlobalBatchSampler:
    """Which training images each step of each process uses."""
    return GlobalBatchSampler(
        len(data.train),
        args.batch_size,
        accum=args.accum_iter,
        process=run.process,
        seed=args.seed,
        balance=data.train.labels if balanced(args, data) else None,
        repeats=args.epoch_repeats,
    )


def balanced(args: argparse.Namespace, data: FinetuneData) -> bool:
    """`--balance`: whether training images of all classes are used equally often."""
    return data.train_set.name == "affectnet" if args.balance is None else args.balance


def run_identity(
    args: argparse.Namespace,
    data: FinetuneData,
    sampler: GlobalBatchSampler,
    lr: float,
    precision: Precision,
    teacher: Teacher | None,
) -> dict[str, object]:
    """Everything that determines a run's result: it only resumes a checkpoint with the same."""
    return {
        **{name: getattr(args, name) for name in DECIDES_RESULT},
        "lr": lr,
        "global_batch": sampler.global_batch,
        "balance": balanced(args, data),
        "joint_jitter": args.aug == "fer",  # earlier releases jittered independently of the shift
        "amp": precision.name,
        "data": data.digest,
        "images": data.counted(),
        "teacher": teacher.digest if teacher else None,
    }


def prepare_head(args: argparse.Namespace, model: nn.Module) -> None:
    """Prepare a model for `--linear_probe` or `--freeze_backbone`, if given."""
    if args.linear_probe:
        normalise_head_input(model)
    if args.linear_probe or args.freeze_backbone:
        freeze_backbone(model)


def build_state(
    args: argparse.Namespace, model: nn.Module, lr: float, scaler: torch.amp.GradScaler
) -> TrainState:
    """The model, which is on its device already, with its optimizer and EMA."""
    ema = None
    if args.model_ema:
        ema_device = "cpu" if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, args.model_ema_decay, device=ema_device)
    rates = layer_rates(model, args.layer_decay, args.layer_decay_type == "group")
    groups = parameter_groups(model, args.weight_decay, rates)
    options = {"betas": args.opt_betas and tuple(args.opt_betas), "eps": args.opt_eps}
    given = {name: value for name, value in options.items() if value is not None}
    optimizer = create_optimizer(args.opt, groups, lr, args.momentum, **given)
    return TrainState(model, optimizer, scaler, ema=ema)


def describe_model(
    args: argparse.Namespace, run: Run, parameters: int, precision: Precision
) -> str:
    """A log line about the model."""
    shape = f"{args.model}: {parameters / 1e6:.1f} M parameters, {args.input_size} px"
    return f"{shape}; {precision.name} on {run.device}"


def build_augment(args: argparse.Namespace) -> Augment:
    """The augmentation of a training image on the CPU; erasing and mixing happen on the device."""
    asked = augmentation(args)
    module, name = asked.build.split(":")
    given = {argument: getattr(args, option) for argument, option in asked.options.items()}
    try:
        return getattr(import_module(module), name)(**given)
    except (AssertionError, ValueError):  # timm cannot parse the policy
        if "aa" not in asked.options.values():
            raise
        raise BadInput(
            f"--aa {args.aa}: not a policy of timm's; use one like rand-m9-mstd0.5-inc1, or ''"
        ) from None


def evaluation_view(args: argparse.Namespace) -> Augment:
    """The preprocessing of images for testing and for frozen features."""
    return plain(args.input_size, args.crop_pct, args.test_interpolation)


def build_teacher(args: Options, run: Run, data: LabelledSet) -> Teacher | None:
    """The classifier of `--teacher`, the same on all ranks, for a student of these data."""
    if not args.teacher:
        return None

    def build() -> Teacher:
        try:
            saved = open_classifier(args.teacher, args.classes)
            teacher = Teacher(
                args.teacher,
                saved,
                classes=data.classes,
                normalise=build_normalise(args, run),
                weight=args.distill_weight,
                temperature=args.distill_temperature,
            )
        except BadInput as error:
            raise BadInput(f"--teacher {error}") from None
        known = trained_with(saved.checkpoint, args.teacher)
        margin = {"face_margin": known["face_margin"]} if "face_margin" in known else {}
        differ = differences(args, margin, data.options)
        teacher.lines += difference_lines(differ, now="taught", before="the teacher was trained")
        return teacher

    return same_everywhere(f"--teacher {args.teacher}", build, lambda teacher: teacher.digest)


def learnt_from(args: Options, data: FinetuneData, teacher: Teacher | None) -> dict[str, str]:
    """What eval.json records about other classifiers that were learnt from."""
    told = {"teacher": f"{teacher.description}; {teacher.digest}"} if teacher else {}
    if data.pseudo_labelled:
        count = f"{data.pseudo_labelled:,} of {len(data.train):,} training images"
        told["pseudo_labels"] = f"{count}, {args.pseudo_labels}"
    return told


def build_loss(
    args: argparse.Namespace, run: Run, classes: int, teacher: Teacher | None = None
) -> ClassifierLoss:
    """Normalisation, random erasing, smoothing, mixup and cutmix, distillation."""
    mix = erase = None
    if mixes(args):
        mix = Mixup(
            args.mixup,
            args.cutmix,
            args.cutmix_minmax,
            args.mixup_prob,
            args.mixup_switch_prob,
            args.mixup_mode,
            label_smoothing=0.0,
            num_classes=classes,
            multi_label=True,
        )
    if args.reprob:
        erase = RandomErasing(
            args.reprob,
            **augmentation(args).erasing,
            mode=args.remode,
            max_count=args.recount,
            num_splits=2 if args.resplit else 0,
            device=run.device,
        )
    return ClassifierLoss(
        build_normalise(args, run), args.smoothing, mix=mix, erase=erase, teacher=teacher
    )


def build_normalise(args: argparse.Namespace, run: Run) -> Normalise:
    """The normalisation of pixels to model input, on the device."""
    return Normalise(*mean_and_std(args)).to(run.device)


def mean_and_std(args: argparse.Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation of pixels: ImageNet's, or Inception's."""
    half = (0.5, 0.5, 0.5)
    return (IMAGENET_MEAN, IMAGENET_STD) if args.imagenet_default_mean_and_std else (half, half)


def preprocessing(args: argparse.Namespace) -> dict[str, object]:
    """How images are preprocessed for this model; stored in its checkpoints."""
    mean, std = mean_and_std(args)
    return {
        "face_margin": args.face_margin,  # None: images of faces, used whole
        "input_size": args.input_size,
        "crop_pct": args.crop_pct,  # None: the whole image, squeezed into a square
        "interpolation": args.test_interpolation,
        "mean": list(mean),
        "std": list(std),
    }


def checkpoint_extras(args: argparse.Namespace, data: LabelledSet) -> dict[str, object]:
    """What a checkpoint holds besides the training state: everything needed to use the model."""
    return {
        "args": vars(args),
        "classes": list(data.classes),
        "trained_on": data.title,
        "evaluated": "model_ema" if args.model_ema_eval else "model",
        "preprocessing": preprocessing(args),
    }


def loading(args: argparse.Namespace, run: Run) -> dict[str, object]:
    """Settings of data workers, as arguments of the loaders."""
    return training.run.loading(run, args.num_workers, args.pin_mem, args.dist_timeout)


def build_evaluator(
    args: argparse.Namespace,
    run: Run,
    data: FinetuneData,
    classes: Sequence[str],
    precision: Precision,
    between: Callable[[], None] = lambda: None,
) -> Evaluator:
    """Evaluates a model of `classes` on the splits of `data`; `between` is as in `collect`."""
    process = run.process if args.dist_eval else ProcessInfo()
    view, tests, notes = evaluation_view(args), {}, []
    for split, images in data.tests.items():
        matched = match_classes(data.owner(split), images, classes)
        dataset = PlainImages(matched.images.source, view)
        loader = build_test_loader(dataset, args.batch_size, process, **loading(args, run))
        tests[split] = TestSet(
            matched.images,
            loader,
            classes=classes,
            common=matched.common,
            unknown=matched.unknown,
            unasked=matched.unasked,
        )
        notes += [f"{split}: {line}" for line in matched.lines()]
    by_ema, flip = args.model_ema_eval, args.eval_flip
    return Evaluator(
        tests,
        args.select,
        by_ema=by_ema,
        normalise=build_normalise(args, run),
        precision=precision,
        flip=flip,
        between=between,
        notes=notes,
    )
