"""Groups of options that only fine-tuning has."""

from util.options.augmentations import AUGMENTATIONS
from util.options.groups import (
    DATA_SET,
    FACE_MARGIN,
    LABEL_FRACTION,
    LABEL_ORDER,
    LABEL_RULE,
    add_cache_dir,
)
from util.options.parser import RATE, SHARE, SIZE, SOME, Parser, bounded, flag
from util.options.trained import INTERPOLATIONS


def add_model(parser: Parser) -> None:
    """The model, and the weights that it starts from."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="vit_base_patch16",
        help="vit_{tiny,small,base,large}_patch16 or vit_huge_patch14 (also written mae_vit_…), "
        "convnextv2_{atto,femto,pico,nano,tiny,base,large,huge} or resnet{18,34,50} (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--finetune",
        default="",
        metavar="FILE",
        help="weights to start from, or the model to test with --eval or --knn: a checkpoint file "
        "or a released name (see python -m util.download --list)",
    )
    group.add_argument(
        "--model_key",
        default="model|module",
        metavar="A|B|…",
        help="entries of the --finetune file to look for weights in, in this order (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--model_prefix",
        default="",
        metavar="PREFIX",
        help="load only weights whose names begin with this, and strip it from them (default: "
        "none)",
    )
    add_cache_dir(group)
    group.add_argument(
        "--input_size",
        type=SIZE,
        default=224,
        help="side length of the images in pixels (default: that of the --finetune checkpoint, "
        "%(default)s if unknown)",
    )
    group.add_argument(
        "--patch_size",
        type=SIZE,
        help="side length of a ViT's patches in pixels (default: 16; huge: 14)",
    )
    group.add_argument(
        "--nb_classes",
        type=SIZE,
        help="number of classes: 7 or 8 for AffectNet (default: 8); only checked for other data "
        "sets",
    )
    group.add_argument(
        "--drop_path",
        type=bounded(float, low=0, below=1),
        help="drop-path (stochastic depth) rate (default: 0.1 for ViT; 0 for others and with a "
        "frozen backbone)",
    )
    flag(
        group,
        "--cls_token",
        None,
        "classify by a ViT's class token instead of the mean of its patch tokens (default: "
        "only with --linear_probe)",
    )
    group.add_argument(
        "--global_pool",
        dest="cls_token",
        action="store_false",
        default=None,
        help="classify by the mean of a ViT's patch tokens: same as --cls_token False",
    )
    group.add_argument(
        "--head_init_scale",
        type=RATE,
        default=0.001,
        help="factor for the initial weights of ConvNeXt V2's head; ignored with --finetune "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--head_init_std",
        type=bounded(float, above=0),
        help="standard deviation of the head's initial weights (default: 2e-5 with --finetune, "
        "0.01 with --linear_probe)",
    )
    flag(group, "--freeze_pos_embed", None, "do not train a ViT's position embedding")
    flag(
        group,
        "--freeze_backbone",
        False,
        "train only the head, on frozen features (needs --finetune)",
    )
    flag(
        group,
        "--linear_probe",
        False,
        "linear probing as in MAE: train only the head, after a batch norm, with LARS (needs "
        "--finetune)",
    )


def add_data(parser: Parser) -> None:
    """The images and labels for training and testing."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="synthetic",
        metavar="PATH",
        help="data set, labelled list, packed store, or synthetic[:TRAIN[:TEST]] for that many "
        "synthetic faces (default: synthetic, 2000 and 800)",
    )
    group.add_argument(
        "--data_set",
        default="auto",
        metavar="NAME",
        help=DATA_SET,
    )
    group.add_argument(
        "--eval_data_path",
        metavar="PATH",
        help="test on this data set instead of the test images of --data_path; classes are matched "
        "by name",
    )
    group.add_argument("--label_rule", metavar="RULE", help=f"{LABEL_RULE} (default: argmax)")
    group.add_argument("--label_order", metavar="ORDER", help=LABEL_ORDER)
    group.add_argument("--face_margin", type=RATE, help=f"{FACE_MARGIN} (default: 0.15)")
    group.add_argument(
        "--label_fraction",
        type=SOME,
        default=1.0,
        help=f"{LABEL_FRACTION} (default: %(default)s)",
    )
    group.add_argument(
        "--epoch_repeats",
        type=SIZE,
        default=1,
        help="passes over the training images per epoch (default: %(default)s)",
    )
    flag(
        group,
        "--balance",
        None,
        "draw all classes equally often (default: True for AffectNet, else False)",
    )
    group.add_argument(
        "--select",
        choices=("test", "val"),
        default="test",
        help="split whose accuracy chooses the best epoch (default: %(default)s)",
    )
    group.add_argument(
        "--val_fraction",
        type=bounded(float, above=0, below=1),
        default=0.1,
        help="share of each class's training images held out for --select val if the data set has "
        "no validation split (default: %(default)s)",
    )


