"""The options of fine-tuning: groups, defaults that depend on others, and checks."""

import argparse

from backbones import default_in_words
from util.download import check_classifier
from util.errors import BadInput
from util.evaluation_dir import check_results, holds_run
from util.options.augmentations import AUGMENTATIONS, Augmentation
from util.options.evaluation import add_evaluation, made_by, resolve_evaluation
from util.options.finetune_groups import (
    add_augmentation,
    add_data,
    add_distillation,
    add_model,
    add_optimizer,
)
from util.options.groups import add_machine, add_output, add_training
from util.options.parser import Parser, check_input_size, family_for, fill_defaults, flag
from util.options.trained import INTERPOLATIONS

# MAE's linear probing (appendix A.1), whose only augmentation is crop and flip.
LINEAR_DEFAULTS = {
    "opt": "lars",
    "epochs": 90,
    "warmup_epochs": 10,
    "blr": 0.1,
    "min_lr": 0.0,
    "weight_decay": 0.0,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "smoothing": 0.0,
    "reprob": 0.0,
    "aug": "randaug",
    "aa": "",
    "cls_token": True,
}
# The defaults of shared options in words, for --help.
USUAL = {
    "epochs": f"{default_in_words('epochs', masked=False)}; linear probe 90",
    "warmup_epochs": f"{default_in_words('warmup_epochs', masked=False)}; linear probe 10",
    "blr": f"{default_in_words('blr', masked=False)}; linear probe 0.1",
    "min_lr": "1e-6; linear probe 0",
    "weight_decay": "0.05; linear probe 0",
}
FROZEN_DEFAULTS = {"layer_decay": 1.0, "drop_path": 0.0}
COMMON_DEFAULTS = {
    "opt": "adamw",
    "min_lr": 1e-6,
    "weight_decay": 0.05,
    "smoothing": 0.1,
    "reprob": 0.25,
    "remode": "pixel",
    "aug": "randaug",
    "aa": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "bicubic",
    "test_interpolation": "bicubic",
    "cls_token": False,
    "freeze_pos_embed": False,
}

# The weight is the default of DeiT's code. The temperature is that of soft distillation in DeiT's
# paper, and within the 2.5 to 4 that Hinton et al. found best for small students.
TEACHER_DEFAULTS = {"distill_weight": 0.5, "distill_temperature": 3.0}

