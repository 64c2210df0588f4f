"""Check the commands in the documentation and turn them into runs that take a second.

A program is a module with `build_parser` and `work`, like the mains, or a script with its own
parser.
"""

import argparse
import importlib
import itertools
import os
import runpy
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

from torch.distributed.run import get_args_parser

import main_finetune
import main_reproduce as reproduce
from runs import CLASSIFIERS, FAMILIES, ROOT, SMALL_FINETUNE, run_here, start_ranks

# Options that "…" at the end of a command stands for; put first, so that the others win.
MORE = {
    "main_pretrain": "--data_path /path/to/images",
    "main_finetune": "--data_path /path/to/RAF-DB --finetune mae_vit_base_300e",
    "main_reproduce": "--data_path /path/to/RAF-DB --finetune mae_vit_base_300e --output_dir OUT",
}
# Options put last, to make the run small; `small` adds those that depend on the model's family.
SMALL = {
    "main_pretrain": "--epochs 1 --warmup_epochs 0 --batch_size 8 --accum_iter 2 --num_workers 0 "
    "--print_freq 1 --save_ckpt_num 1 --compile False",
    "main_finetune": f"{SMALL_FINETUNE} --epochs 1 --warmup_epochs 0 --save_ckpt_num 1",
    "main_pack": "--num_workers 1",
    "main_visualize": "--num_workers 0 --count 2 --batch_size 8 --mask_ratios 0.5",
    "main_predict": "--num_workers 0 --device cpu",
    "util.report": "--output page.html",
}
SMALL["main_reproduce"] = f"{SMALL['main_finetune']} --seeds 0"
PROGRESSIVE = {
    "vit": "--input_size 48 --progressive 32:48",
    "convnext": "--input_size 96 --progressive 64:96",
}
TRAINING = {  # small models by family
    "main_pretrain": {
        "vit": FAMILIES["mae"],
        "convnext": FAMILIES["fcmae"],
        "resnet": FAMILIES["resnet"],
    },
    "main_finetune": CLASSIFIERS,
    "main_reproduce": CLASSIFIERS,
}
WRITES = ("--output", "--output_dir", "--export", "--log_dir", "--annotated", "--features")


class Start(NamedTuple):
    """One of our programs as a command starts it."""

    program: str  # a module
    options: list[str]
    processes: int = 1


def find_start(words: tuple[str, ...]) -> Start | None:
    """The program that a command starts, without its launcher; None if it is not one of ours.

    The launcher's options are checked by its own parser.
    """
    if words[0] == "srun":
        words = list(itertools.dropwhile(lambda word: word.startswith("-"), words[1:]))
    shortened = words[-1] == "…" and words[-2] not in WRITES
    words = ["DATA" if word == "…" else word for word in words[: -1 if shortened else None]]
    processes = 1
    if words[0] == "torchrun" or words[1:3] == ["-m", "torch.distributed.launch"]:
        options = words[1 if words[0] == "torchrun" else 3 :]
        if not any(word.endswith(".py") for word in options):
            options.append("main_pretrain.py")
        launched = get_args_parser().parse_args(options)
        words = [launched.training_script, *launched.training_script_args]
        processes = int(launched.nproc_per_node)
    elif words[0] == "python":
        words = words[2:] if words[1] == "-m" else words[1:]
    program = words[0].removesuffix(".py").replace("/", ".")
    if not source_of(program).is_file():
        return None
    more = MORE.get(program, "").split() if shortened else []
    options = [word.replace("@recipes", f"@{ROOT}/recipes") for word in words[1:]]
    return Start(program, [*more, *options], processes)


def source_of(program: str) -> Path:
    """The file with a program's code: a module, or the `__main__` of a package."""
    path = ROOT / program.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def module_of(program: str) -> ModuleType:
    """The module of a program."""
    source = source_of(program).relative_to(ROOT).with_suffix("")
    return importlib.import_module(".".join(source.parts))


def read(start: Start) -> argparse.Namespace:
    """The options as the program itself reads them. Raises BadInput.

    Empty for a script without `build_parser`: see `check_script`.
    """
    module, options = module_of(start.program), start.options
    if not hasattr(module, "build_parser") or options == ["--help"]:
        return argparse.Namespace()
    if module is reproduce:
        own, options = reproduce.build_parser().parse_known_args(options)
        passed = main_finetune.build_parser().parse(options)
        return passed.but(**vars(own))
    return module.build_parser().parse(options)