def add_augmentation(parser: Parser) -> None:
    """Augmentation and preprocessing of images and labels."""
    group = parser.add_argument_group("image augmentation and preprocessing")
    group.add_argument(
        "--aug",
        choices=tuple(AUGMENTATIONS),
        help="fer: flip, colour jitter, slight shift and zoom, made for faces; randaug: random "
        "crop, flip and RandAugment, as for ImageNet; none (default: randaug)",
    )
    group.add_argument(
        "--aa",
        metavar="POLICY",
        help="randaug: timm's augmentation policy; '' for none (default: rand-m9-mstd0.5-inc1)",
    )
    group.add_argument(
        "--crop_scale",
        type=SOME,
        default=0.08,
        help="randaug: smallest random crop, as a share of the image's area (default: %(default)s)",
    )
    group.add_argument(
        "--color_jitter",
        type=RATE,
        help="strength of colour jitter; randaug uses it only with --aa '' (default: fer 0.25, "
        "randaug off)",
    )
    group.add_argument(
        "--train_interpolation",
        choices=(*INTERPOLATIONS, "random"),
        help="how training images are resized; random (randaug only): by either one at random "
        "(default: fer bilinear, else bicubic)",
    )
    group.add_argument(
        "--test_interpolation",
        choices=INTERPOLATIONS,
        help="how test images are resized; stored in checkpoints (default: fer bilinear, else "
        "bicubic)",
    )
    group.add_argument(
        "--crop_pct",
        type=SOME,
        help="test-time centre-crop ratio, a share of the shorter side (default for randaug: "
        "0.875, 1 above 224 px; otherwise no crop: the whole image is squeezed into a square)",
    )
    flag(
        group,
        "--imagenet_default_mean_and_std",
        True,
        "normalise pixels by ImageNet's mean and standard deviation; False: by 0.5 and 0.5 "
        "(default: as in the --finetune checkpoint, else True)",
    )
    group.add_argument(
        "--reprob",
        type=SHARE,
        help="probability of erasing a random area of a training image (default: fer 0.5, else "
        "0.25)",
    )
    group.add_argument(
        "--remode",
        choices=("pixel", "rand", "const"),
        help="fill of erased areas: pixel (noise), rand (one random colour) or const (the mean "
        "colour) (default: fer const, else pixel)",
    )
    group.add_argument(
        "--recount",
        type=SIZE,
        default=1,
        help="maximum number of areas erased per image (default: %(default)s)",
    )
    flag(group, "--resplit", False, "do not erase in the first half of each micro-batch")
    group = parser.add_argument_group("label smoothing, mixup and cutmix")
    group.add_argument(
        "--smoothing", type=bounded(float, low=0, below=1), help="label smoothing (default: 0.1)"
    )
    group.add_argument(
        "--mixup",
        type=RATE,
        default=0.0,
        metavar="ALPHA",
        help="blend images in pairs, with a ratio drawn from Beta(ALPHA, ALPHA); 0: off (default: "
        "0)",
    )
    group.add_argument(
        "--cutmix",
        type=RATE,
        default=0.0,
        metavar="ALPHA",
        help="paste an area of one image into another, its size drawn from Beta(ALPHA, ALPHA); 0: "
        "off (default: 0)",
    )
    group.add_argument(
        "--cutmix_minmax",
        type=SHARE,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="smallest and largest side of the pasted area, as shares of the image's; overrides "
        "--cutmix",
    )
    group.add_argument(
        "--mixup_prob",
        type=SHARE,
        default=1.0,
        help="probability of applying mixup or cutmix (default: %(default)s)",
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=SHARE,
        default=0.5,
        help="probability of cutmix rather than mixup if both are on (default: %(default)s)",
    )
    group.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="draw the mixing ratio per micro-batch (batch), pair of images (pair) or image (elem) "
        "(default: %(default)s)",
    )