# Options that, besides the data and the teacher, determine the result of a run.
DECIDES_RESULT = (
    *("model", "finetune", "model_key", "model_prefix", "input_size", "patch_size", "drop_path"),
    *("cls_token", "head_init_scale", "head_init_std"),
    *("freeze_pos_embed", "freeze_backbone", "linear_probe"),
    *("aug", "aa", "crop_scale", "color_jitter", "train_interpolation", "test_interpolation"),
    *("crop_pct", "epoch_repeats"),
    *("imagenet_default_mean_and_std", "smoothing", "reprob", "remode", "recount", "resplit"),
    *("mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
    *("epochs", "warmup_epochs", "warmup_steps", "min_lr", "schedule", "step_epochs"),
    *("step_factor", "weight_decay", "weight_decay_end", "clip_grad", "seed"),
    *("opt", "opt_eps", "opt_betas", "momentum", "layer_decay", "layer_decay_type"),
    *("model_ema", "model_ema_decay", "model_ema_eval", "select", "eval_flip", "disable_eval"),
    *("distill_weight", "distill_temperature"),
)


def build_parser() -> Parser:
    """All options; those without a default here use one that depends on others."""
    parser = Parser(
        "Fine-tune a pre-trained model on labelled faces, and evaluate it. Options may also come "
        "from a file, such as @recipes/rafdb_vit_base.args; options after it override it."
    )
    add_model(parser)
    add_data(parser)
    add_augmentation(parser)
    add_distillation(parser)
    add_training(parser, min_lr=None, warmup_epochs=None, usual=USUAL)
    add_optimizer(parser)
    add_evaluation(parser)
    machine = add_machine(parser)
    flag(machine, "--use_amp", None, "True: same as --amp auto; False: same as --amp off")
    add_output(parser, "checkpoint to resume from if --output_dir has none")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Fill in defaults that depend on other options, and reject what cannot work."""
    family = family_for(args, masked=False)
    if args.linear_probe:
        fill_defaults(args, LINEAR_DEFAULTS)
    if args.freeze_backbone:
        fill_defaults(args, FROZEN_DEFAULTS)
    fill_defaults(args, augmentation(args).defaults)
    if args.teacher:
        fill_defaults(args, TEACHER_DEFAULTS)
    for defaults in (family.finetune_defaults, COMMON_DEFAULTS):
        fill_defaults(args, defaults)
    if args.finetune:  # as in the official scripts: a small head on pre-trained features
        fill_defaults(args, {"head_init_std": 0.01 if args.linear_probe else 2e-5})
    fill_defaults(args, {"crop_pct": usual_crop(args)})
    # Otherwise, a checkpoint decides the size, and of --eval and --knn also the model.
    if not (args.eval or args.knn) and ("input_size" in args.given or not args.finetune):
        check_input_size(args)
    _check_training(args)
    if args.use_amp is not None:
        wanted = "auto" if args.use_amp else "off"
        if args.amp not in ("auto", wanted):
            raise BadInput(f"--use_amp {args.use_amp}: --amp {args.amp} contradicts it; give one")
        args.amp = wanted
    if not args.output_dir:
        raise BadInput("--output_dir: name a folder to write to")
    if args.classes and not args.eval and (args.knn or not args.teacher):
        raise BadInput(
            "--classes: only for --eval and --teacher; in training the data set names the classes"
        )
    if args.eval or args.knn:
        resolve_evaluation(args)
    else:
        check_classifier(args.teacher, "--teacher")
        if not holds_run(args.output_dir):
            check_results(args.output_dir, made_by(args))


def augmentation(args: argparse.Namespace) -> Augmentation:
    """The one of `--aug`."""
    return AUGMENTATIONS[args.aug or COMMON_DEFAULTS["aug"]]


def usual_crop(args: argparse.Namespace) -> float | None:
    """The default centre-crop ratio for testing; None for the whole image."""
    if not augmentation(args).crops:
        return None
    return 0.875 if args.input_size <= 224 else 1.0


def _check_training(args: argparse.Namespace) -> None:
    if args.start_epoch >= args.epochs:
        raise BadInput(f"--start_epoch {args.start_epoch}: the run ends at --epochs {args.epochs}")
    if mixes(args) and args.batch_size % 2:
        raise BadInput(
            f"--batch_size {args.batch_size}: --mixup and --cutmix pair images; use an even number"
        )
    if augmentation(args).jitters_hue and args.color_jitter > 0.5:
        raise BadInput(
            f"--color_jitter {args.color_jitter:g}: --aug {args.aug} also jitters the hue by this, "
            "which must be at most 0.5"
        )
    if args.train_interpolation == "random" and not augmentation(args).any_interpolation:
        raise BadInput(
            f"--train_interpolation random: not with --aug {args.aug}; choose "
            f"{' or '.join(INTERPOLATIONS)}"
        )
    if args.cutmix_minmax and not 0 < args.cutmix_minmax[0] < args.cutmix_minmax[1]:
        low, high = args.cutmix_minmax
        raise BadInput(f"--cutmix_minmax {low:g} {high:g}: must be 0 < MIN < MAX")
    if args.schedule == "step" and not args.step_epochs:
        raise BadInput(
            "--schedule step: needs the epochs at which the learning rate is reduced, for example "
            "--step_epochs 35 65 95"
        )
    if args.model_ema_eval and not args.model_ema:
        raise BadInput("--model_ema_eval: there is no EMA without --model_ema")
    if args.select == "val" and args.disable_eval:
        raise BadInput("--select val: needs evaluation, which --disable_eval turns off")
    if args.model_ema_eval and args.model_ema_force_cpu:
        raise BadInput(
            "--model_ema_force_cpu: an EMA in main memory cannot be evaluated; leave this out, or "
            "--model_ema_eval"
        )
    for name in TEACHER_DEFAULTS:
        if getattr(args, name) is not None and not args.teacher:
            raise BadInput(f"--{name}: needs a classifier to learn from; name it with --teacher")
    if args.opt_betas and len(args.opt_betas) != 2:
        raise BadInput(f"--opt_betas {args.opt_betas}: takes two numbers")
    if args.linear_probe and args.batch_size == 1:
        raise BadInput(
            "--batch_size 1: the batch norm of --linear_probe needs at least two images; use "
            "--batch_size 2 or more, and a smaller --accum_iter"
        )
    if args.linear_probe and not args.finetune:
        raise BadInput("--linear_probe: needs a trained backbone; name it with --finetune")
    if args.freeze_backbone and not args.finetune:
        raise BadInput("--freeze_backbone: needs a trained backbone; name it with --finetune")
    if (args.freeze_backbone or args.linear_probe) and args.drop_path:
        raise BadInput(f"--drop_path {args.drop_path}: not for a frozen backbone; leave it out")
    if args.knn and not args.finetune:
        raise BadInput("--knn: needs trained features; name a checkpoint with --finetune")
    if (args.knn or args.eval) and args.disable_eval:
        raise BadInput("--disable_eval: contradicts --eval and --knn; leave it out")


def mixes(args: argparse.Namespace) -> bool:
    """Whether images are mixed with each other."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)