def check(start: Start) -> argparse.Namespace:
    """Let the program check and complete its options before its work starts. Raises BadInput."""
    args = read(start)
    training = "main_finetune" if start.program == "main_reproduce" else start.program
    module = module_of(training)
    if start.options == ["--help"]:
        assert module.build_parser().format_help()
    elif hasattr(module, "check_options"):
        module.check_options(args)
    return args


class Parsed(Exception):
    """Raised in a script once it has read its options."""


def check_script(start: Start, monkeypatch) -> None:
    """Run a script until it has read its options. Raises argparse's SystemExit."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(parser, *given):
        parse(parser, *given)
        raise Parsed

    path = source_of(start.program)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    monkeypatch.setattr(sys, "argv", [str(path), *start.options])
    monkeypatch.syspath_prepend(path.parent)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Parsed:
        return
    raise AssertionError(f"{path.name} reads no options")


def small(start: Start) -> Start:
    """The same with options that make the run small, on at most two processes."""
    args, more = read(start), SMALL.get(start.program, "")
    if start.program in TRAINING:
        kind = model_of(start)
        more += f" {TRAINING[start.program][kind]}"
        if getattr(args, "progressive", None):
            more += f" {PROGRESSIVE[kind]}"
        if args.data_path == "synthetic":
            more += " --data_path synthetic:24"
    if start.program == "datasets.synthetic":
        more += "--count 14:7" if args.export else "--rows 2 --cell 32"
    options = [*start.options, *more.split()] if start.options != ["--help"] else start.options
    return start._replace(options=options, processes=min(start.processes, 2))


def model_of(start: Start) -> str:
    """The family of a command's model, by the name that fixtures use."""
    name = getattr(read(start), "model", "") if start.program in TRAINING else ""
    return next((kind for kind in ("convnext", "resnet") if name.startswith(kind)), "vit")


def result(start: Start) -> tuple[object, ...]:
    """A key that is equal for commands that do the same work."""
    args = {name: value for name, value in vars(check(start)).items() if f"--{name}" not in WRITES}
    return start.program, start.processes, repr(sorted(args.items()) or start.options)


def in_places(start: Start, places: dict[str, Path | str]) -> Start:
    """The same with real paths; output paths keep only their last part."""
    before = ["", *start.options]
    options = [
        word.rsplit("/", 1)[-1] if before[i] in WRITES else str(places.get(word, word))
        for i, word in enumerate(start.options)
    ]
    missing = [word for word in options if word.startswith("/path/")]
    assert not missing, f"{missing[0]}: say in `places` of tests/test_docs.py what it is"
    return start._replace(options=options)


def run_start(start: Start, folder: Path, monkeypatch) -> list[int]:
    """Run in a folder, in this process if one is enough; -> the exit codes."""
    module = module_of(start.program)
    monkeypatch.setattr(sys, "argv", [f"{start.program}.py", *start.options])
    monkeypatch.chdir(folder)
    if start.processes > 1:
        ranks = start_ranks(start.program, start.options, before=partial(go_to, folder))
        for rank in ranks:
            rank.join(120)
            rank.kill()
        return [rank.exitcode for rank in ranks]
    if module is reproduce:
        monkeypatch.setattr(
            reproduce, "run_command", lambda words: run_here(main_finetune, words[2:])
        )
        return [reproduce.reproduce(start.options)]
    if start.program == "main_submit":
        stand_in_for_slurm(folder, monkeypatch)
    if not hasattr(module, "build_parser"):
        return [module.main() or 0]
    program = SimpleNamespace(
        build_parser=module.build_parser,
        check_options=getattr(module, "check_options", lambda _: None),
        work=module.work,
    )
    return [run_here(program, start.options)]


def go_to(folder: Path, rank: int) -> None:
    """Change the folder of a rank."""
    os.chdir(folder)


def stand_in_for_slurm(folder: Path, monkeypatch) -> None:
    """Install an `sbatch` that accepts any job."""
    for name in ("sbatch", "srun", "scontrol"):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\necho Submitted batch job 12\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    for name in ("PYTHONPATH", "SUBMITIT_PREEMPT_SIGNAL"):  # main_submit sets them
        monkeypatch.setenv(name, os.environ.get(name, ""))
