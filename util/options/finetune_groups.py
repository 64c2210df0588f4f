"""Groups of options that only fine-tuning has."""

from util.options.groups import FACE_MARGIN, LABEL_ORDER, LABEL_RULE, add_cache_dir
from util.options.parser import RATE, SHARE, SIZE, SOME, Parser, flag, number
from util.options.trained import INTERPOLATIONS


def add_model(parser: Parser) -> None:
    """What is trained, and what it starts from."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="vit_base_patch16",
        help="vit_{tiny,small,base,large}_patch16, vit_huge_patch14 (mae_vit_… is the same), "
        "convnextv2_{atto,femto,pico,nano,tiny,base,large,huge} or resnet{18,34,50} (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--finetune",
        default="",
        metavar="FILE",
        help="weights to start from, or the model that --eval and --knn test: a checkpoint file or "
        "a released name (python -m util.download --list)",
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
        help="load only weights whose names begin with this, and remove it (default: none)",
    )
    add_cache_dir(group)
    group.add_argument(
        "--input_size",
        type=SIZE,
        default=224,
        help="side length of the images in pixels (default: %(default)s)",
    )
    group.add_argument(
        "--patch_size",
        type=SIZE,
        help="side length of a ViT's patches in pixels (default: 16; huge: 14)",
    )
    group.add_argument(
        "--nb_classes",
        type=SIZE,
        help="number of classes: 7 or 8 for AffectNet (default: 8); other data sets only check it",
    )
    group.add_argument(
        "--drop_path",
        type=number(float, low=0, below=1),
        help="drop-path (stochastic depth) rate (default: ViT 0.1; others, frozen backbones 0)",
    )
    flag(group, "--cls_token", None, "classify by a ViT's class token, not by its mean patch token")
    group.add_argument(
        "--global_pool",
        dest="cls_token",
        action="store_false",
        default=None,
        help="classify by a ViT's mean patch token: the default, same as --cls_token False",
    )
    group.add_argument(
        "--head_init_scale",
        type=RATE,
        default=0.001,
        help="scale of a new ConvNeXt V2 head's weights; ignored with --finetune (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--head_init_std",
        type=number(float, above=0),
        help="standard deviation of a new head's weights (default: with --finetune 2e-5, linear "
        "probe 0.01)",
    )
    flag(group, "--freeze_pos_embed", None, "do not train a ViT's position embedding")
    flag(group, "--freeze_backbone", False, "train only the head (needs --finetune)")
    flag(
        group,
        "--linear_probe",
        False,
        "train only the head by MAE's protocol: batch norm before it, LARS (needs --finetune)",
    )


def add_data(parser: Parser) -> None:
    """What it learns from and is tested on."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="synthetic",
        metavar="PATH",
        help="data set, labelled list, packed store, or synthetic[:TRAIN[:TEST]] for so many "
        "synthetic faces (default: synthetic)",
    )
    group.add_argument(
        "--data_set",
        default="auto",
        metavar="NAME",
        help="what --data_path holds: rafdb, affectnet, ferplus, fer2013, folder (a folder per "
        "class), list, synthetic; auto recognises it (default: auto)",
    )
    group.add_argument(
        "--eval_data_path",
        metavar="PATH",
        help="data set to test on instead, on the classes that both have",
    )
    group.add_argument("--label_rule", metavar="RULE", help=f"{LABEL_RULE} (default: argmax)")
    group.add_argument("--label_order", metavar="ORDER", help=LABEL_ORDER)
    group.add_argument("--face_margin", type=RATE, help=f"{FACE_MARGIN} (default: 0.15)")
    group.add_argument(
        "--label_fraction",
        type=SOME,
        default=1.0,
        help="share of each class's training images to use (default: %(default)s)",
    )
    group.add_argument(
        "--epoch_repeats",
        type=SIZE,
        default=1,
        help="passes over the training images per epoch (default: %(default)s)",
    )
    flag(group, "--balance", None, "draw all classes equally often (default: only for AffectNet)")
    group.add_argument(
        "--select",
        choices=("test", "val"),
        default="test",
        help="split whose accuracy chooses the best epoch (default: %(default)s)",
    )
    group.add_argument(
        "--val_fraction",
        type=number(float, above=0, below=1),
        default=0.1,
        help="share of each class's training images held out for --select val if the data set has "
        "no validation split (default: %(default)s)",
    )


