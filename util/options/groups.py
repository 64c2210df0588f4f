"""Groups of options that several programs share, and help texts of options that some share."""

import argparse

from util.options.parser import (
    COUNT,
    RATE,
    SEED,
    SIZE,
    Parser,
    add_output_dir,
    bounded,
    class_names,
    flag,
)

# Texts for --help.
DEVICE = "auto, cuda, mps or cpu; auto: a CUDA GPU, else an Apple GPU (mps), else the CPU"
WORKERS = "data-loading processes, 0: none (default: one per CPU core, at most 10)"
TRAINED = "fine-tuned or pre-trained model: a checkpoint file or a released name"
_DATA_SETS = (
    "what --data_path holds: rafdb, affectnet, ferplus, fer2013, folder (a folder per class)"
)
DATA_SET = f"{_DATA_SETS}, list or synthetic; auto recognises it (default: auto)"
UNLABELLED = (
    f"{_DATA_SETS}, list, synthetic or none (no labels); auto recognises it (default: auto)"
)
LABEL_FRACTION = "share of each class's training images to use"
FACE_MARGIN = (
    "AffectNet's 2017 lists: margin added on each side of the face box, as a share of its longer "
    "side"
)
LABEL_RULE = "FERPlus: how votes become labels: argmax, argmax10, unique, majority or votes"
LABEL_ORDER = (
    "classes of numbered folders or labels, in order: A,B,…, or the name of the data set whose "
    "order they have: rafdb, affectnet, ferplus or fer2013"
)


