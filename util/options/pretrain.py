"""The options of pre-training: groups, defaults that depend on others, and checks."""

import argparse

from backbones import default_in_words
from util.errors import BadInput
from util.options.groups import FACE_MARGIN, add_machine, add_output, add_training
from util.options.parser import (
    COUNT,
    RATE,
    RATIO,
    SIZE,
    SOME,
    Parser,
    check_input_size,
    family_for,
    fill_defaults,
    flag,
    rise,
)
from util.patch_counts import visible_patches

# The defaults of shared options in words, for --help.
USUAL = {
    "epochs": default_in_words("epochs", masked=True),
    "warmup_epochs": "40",
    "blr": default_in_words("blr", masked=True),
    "min_lr": "0",
    "weight_decay": "0.05",
}


def build_parser() -> Parser:
    """All options; those without a default here use the default of the model's family."""
    parser = Parser(
        "Pre-train a ViT (MAE), ConvNeXt V2 (FCMAE) or ResNet on face images by masking patches. "
        "Options may also come from a file, such as @recipes/pretrain_mae_vit_base.args; options "
        "after it override it."
    )
    _add_model(parser)
    _add_data(parser)
    add_training(parser, min_lr=0.0, warmup_epochs=40, usual=USUAL)
    add_machine(parser)
    add_output(
        parser,
        "checkpoint to resume from if --output_dir has none, or weights (a file or a released "
        "name) to start a new schedule with",
    )
    _add_monitoring(parser)
    return parser


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="mae_vit_base_patch16",
        help="mae_vit_{tiny,small,base,large}_patch16, mae_vit_huge_patch14, "
        "convnextv2_{atto,femto,pico,nano,tiny,base,large,huge} or resnet{18,34,50} (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--input_size",
        type=SIZE,
        default=224,
        help="side length of the images in pixels (default: %(default)s)",
    )
    group.add_argument(
        "--progressive",
        type=rise,
        metavar="LOW:HIGH",
        help="start with smaller images, for speed: side length LOW pixels, growing to HIGH (which "
        "must be --input_size) for the last third of the epochs",
    )
    group.add_argument(
        "--patch_size",
        type=SIZE,
        help="side length of a patch in pixels, for ViT (default: 16; huge 14) or ResNet (8, 16 or "
        "32; default: 32)",
    )
    group.add_argument(
        "--mask_ratio",
        type=RATIO,
        help="share of the patches that are masked (default: MAE 0.75, others 0.6)",
    )
    group.add_argument(
        "--predict_ratio",
        type=SOME,
        default=1.0,
        help="MAE: share of the masked patches to predict; less is faster (default: %(default)s)",
    )
    flag(
        group,
        "--norm_pix_loss",
        None,
        "predict each patch's pixels normalised by their own mean and deviation (default: MAE "
        "False, others True)",
    )
    group.add_argument(
        "--decoder_embed_dim",
        type=SIZE,
        default=512,
        help="width of the decoder, in channels (default: %(default)s)",
    )
    group.add_argument(
        "--decoder_depth",
        type=SIZE,
        help="number of blocks in the decoder (default: MAE 8, others 1)",
    )
    group.add_argument(
        "--decoder_num_heads",
        type=SIZE,
        help="number of attention heads in MAE's decoder (default: 16)",
    )


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="synthetic",
        metavar="PATH",
        help="folder of images, list of files, labelled data set, packed store, or "
        "synthetic[:COUNT] for that many synthetic faces (default: synthetic, 10,000)",
    )
    group.add_argument("--face_margin", type=RATE, help=f"{FACE_MARGIN} (default: 0.15)")


def _add_monitoring(parser: Parser) -> None:
    group = parser.add_argument_group("monitoring")
    group.add_argument(
        "--vis_freq",
        type=COUNT,
        default=10,
        metavar="N",
        help="draw reconstructions every N epochs and after the last; 0: never (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--crop_pct",
        type=SOME,
        help="centre-crop ratio of the reconstructed images, a share of the shorter side; training "
        "ignores it (default: 0.875; 1 above 224 px)",
    )
    group.add_argument(
        "--probe_data_path",
        metavar="PATH",
        help="labelled data set to test the frozen features on, by kNN and a linear classifier",
    )
    group.add_argument(
        "--probe_freq",
        type=SIZE,
        default=10,
        metavar="N",
        help="run this test every N epochs and after the last (default: %(default)s)",
    )


def check_options(args: argparse.Namespace) -> None:
    """Fill in the family's defaults and reject what cannot work, before torch is imported."""
    family = family_for(args, masked=True)
    fill_defaults(args, family.pretrain_defaults)
    family.check_pretraining(args)
    crop_pct = 0.875 if args.input_size <= 224 else 1.0
    fill_defaults(args, {"weight_decay": 0.05, "crop_pct": crop_pct})
    patch = family.patch_step(args.model, args.patch_size, masked=True)
    check_input_size(args, masked=True)
    visible_patches((args.input_size // patch) ** 2, args.mask_ratio)
    check_progressive(args, patch)
    if args.start_epoch >= args.epochs:
        raise BadInput(f"--start_epoch {args.start_epoch}: the run ends at --epochs {args.epochs}")
    if not args.output_dir:
        raise BadInput("--output_dir: name a folder to write to")


def check_progressive(args: argparse.Namespace, patch: int) -> None:
    """Reject resolutions that the model cannot use."""
    if args.progressive is None:
        return
    low, high = args.progressive
    flag = f"--progressive {low}:{high}"
    if high != args.input_size:
        raise BadInput(f"{flag}: must end at --input_size {args.input_size}; change one of them")
    if low % patch:
        nearest = min(high - patch, max(1, round(low / patch)) * patch)
        raise BadInput(f"{flag}: {low} is not a multiple of the patch size, {patch}; try {nearest}")
    try:
        visible_patches((low // patch) ** 2, args.mask_ratio)
    except BadInput as error:
        raise BadInput(f"{flag}: at {low} px, {error}; start higher") from None