def add_augmentation(parser: Parser) -> None:
    """What is done to images and labels."""
    group = parser.add_argument_group("image augmentation and preprocessing")
    group.add_argument(
        "--aug",
        choices=("fer", "randaug", "none"),
        help="fer: flip, colour jitter, slight shift and zoom, keeps faces whole; randaug: random "
        "crop, flip, RandAugment; none: images as they are (default: randaug)",
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
        "randaug none)",
    )
    group.add_argument(
        "--train_interpolation",
        choices=(*INTERPOLATIONS, "random"),
        help="how training images are resized; random, for randaug only, draws one for each image "
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
        help="test-time centre-crop ratio, a share of the shorter side (default: randaug 0.875, 1 "
        "above 224 px; else the whole image is squeezed into a square)",
    )
    flag(
        group,
        "--imagenet_default_mean_and_std",
        True,
        "normalise pixels by ImageNet's mean and deviation; False: by 0.5 and 0.5 (default: as in "
        "the --finetune checkpoint, else True)",
    )
    group.add_argument(
        "--reprob",
        type=SHARE,
        help="probability of random erasing, per training image (default: fer 0.5, else 0.25)",
    )
    group.add_argument(
        "--remode",
        choices=("pixel", "rand", "const"),
        help="fill erased areas with noise (pixel), one random colour (rand) or the mean colour "
        "(const) (default: fer const, else pixel)",
    )
    group.add_argument(
        "--recount",
        type=SIZE,
        default=1,
        help="largest number of areas erased in an image (default: %(default)s)",
    )
    flag(group, "--resplit", False, "do not erase in the first half of each micro-batch")
    group = parser.add_argument_group("label smoothing, mixup and cutmix")
    group.add_argument(
        "--smoothing", type=number(float, low=0, below=1), help="label smoothing (default: 0.1)"
    )
    group.add_argument(
        "--mixup",
        type=RATE,
        default=0.0,
        metavar="ALPHA",
        help="blend pairs of images; alpha of the beta distribution, 0: off (default: 0)",
    )
    group.add_argument(
        "--cutmix",
        type=RATE,
        default=0.0,
        metavar="ALPHA",
        help="paste an area of one image into another; alpha as for --mixup, 0: off (default: 0)",
    )
    group.add_argument(
        "--cutmix_minmax",
        type=SHARE,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="side length of the pasted area as a share of the image's; replaces --cutmix's alpha",
    )
    group.add_argument(
        "--mixup_prob",
        type=SHARE,
        default=1.0,
        help="probability that mixup or cutmix is applied (default: %(default)s)",
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
        help="mix alike in a whole micro-batch, in each pair of images, or differently for each "
        "image (elem) (default: %(default)s)",
    )


def add_distillation(parser: Parser) -> None:
    """Learning from a trained classifier."""
    group = parser.add_argument_group("pseudo-labels and distillation")
    group.add_argument(
        "--pseudo_labels",
        default="",
        metavar="FILE.csv",
        help="train on these images as well, with the probabilities that main_predict.py wrote",
    )
    group.add_argument(
        "--teacher",
        default="",
        metavar="FILE",
        help="checkpoint of a fine-tuned model to learn from beside the labels",
    )
    group.add_argument(
        "--distill_weight",
        type=SOME,
        help="the teacher's share of the loss; the rest is for the labels (default: 0.5)",
    )
    group.add_argument(
        "--distill_temperature",
        type=number(float, above=0),
        help="softmax temperature of teacher and student (default: 3)",
    )


def add_optimizer(parser: Parser) -> None:
    """What `add_training` does not have of optimizer and schedule."""
    group = parser.add_argument_group("optimizer, schedule and weight average")
    group.add_argument(
        "--opt",
        metavar="NAME",
        help="adamw, lars, or timm's name of another optimizer: adam, sgd, … (default: adamw; "
        "linear probe lars)",
    )
    group.add_argument("--opt_eps", type=RATE, help="the optimizer's epsilon (default: its own)")
    group.add_argument(
        "--opt_betas",
        type=number(float, low=0, below=1),
        nargs="+",
        metavar="BETA",
        help="the optimizer's two betas, such as 0.9 0.95 (default: its own)",
    )
    group.add_argument(
        "--momentum",
        type=number(float, low=0, below=1),
        default=0.9,
        help="momentum of lars, sgd and the like (default: %(default)s)",
    )
    group.add_argument(
        "--layer_decay",
        type=number(float, above=0),
        help="learning rate of a layer relative to the next one, 1: all the same (default: ViT "
        "0.75; others, frozen backbones 1)",
    )
    group.add_argument(
        "--layer_decay_type",
        choices=("single", "group"),
        default="single",
        help="what counts as a layer: each block (single), or one of twelve groups of blocks "
        "(group: ConvNeXt V2 Base and Large) (default: %(default)s)",
    )
    group.add_argument(
        "--weight_decay_end",
        type=RATE,
        help="let the weight decay follow a cosine to this value (default: it stays the same)",
    )
    group.add_argument(
        "--warmup_steps",
        type=number(int, low=-1),
        default=-1,
        help="length of the warm-up in steps; above 0 it replaces --warmup_epochs (default: -1)",
    )
    group.add_argument(
        "--schedule",
        choices=("cosine", "step"),
        default="cosine",
        help="learning rate after the warm-up: a cosine down to --min_lr, or steps down at "
        "--step_epochs (default: %(default)s)",
    )
    group.add_argument(
        "--step_epochs",
        type=RATE,
        nargs="+",
        default=[],
        metavar="EPOCH",
        help="epochs at which --schedule step multiplies the learning rate by --step_factor",
    )
    group.add_argument(
        "--step_factor", type=SHARE, default=0.1, help="see --step_epochs (default: %(default)s)"
    )
    flag(group, "--model_ema", False, "keep an exponential moving average (EMA) of the weights")
    group.add_argument(
        "--model_ema_decay",
        type=SHARE,
        default=0.9999,
        help="the EMA's decay per step; lower it for short runs (default: %(default)s)",
    )
    flag(group, "--model_ema_force_cpu", False, "keep the EMA in main memory")
    flag(group, "--model_ema_eval", False, "evaluate the EMA too, and choose the best epoch by it")