def add_distillation(parser: Parser) -> None:
    """Pseudo-labels, and learning from a trained classifier."""
    group = parser.add_argument_group("pseudo-labels and distillation")
    group.add_argument(
        "--pseudo_labels",
        default="",
        metavar="FILE.csv",
        help="CSV file by main_predict.py: train on its images as well, with its probabilities as "
        "labels",
    )
    group.add_argument(
        "--teacher",
        default="",
        metavar="FILE",
        help="checkpoint of a fine-tuned model to learn from in addition to the labels "
        "(distillation)",
    )
    group.add_argument(
        "--distill_weight",
        type=SOME,
        help="weight of the teacher in the loss, at most 1; the labels get the rest (default: 0.5)",
    )
    group.add_argument(
        "--distill_temperature",
        type=bounded(float, above=0),
        help="softmax temperature of teacher and student (default: 3)",
    )


def add_optimizer(parser: Parser) -> None:
    """Optimizer and schedule: the options that `add_training` does not have."""
    group = parser.add_argument_group("optimizer, schedule and weight average")
    group.add_argument(
        "--opt",
        metavar="NAME",
        help="adamw, lars, or another optimizer by timm's name: adam, sgd, … (default: adamw; lars "
        "with --linear_probe)",
    )
    group.add_argument("--opt_eps", type=RATE, help="the optimizer's epsilon (default: its own)")
    group.add_argument(
        "--opt_betas",
        type=bounded(float, low=0, below=1),
        nargs="+",
        metavar="BETA",
        help="the optimizer's two betas, such as 0.9 0.95 (default: its own)",
    )
    group.add_argument(
        "--momentum",
        type=bounded(float, low=0, below=1),
        default=0.9,
        help="momentum of optimizers that have one, such as sgd and lars (default: %(default)s)",
    )
    group.add_argument(
        "--layer_decay",
        type=bounded(float, above=0),
        help="learning rate of each layer relative to the layer after it; 1: no decay (default: "
        "0.75 for ViT; 1 for others and with a frozen backbone)",
    )
    group.add_argument(
        "--layer_decay_type",
        choices=("single", "group"),
        default="single",
        help="what counts as a layer; single: each block; group: 12 groups of blocks, for ConvNeXt "
        "V2 Base and Large (default: %(default)s)",
    )
    group.add_argument(
        "--weight_decay_end",
        type=RATE,
        help="final weight decay, approached along a cosine (default: weight decay stays constant)",
    )
    group.add_argument(
        "--warmup_steps",
        type=bounded(int, low=-1),
        default=-1,
        help="warm-up in optimizer steps; if above 0, it replaces --warmup_epochs (default: -1)",
    )
    group.add_argument(
        "--schedule",
        choices=("cosine", "step"),
        default="cosine",
        help="learning rate after the warm-up: cosine down to --min_lr, or reduced at each of "
        "--step_epochs (step) (default: %(default)s)",
    )
    group.add_argument(
        "--step_epochs",
        type=RATE,
        nargs="+",
        default=[],
        metavar="EPOCH",
        help="with --schedule step: epochs at which the learning rate is multiplied by "
        "--step_factor",
    )
    group.add_argument(
        "--step_factor", type=SHARE, default=0.1, help="see --step_epochs (default: %(default)s)"
    )
    flag(group, "--model_ema", False, "keep an exponential moving average (EMA) of the weights")
    group.add_argument(
        "--model_ema_decay",
        type=SHARE,
        default=0.9999,
        help="decay of the EMA per step; lower it for runs of a few thousand steps (default: "
        "%(default)s)",
    )
    flag(group, "--model_ema_force_cpu", False, "keep the EMA in main memory, to save GPU memory")
    flag(group, "--model_ema_eval", False, "evaluate the EMA too, and choose the best epoch by it")
