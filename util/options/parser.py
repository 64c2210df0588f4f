"""Command-line options: the parser, checked types, and groups of shared options as one value.

Needs only the standard library, so that `--help` and mistyped flags are answered at once.
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from backbones import families_with, family_of, own_options
from backbones.family import OWN_OPTIONS, Family
from util.distributed import Launch
from util.errors import BadInput
from util.wording import did_you_mean

UNSET = object()


class Options(argparse.Namespace):
    """Options by name. `given`, itself not an option, names those on the command line."""

    __slots__ = ("given",)

    def __init__(self, given: frozenset[str] = frozenset(), **options: object) -> None:
        super().__init__(**options)
        self.given = given

    def but(self, **changes: object) -> "Options":
        """A copy with some options changed, as if by other defaults."""
        return Options(self.given, **{**vars(self), **changes})


def program_name() -> str:
    """The running program, for usage and errors. argparse calls any package `__main__.py`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and spec.name.startswith("util."):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return os.path.basename(sys.argv[0])


class Help(argparse.HelpFormatter):
    """Says of every option what it is by default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = any(word in (action.help or "") for word in ("default", "required", "same as"))
        if told or not action.option_strings or isinstance(action, argparse._HelpAction):
            return action.help
        default = "off" if action.type is boolean else "none"
        return f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """Flags spelled with `_` or `-`, options files (`@recipe.args`), errors as BadInput."""

    def __init__(self, description: str, **options: bool) -> None:
        own = {"allow_abbrev": False, "fromfile_prefix_chars": "@", "formatter_class": Help}
        super().__init__(prog=program_name(), description=description, **own, **options)
        self.has_run = False  # whether the program writes a run, with status.json, to --output_dir

    def format_help(self) -> str:
        """The help, with a usage of one line: the options, over a hundred, are listed below it."""
        words = [self.prog, "[OPTION …]"]
        for action in self._actions:
            value = action.metavar or action.dest.upper()
            if not action.option_strings:
                words.append(value if action.nargs is None else f"{value} …")
            elif action.required:
                words.append(f"{action.option_strings[0]} {value}")
        self.usage = " ".join(words)
        return super().format_help()

    def parse(self, argv: Sequence[str]) -> Options:
        """Parse; raises BadInput that names the flag and, for an unknown one, the most similar."""
        args, unknown = self.parse_known(argv)
        if unknown and not unknown[0].startswith("-"):
            raise BadInput(self._surplus(argv, unknown[0]))
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            hint = did_you_mean(flag, known, most=2, cutoff=0.6) or "see --help"
            raise BadInput(f"{flag}: no such option; {hint}")
        return args

    def _surplus(self, argv: Sequence[str], value: str) -> str:
        """The message about a value that no option takes."""
        before = list(argv[: argv.index(value)]) if value in argv else []
        flags = [arg for arg in before if arg.startswith("--")]
        if not flags or "=" in flags[-1]:
            return f"{value}: belongs to no option; see --help"
        values = " ".join([*before[before.index(flags[-1]) + 1 :], value])
        return f"{flags[-1]} {values}: takes one value; see --help"

    def parse_known(self, argv: Sequence[str]) -> tuple[Options, list[str]]:
        """parse_known_args; raises BadInput for anything wrong with an options file."""
        files = ", ".join(arg for arg in argv if arg.startswith("@"))
        # Positional arguments in several places need argparse's intermixed parsing, which cannot
        # handle `--`.
        several = any(action.nargs == "+" for action in self._get_positional_actions())
        mixed = several and "--" not in argv
        parse = self.parse_known_intermixed_args if mixed else self.parse_known_args
        stored = argparse._StoreAction, argparse._StoreConstAction  # no append, count, …
        named = [a for a in self._actions if a.option_strings and isinstance(a, stored)]
        flags = {action.dest: action.default for action in named}
        try:
            # An option that still has this value afterwards was not given.
            unset = Options(**dict.fromkeys(flags, UNSET))
            args, unknown = parse([underscored(arg) for arg in argv], unset)
        except BadInput:
            raise
        except RecursionError:
            raise BadInput(f"{files}: options files that include each other") from None
        except ValueError as error:  # not text, an open quotation, a NUL in its name
            raise BadInput(f"{files}: is not a valid options file ({error})") from None
        args.given = frozenset(name for name in flags if getattr(args, name) is not UNSET)
        fill = {name: value for name, value in flags.items() if name not in args.given}
        vars(args).update(fill)
        for name, value in vars(args).items():
            texts = value if isinstance(value, list) else [value]
            if any(isinstance(text, str) and "\0" in text for text in texts):
                raise BadInput(f"--{name}: contains a NUL character")
        return args, unknown

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """A line of an options file: shell quoting, `#` comments, several options per line."""
        return [underscored(arg) for arg in shlex.split(arg_line, comments=True)]

    def error(self, message: str) -> None:
        """Raise BadInput instead of printing the usage."""
        raise BadInput(message.removeprefix("argument "))


def underscored(arg: str) -> str:
    """`--data-path=a-b` -> `--data_path=a-b`; values, such as `"--epochs 3"`, are left alone."""
    name, equals, value = arg.partition("=")
    if not name.startswith("--") or any(map(str.isspace, name)):
        return arg
    return "--" + name[2:].replace("-", "_") + equals + value


def find_output_dir(argv: Sequence[str]) -> str:
    """`--output_dir` of a run, even if something else on the command line is wrong.

    "" for an evaluation, which does not write to the folder of a run.
    """
    parser = Parser("", add_help=False)  # the program prints the help
    add_output_dir(parser)
    for name in ("--eval", "--knn"):
        flag(parser, name, False, "")
    try:
        args, _ = parser.parse_known(argv)
    except BadInput:
        return ""
    return "" if args.eval or args.knn else args.output_dir


# --- types: their errors name what is expected and what was given ---

MOST = 10**9  # of any count, so that a product of two fits into 64 bits


def bounded(
    kind: Callable[[str], float],
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Callable[[str], float]:
    """A finite int or float with `low <= value <= high` and `above < value < below`."""
    word = "a whole number" if kind is int else "a number"
    bounds = ((">=", low), ("<=", high), (">", above), ("<", below))
    word += " and".join(f" {sign} {bound:,.10g}" for sign, bound in bounds if math.isfinite(bound))

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if kind is int and value > MOST and high == math.inf:
            raise argparse.ArgumentTypeError(f"must be at most {MOST:,}, not {text!r}")
        # Compared before isfinite, which fails for an int beyond the range of floats.
        if not (low <= value <= high and above < value < below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {word}, not {text!r}")
        return value

    return convert


def boolean(text: str) -> bool:
    """True/False, yes/no, 1/0, on/off."""
    words = {"true": True, "yes": True, "1": True, "on": True}
    words |= {"false": False, "no": False, "0": False, "off": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return words[text.lower()]


def rise(text: str) -> tuple[int, int]:
    """LOW:HIGH, two whole numbers, the second one larger."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 0 < int(low) < int(high)):
        raise argparse.ArgumentTypeError(f"must be LOW:HIGH, such as 128:224, not {text!r}")
    return int(low), int(high)


