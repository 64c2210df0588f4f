"""Export a trained model: ONNX, safetensors, timm, transformers, or the authors' own programs.

    python main_export.py --checkpoint output_dir/checkpoint-best.pth --to onnx --output exported

The result is opened with the other library and must give the same outputs as our model, otherwise
nothing is kept. A model card is written beside it.
"""

import argparse
import importlib.util
import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by python -P

from export.model_card import LICENCE
from util.download import check_classifier
from util.errors import BadInput
from util.files import creating, unusable, write_file
from util.options.groups import TRAINED, add_cache_dir, add_saved
from util.options.parser import Parser
from util.program import run_program

PACKAGES = {  # packages of requirements/export.txt that each format needs
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "safetensors": (),
    "timm": (),
    "hf": ("transformers",),
    "mae-sfer": (),
    "s2d": (),
}


def build_parser() -> Parser:
    """All options."""
    parser = Parser(
        "Export a trained model for other software, and check that it gives the same outputs there."
    )
    add_saved(parser, f"{TRAINED} (required)")
    add_cache_dir(parser)
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        help=f"{', '.join(PACKAGES)} (required); hf: Hugging Face's transformers; mae-sfer: the "
        "original MAE-SFER; s2d: S2D, for videos",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder to write to, new or empty (required)"
    )
    parser.add_argument(
        "--license",
        default="",
        metavar="NAME",
        help="licence of the weights, for the model card, such as mit (default: none stated)",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raises BadInput for options that cannot work, before torch is imported."""
    for name in ("checkpoint", "to", "output"):
        if not getattr(args, name):
            raise BadInput(f"--{name} is missing; see --help")
    if args.to not in PACKAGES:
        raise BadInput(f"--to {args.to}: no such format; choose from {', '.join(PACKAGES)}")
    lacking = [name for name in PACKAGES[args.to] if not importlib.util.find_spec(name)]
    if lacking:
        raise BadInput(
            f"--to {args.to}: needs {', '.join(lacking)}: pip install -r requirements/export.txt"
        )
    if args.license and not re.fullmatch(LICENCE, args.license):
        raise BadInput(
            f"--license {args.license}: must be an identifier such as apache-2.0, cc-by-nc-4.0 "
            "or other"
        )
    if args.classes:
        check_classifier(args.checkpoint, "--classes:")
    check_output(output_folder(args.output))


def output_folder(text: str) -> Path:
    """`--output` as an absolute path, so that even `.` has a name for the temporary folder."""
    return Path(os.path.realpath(os.path.expanduser(text)))


def check_output(folder: Path) -> None:
    """Raises BadInput for anything but a new or empty folder."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"--output {folder}: already exists; name a new folder")
    except OSError as error:
        raise BadInput(f"--output {folder}: cannot be used ({error.strerror})") from None


def work(args: argparse.Namespace) -> None:
    """Export, compare the outputs, write the model card; then move the folder into place."""
    # Only now: --help and wrong options should not have to wait for torch.
    from export.write import card_of, export, note_of
    from models_saved import open_saved
    from util.weights import find_source

    source = find_source(args.checkpoint, args.cache_dir)
    folder = output_folder(args.output)
    with ExitStack() as stack:
        try:
            new = stack.enter_context(creating(folder))
        except OSError as error:
            raise BadInput(f"--output {folder}: {unusable(error)}") from None
        saved = open_saved(source, args.classes)
        print(f"{args.checkpoint}: {saved.name}, {saved.preprocessing.input_size} px", flush=True)
        for line in filter(None, (*saved.notes, note_of(saved, args.to))):
            print(f"note: {line}")
        parity = export(saved, args.to, new)
        write_file(
            new / "README.md",
            card_of(saved, args.to, source=source, parity=parity, folder=new, licence=args.license),
        )
    for line in parity:
        print(f"compared: {line}")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
