"""The options of `--eval` and `--knn`: which checkpoint is tested, and where its results go."""

import os
from typing import Any

from util.download import check_classifier
from util.errors import BadInput
from util.evaluation_dir import (
    check_results,
    comparable_path,
    evaluation_folder,
    own_checkpoint,
    own_folder,
)
from util.options.parser import Options, Parser, class_names, flag
from util.options.trained import OF_DATA, OF_IMAGES

# Options that make it a different evaluation if given; with --knn, also those that choose the
# training images.
EVALUATED_BY = (
    *OF_IMAGES,
    *OF_DATA,
    *("cls_token", "aug", "data_set", "classes", "model_key", "model_prefix"),
)
NEIGHBOURS_BY = ("label_fraction", "select", "val_fraction", "seed")


def add_evaluation(parser: Parser) -> None:
    """Add the group to the parser of fine-tuning."""
    group = parser.add_argument_group("evaluation")
    flag(
        group,
        "--eval",
        False,
        "only evaluate: test the model of --finetune, else the best checkpoint in --output_dir",
    )
    flag(
        group,
        "--knn",
        False,
        "only evaluate: k-nearest-neighbour classification on the --finetune model's features",
    )
    group.add_argument(
        "--classes",
        type=class_names,
        default=(),
        metavar="A,B,…",
        help="class names in the order of the model's outputs, if the checkpoint of --eval or "
        "--teacher lacks them",
    )
    flag(group, "--eval_flip", False, "average the predictions for an image and its mirror image")
    flag(
        group,
        "--dist_eval",
        True,
        "divide the test images among the processes; results are the same (default: True)",
    )
    flag(group, "--disable_eval", False, "train without evaluation: no results, no best epoch")


def resolve_evaluation(args: Options) -> None:
    """Set `args.finetune` to the checkpoint to test, `args.output_dir` to the results' folder.

    Raises BadInput for combinations that `--eval` and `--knn` do not support.
    """
    if args.eval and args.knn:
        raise BadInput("--knn: does not use the head that --eval tests; give only one")
    if args.knn and args.eval_flip:
        raise BadInput("--eval_flip: --knn does not flip images; leave it out")
    if args.eval and args.finetune and args.resume:
        raise BadInput("--resume: --finetune names the checkpoint to evaluate; give only one")
    given = args.output_dir if "output_dir" in args.given else None
    if args.eval:
        args.finetune = args.finetune or args.resume or own_checkpoint(args.output_dir)
        if not args.finetune:
            what = f"{args.output_dir} holds no checkpoint; name one with --finetune"
            raise BadInput(f"--eval: {what}")
        check_classifier(args.finetune, "--eval --finetune")
    named = {name: os.path.basename(str(value)) for name, value in _given(args).items()}
    tested = args.eval_data_path or args.data_path
    args.output_dir = evaluation_folder(
        _kind(args), args.finetune, data_path=tested, output_dir=given, options=named
    )
    by = made_by(args)
    if args.output_dir != given:
        args.output_dir = own_folder(args.output_dir, by)
    check_results(args.output_dir, by)


def made_by(args: Options) -> dict[str, Any]:
    """The origin of results: the kind of run, and what makes an evaluation a different one."""
    if not (args.eval or args.knn):
        return {"kind": "training"}
    return {
        "kind": _kind(args),
        "checkpoint": comparable_path(args.finetune, args.output_dir),
        "data": comparable_path(args.eval_data_path or args.data_path),
        "options": _given(args),
    }


def _kind(args: Options) -> str:
    return "knn" if args.knn else "eval"


def _given(args: Options) -> dict[str, Any]:
    """The options on the command line that make an evaluation a different one."""
    names = EVALUATED_BY + NEIGHBOURS_BY * args.knn
    given = {name: getattr(args, name) for name in names if name in args.given}
    if args.knn and args.eval_data_path:
        given["data_path"] = comparable_path(args.data_path)  # the training images
    if args.amp != "auto":
        given["amp"] = args.amp
    given = {name: ",".join(v) if isinstance(v, tuple) else v for name, v in given.items()}
    return {name: v for name, v in given.items() if v is not None and v != "auto"}