def add_training(
    parser: Parser, min_lr: float | None, warmup_epochs: float | None, usual: dict[str, str]
) -> None:
    """Batches, optimizer and schedule; `usual`: defaults in words, for `--help`."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--batch_size",
        type=SIZE,
        default=64,
        help="images per process (per GPU) and micro-batch (default: %(default)s)",
    )
    group.add_argument(
        "--accum_iter",
        "--update_freq",
        type=SIZE,
        default=1,
        help="micro-batches accumulated per optimizer step (default: %(default)s)",
    )
    group.add_argument(
        "--epochs", type=SIZE, help=f"number of epochs to train (default: {usual['epochs']})"
    )
    group.add_argument(
        "--start_epoch",
        type=COUNT,
        default=0,
        help="epoch at which a new run enters the schedule (default: %(default)s)",
    )
    group.add_argument(
        "--warmup_epochs",
        type=RATE,
        default=warmup_epochs,
        help="epochs of linear learning-rate warm-up, may be a fraction "
        f"(default: {usual['warmup_epochs']})",
    )
    group.add_argument(
        "--blr",
        type=RATE,
        help="base learning rate; the peak is this × images per step / 256 "
        f"(default: {usual['blr']})",
    )
    group.add_argument("--lr", type=RATE, help="peak learning rate; overrides --blr")
    group.add_argument(
        "--min_lr",
        type=RATE,
        default=min_lr,
        help=f"learning rate at the end of the cosine schedule (default: {usual['min_lr']})",
    )
    group.add_argument(
        "--weight_decay",
        type=RATE,
        help="weight decay, not applied to biases, norms, tokens and position embeddings "
        f"(default: {usual['weight_decay']})",
    )
    group.add_argument(
        "--clip_grad",
        type=bounded(float, above=0),
        help="maximum gradient norm, for clipping (default: no clipping)",
    )
    group.add_argument("--seed", type=SEED, default=0, help="random seed (default: %(default)s)")


def add_machine(parser: Parser) -> argparse._ArgumentGroup:
    """Device, precision, workers and processes; -> the group of the first three."""
    group = parser.add_argument_group("device, precision and data loading")
    group.add_argument("--device", default="auto", help=f"{DEVICE} (default: %(default)s)")
    group.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "tf32", "off"),
        default="auto",
        help="bf16 or fp16: mixed precision; tf32: fp32 with TF32 products, CUDA only; off: fp32; "
        "auto: bf16, else fp16, on CUDA GPUs, and fp32 on other devices (default: auto)",
    )
    flag(
        group,
        "--compile",
        False,
        "compile the model's blocks with torch.compile: slower start, faster steps in bf16",
    )
    flag(
        group,
        "--cuda_graph",
        False,
        "launch each forward and backward pass as one CUDA graph: faster if the GPU waits for the "
        "CPU, as with small models or batches",
    )
    flag(
        group,
        "--grad_checkpointing",
        False,
        "recompute activations in the backward pass: saves memory, slows training",
    )
    group.add_argument(
        "--num_workers",
        type=COUNT,
        help="data-loading workers per process, 0: none (default: the process's share of the CPU "
        "cores, at most 10)",
    )
    flag(group, "--pin_mem", True, "pin host memory for faster copies to a GPU (default: True)")
    group.add_argument(
        "--no_pin_mem", dest="pin_mem", action="store_false", help="same as --pin_mem False"
    )
    others = parser.add_argument_group("distributed training (usually set by the launcher)")
    seconds = bounded(float, above=0, high=10**7)
    others.add_argument(
        "--dist_timeout",
        type=seconds,
        default=600,
        help="seconds to wait for other processes before giving up (default: 600)",
    )
    others.add_argument(
        "--dist_url",
        default="env://",
        help="where the processes meet; env:// reads $MASTER_ADDR and $MASTER_PORT (default: "
        "env://)",
    )
    others.add_argument(
        "--world_size",
        type=SIZE,
        default=1,
        help="number of processes; needed only under SLURM's srun (default: %(default)s)",
    )
    others.add_argument(
        "--local_rank",
        type=bounded(int, low=-1),
        default=-1,
        help="rank of this process on its machine; needed only if the launcher sets no LOCAL_RANK",
    )
    flag(
        others,
        "--dist_on_itp",
        False,
        "read ranks from Open MPI's environment variables (set by mpirun)",
    )
    return group


def add_saved(parser: Parser, what: str) -> None:
    """`--checkpoint`, a trained model to use, and the option to open those of other programs."""
    parser.add_argument("--checkpoint", metavar="FILE", help=what)
    parser.add_argument(
        "--classes",
        type=class_names,
        default=(),
        metavar="A,B,…",
        help="class names in the order of the model's outputs, if the checkpoint lacks them",
    )


def add_cache_dir(group: argparse._ActionsContainer) -> None:
    """Where released weights are downloaded to."""
    group.add_argument(
        "--cache_dir",
        metavar="DIR",
        help="folder for downloaded weights (default: $MAE_SFER_CACHE, else ~/.cache/mae_sfer)",
    )


def add_output(parser: Parser, resume: str) -> None:
    """What is written, and resuming; `resume`: the help text of that option."""
    group = parser.add_argument_group("output and resuming")
    parser.has_run = True
    add_output_dir(group)
    group.add_argument(
        "--log_dir", metavar="DIR", help="folder for TensorBoard events (default: --output_dir)"
    )
    group.add_argument(
        "--print_freq",
        type=SIZE,
        default=20,
        metavar="N",
        help="print a log line every N optimizer steps (default: %(default)s)",
    )
    flag(group, "--save_ckpt", True, "save checkpoints (default: True)")
    group.add_argument(
        "--save_ckpt_freq",
        type=SIZE,
        default=1,
        metavar="N",
        help="keep a numbered checkpoint every N epochs, besides the latest (default: %(default)s)",
    )
    group.add_argument(
        "--save_ckpt_num",
        type=COUNT,
        default=3,
        metavar="N",
        help="keep only the newest N numbered checkpoints; 0: all (default: %(default)s)",
    )
    group.add_argument(
        "--save_steps",
        type=COUNT,
        metavar="N",
        help="also save the latest checkpoint every N steps of an epoch; 0: off (default: 500 on "
        "several GPUs, where a failure may leave no time to save, otherwise 0)",
    )
    group.add_argument("--resume", default="", metavar="FILE", help=resume)
    flag(
        group,
        "--auto_resume",
        True,
        "resume from the newest checkpoint in --output_dir, if there is one (default: True)",
    )
    flag(
        group,
        "--override_resume",
        False,
        "resume even if options that affect the result have changed",
    )
    group.add_argument(
        "--profile",
        type=COUNT,
        default=0,
        metavar="N",
        help="trace N steps, after the first ten, to OUTPUT_DIR/trace.json; 0: off (default: "
        "%(default)s)",
    )