def class_names(text: str) -> tuple[str, ...]:
    """A,B,…: names, without the blanks around them."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names separated by commas, not {text!r}")
    return names


SEED = bounded(int, low=0, high=2**63 - 1)
COUNT, SIZE, RATE = bounded(int, low=0), bounded(int, low=1), bounded(float, low=0)
RATIO, SOME = bounded(float, above=0, below=1), bounded(float, above=0, high=1)
SHARE = bounded(float, low=0, high=1)


def flag(group: argparse._ActionsContainer, name: str, default: bool | None, text: str) -> None:
    """Add a boolean option, accepted bare and as True/False."""
    group.add_argument(
        name,
        type=boolean,
        nargs="?",
        const=True,
        default=default,
        metavar="True|False",
        help=text,
    )


# --- shared options, and groups of them as one value ---


def add_output_dir(group: argparse._ActionsContainer) -> None:
    """Add the one option that `find_output_dir` also needs."""
    group.add_argument(
        "--output_dir",
        default="./output_dir",
        metavar="DIR",
        help="folder for checkpoints, logs, figures and results (default: %(default)s)",
    )


def launch(args: argparse.Namespace) -> Launch:
    """The options about device and processes, as one value."""
    return Launch(
        args.device,
        args.world_size,
        local_rank=args.local_rank,
        dist_on_itp=args.dist_on_itp,
        dist_url=args.dist_url,
        dist_timeout=args.dist_timeout,
    )


class Saving(NamedTuple):
    """What is written during a run, under the options' own names."""

    save_ckpt: bool
    save_ckpt_freq: int
    save_ckpt_num: int
    save_steps: int | None
    print_freq: int
    profile: int


class ResumeOptions(NamedTuple):
    """Where a run starts, under the options' own names."""

    auto_resume: bool
    resume: str
    override_resume: bool
    start_epoch: int


def saving(args: argparse.Namespace) -> Saving:
    """The options about what is written, as one value."""
    return Saving(
        args.save_ckpt,
        args.save_ckpt_freq,
        save_ckpt_num=args.save_ckpt_num,
        save_steps=args.save_steps,
        print_freq=args.print_freq,
        profile=args.profile,
    )


def resume_options(args: argparse.Namespace) -> ResumeOptions:
    """The options about where to start, as one value."""
    return ResumeOptions(args.auto_resume, args.resume, args.override_resume, args.start_epoch)


def family_for(args: argparse.Namespace, masked: bool) -> Family:
    """The family of --model. Raises BadInput for options that it does not have."""
    family = family_of(args.model, masked)
    for name, unset in OWN_OPTIONS.items():
        given = getattr(args, name, unset)
        if given != unset and name not in own_options(family, masked):
            whose = families_with(name, masked)
            raise BadInput(f"--{name}: not an option of {args.model}, only of {whose}")
    family.check(args)
    return family


def check_input_size(args: argparse.Namespace, masked: bool = False) -> None:
    """Raises BadInput unless the side length is a multiple of the model's patch size."""
    patch = family_of(args.model).patch_step(args.model, args.patch_size, masked)
    if args.input_size % patch:
        nearest = max(1, round(args.input_size / patch)) * patch
        raise BadInput(
            f"--input_size {args.input_size}: not a multiple of the patch size, {patch}; "
            f"try {nearest}"
        )


def fill_defaults(args: argparse.Namespace, defaults: dict[str, object]) -> None:
    """Set options that are still None to their defaults."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
