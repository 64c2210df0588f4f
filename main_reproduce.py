"""Run a recipe with several seeds and compare mean ± standard deviation with the published number.

    python main_reproduce.py @recipes/rafdb_vit_base.args --seeds 0 1 2 \\
        --data_path … --finetune … --output_dir OUT [--processes N] [any option of main_finetune.py]

Each seed is a run of its own in OUT/seed-N. Finished runs are not repeated, so the same command
resumes an interrupted series. The results are in OUT/summary.json and OUT/report.html.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by python -P

from util.errors import BAD_INPUT, DONE, FAULT, RESUMABLE, BadInput
from util.files import write_json
from util.options.parser import COUNT, SIZE, Parser, underscored
from util.safe_json import parse_object, part, read_text
from util.stop import handle_signals
from util.streams import lasting_streams
from util.summary import METRICS, SEED, Group, Spread, conditions, group_runs, is_finished

MAIN = Path(__file__).resolve().parent / "main_finetune.py"
PUBLISHED = re.compile(r"\s*#\s*Published:\s*(.+?)\s*")
NUMBER = re.compile(r"(accuracy|UAR|macro-F1)\s+([\d.]+(?: or [\d.]+)?)\s*%", re.IGNORECASE)
LAUNCHER = "torch.distributed.run"
STATUS = {"bad_input": BAD_INPUT, "resumable": RESUMABLE}


def build_parser() -> Parser:
    """The options of this program; all others are passed on to main_finetune.py."""
    parser = Parser(
        "Run main_finetune.py with several seeds and compare mean and standard deviation with the "
        "published number. Put a recipe, @recipes/NAME.args, first; all other options are passed "
        "on to main_finetune.py. Run the same command again to continue after an interruption."
    )
    parser.fromfile_prefix_chars = None  # a recipe is passed on, too
    parser.add_argument(
        "--seeds",
        type=COUNT,
        nargs="+",
        default=[0, 1, 2],
        metavar="SEED",
        help="random seeds, one run each (default: 0 1 2)",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        metavar="DIR",
        help="folder for the results; each run is in its subfolder seed-N (required)",
    )
    parser.add_argument(
        "--processes",
        type=SIZE,
        default=1,
        help="processes per run, started with torchrun: one per GPU (default: %(default)s)",
    )
    return parser


def reproduce(argv: Sequence[str]) -> int:
    """Run all unfinished seeds, then print a summary.

    Returns the exit code of the first run that does not finish, or 0. Raises BadInput for options
    that cannot work, OSError when OUT cannot be written.
    """
    args, passed = build_parser().parse_known_args([underscored(arg) for arg in argv])
    if any(arg.partition("=")[0] == "--seed" for arg in passed):
        raise BadInput("--seed: give all seeds to --seeds")
    if len(set(args.seeds)) < len(args.seeds):
        raise BadInput(f"--seeds {' '.join(map(str, args.seeds))}: give each seed once")
    options, published = expand(passed)
    options["--processes"] = str(args.processes)
    output = Path(args.output_dir)
    check_same_options(output / "summary.json", options)
    for seed in args.seeds:
        code = run_seed(passed, seed, output / f"seed-{seed}", args.processes)
        if code != DONE:
            return code
        # After each seed, so that an interrupted series has a summary, too.
        group = write_summary(output, options, published)
    print("\n".join(result_table(group, published)))
    tell(f"report: {write_page(output, group)}")
    return DONE


def expand(passed: Sequence[str]) -> tuple[dict[str, str], str]:
    """The options of a run with recipes expanded, and the published results that a recipe names.

    The last value of an option counts. Raises BadInput for a recipe that cannot be read.
    """
    options, published, name = {}, "", ""
    for arg in passed:
        words = [arg]
        if arg.startswith("@"):
            try:
                lines = Path(arg[1:]).read_text("utf-8").splitlines()
                parser = build_parser()
                words = [word for line in lines for word in parser.convert_arg_line_to_args(line)]
            except (OSError, ValueError) as error:
                raise BadInput(f"{arg[1:]}: cannot be read as a recipe ({error})") from None
            found = [match[1] for line in lines if (match := PUBLISHED.fullmatch(line))]
            published = published or next(iter(found), "")
        for word in words:
            if word.startswith("--"):
                name, _, options[name] = word.partition("=")
            else:
                options[name] = f"{options.get(name, '')} {word}".strip()
    return options, published


def check_same_options(summary: Path, options: dict[str, str]) -> None:
    """Raises BadInput if the seeds in OUT were run with other options: they have no common mean."""
    then = part(parse_object(read_text(summary)), "options")
    names = [name for name in {**then, **options} if then.get(name) != options.get(name)]
    if then and names:
        words = [
            "; ".join(
                f"{name} {of[name]}".strip() if name in of else f"no {name}" for name in names
            )
            for of in (then, options)
        ]
        raise BadInput(
            f"{summary}: its runs had {words[0]}, now {words[1]}; name another --output_dir, or "
            "remove that file if the difference does not matter"
        )


def run_seed(passed: Sequence[str], seed: int, folder: Path, processes: int) -> int:
    """Run one seed, unless it is already finished. Prints a failure; returns the exit code."""
    if is_finished(folder):
        tell(f"seed {seed}: already finished, in {folder}")
        return DONE
    launcher = [
        "-m",
        LAUNCHER,
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    command = [sys.executable, *(launcher if processes > 1 else []), str(MAIN), *passed]
    status = folder / "status.json"
    if status.is_file():
        status.unlink()  # from an earlier attempt
    tell(f"seed {seed}: {folder}")
    code = run_command([*command, "--seed", str(seed), "--output_dir", str(folder)])
    if code == FAULT and processes > 1:  # torchrun exits with 1 for any failure
        code = STATUS.get(str(parse_object(read_text(status)).get("status")), FAULT)
    if code == RESUMABLE:
        tell(f"seed {seed}: stopped; the same command resumes from there (exit code {code})")
    elif code != DONE:
        tell(f"seed {seed}: {MAIN.name} ended with exit code {code}; see above")
    elif not is_finished(folder):
        tell(f"seed {seed}: {MAIN.name} left no results in {folder / 'eval.json'}")
        code = FAULT
    return code


def run_command(command: Sequence[str]) -> int:
    """Run a command and return its exit code; RESUMABLE if it finished although asked to stop.

    Requests to stop are left to the run, which saves first: the first one is passed on as SIGTERM.
    Ctrl-C reaches it anyway; but a launcher is kept away from the terminal, since a second signal
    would end it before its processes have saved.
    """
    asked, launcher = [], LAUNCHER in command

    def stop(number: int, _frame: FrameType | None) -> None:
        if not asked and (launcher or number != signal.SIGINT):
            child.terminate()
        asked.append(number)

    child = subprocess.Popen(command, start_new_session=launcher)
    before = handle_signals(stop)
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code < 0:
        return 128 - code  # ended by a signal, reported as shells do
    return RESUMABLE if asked and code == DONE else code


def write_summary(output: Path, options: dict[str, str], published: str) -> Group:
    """Write OUT/summary.json from all finished seeds in OUT, and return these."""
    seeds = [folder for folder in output.iterdir() if SEED.fullmatch(folder.name)]
    (group,) = group_runs([folder for folder in seeds if is_finished(folder)])

    def spreads(of: Callable[[str], Spread | None]) -> dict[str, dict]:
        return {
            metric: {"mean": spread.mean, "deviation": spread.deviation, "values": spread.values}
            for metric in METRICS
            if (spread := of(metric))
        }

    summary = {
        "options": options,
        "test": conditions(group.results),
        "seeds": group.seeds,
        "best": spreads(group.spread),
        "last": spreads(group.last),
        "published": published,
    }
    write_json(output / "summary.json", summary)
    return group


def result_table(group: Group, published: str) -> list[str]:
    """The lines of a table in %: mean ± deviation and single values, of the best and last epoch,
    and the published results.
    """
    rows = [["", *METRICS.values()]]
    for name, of in (("best epoch", group.spread), ("last epoch", group.last)):
        if None in (spreads := [of(metric) for metric in METRICS]):
            continue
        rows.append([name, *(spread.show() for spread in spreads)])
        for i, seed in enumerate(group.seeds):
            rows.append([f"  seed {seed}", *(f"{spread.values[i]:.2f}" for spread in spreads)])
    said = {word.lower(): value for word, value in NUMBER.findall(published)}
    if said:
        rows.append(["published", *(said.get(name.lower(), "") for name in METRICS.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "",
        f"{conditions(group.results)}; mean ± standard deviation (n − 1) over "
        f"{len(group.seeds)} seed{'s' * (len(group.seeds) != 1)}, in %",
    ]
    for row in rows:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append("   ".join(cells).rstrip())
    return [*lines, *([f"published by the original authors: {published}"] if published else [])]


def write_page(output: Path, group: Group) -> Path:
    """Write OUT/report.html about all finished seeds, and return its path."""
    # Only now: --help and wrong options should not have to wait for numpy.
    from util.report.page import write_report

    return write_report(*group.folders, page=output / "report.html")


def tell(line: str) -> None:
    """Print a line at once, before the output of the next run."""
    print(line, flush=True)


def main() -> int:
    """Run the program; returns its exit code."""
    with lasting_streams():
        try:
            return reproduce(sys.argv[1:])
        except BadInput as error:
            code, reason = BAD_INPUT, str(error)
        except OSError as error:
            code, reason = FAULT, str(error)
        print(f"main_reproduce.py: error: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
