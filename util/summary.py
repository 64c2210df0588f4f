"""Results of runs: `eval.json` of one, mean and standard deviation over the seeds of a group.

Runs in folders GROUP/seed-N differ only in their seed: together they show how much of a result is
chance.
"""

import os
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from util.safe_json import number, parse_object, part, read_text

METRICS = {"accuracy": "accuracy", "uar": "UAR", "macro_f1": "macro-F1"}  # key: display name
INTERVALS = {f"{metric}_ci" for metric in METRICS}
SEED = re.compile(r"seed-(\d{1,18})")
TEST = ("data", "rule", "split", "n", "classes")  # equal in comparable results


@dataclass(frozen=True)
class Spread:
    """Values of one metric over seeds, in %."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation (n − 1); None for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def show(self, sign: str = "") -> str:
        """`83.20 ± 0.45`; with `sign` "+", `+0.20 ± 0.45`."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        # Equal means stay equal although they were computed differently; and no −0.00.
        mean = round(round(self.mean, 9), 2) + 0.0
        return f"{mean:{sign}.2f}{deviation}".replace("-", "−")


@dataclass(frozen=True)
class Group:
    """The results of runs that differ only in their seeds, or of a single run."""

    name: str
    folders: tuple[Path, ...]
    results: tuple[dict, ...]  # of `evaluate`, plus what the run adds
    seeds: tuple[int, ...] = ()  # of GROUP/seed-N; () for a single run

    def spread(self, metric: str) -> Spread:
        """The metric at the chosen epochs."""
        return Spread(tuple(float(result[metric]) for result in self.results))

    def last(self, metric: str) -> Spread | None:
        """The metric at the last epochs; None unless every run has it."""
        values = [number(part(result, "last").get(metric)) for result in self.results]
        return None if None in values else Spread(tuple(values))

    def at_last_epochs(self) -> "Group | None":
        """The same runs with the results of their last epochs; None unless every run has them."""
        if None in map(self.last, METRICS):
            return None
        return replace(self, results=tuple(map(_at_last_epoch, self.results)))


def _at_last_epoch(result: dict) -> dict:
    """A result with the numbers of its last epoch, and without intervals if it has none of that."""
    last = part(result, "last")
    kept = result if last.get("epoch") == result.get("epoch") else result.keys() - INTERVALS
    return {key: result[key] for key in kept} | dict(last)


def group_runs(folders: Sequence[Path]) -> list[Group]:
    """Group run folders, in their order; runs without a result are left out."""
    found: dict[tuple[Path, bool], list[tuple[Path, int, dict]]] = {}
    for path, folder in {Path(os.path.abspath(folder)): folder for folder in folders}.items():
        if result := read_result(folder):
            match = SEED.fullmatch(path.name)
            key, seed = ((path.parent, True), int(match[1])) if match else ((path, False), 0)
            found.setdefault(key, []).append((folder, seed, result))
    groups = []
    names = short_names([path for path, _ in found])
    for name, ((_, seeded), runs) in zip(names, found.items(), strict=True):
        paths, seeds, results = zip(*sorted(runs, key=lambda run: run[1]), strict=True)
        groups.append(Group(name, paths, results, seeds if seeded else ()))
    return groups


def short_names(paths: list[Path]) -> list[str]:
    """The shortest end of each path that distinguishes it from the others.

    Of GROUP/seed-N, at least that much.
    """
    ends = [2 if SEED.fullmatch(path.name) else 1 for path in paths]
    while True:
        names = [str(Path(*path.parts[-end:])) for path, end in zip(paths, ends, strict=True)]
        count = Counter(names)
        longer = [
            min(end + (count[name] > 1), len(path.parts))
            for path, end, name in zip(paths, ends, names, strict=True)
        ]
        if longer == ends:
            return names
        ends = longer


def paired_difference(groups: Sequence[Group], metric: str) -> Spread | None:
    """First minus second group, seed by seed.

    None unless there are two groups, with the same seeds and tested on the same images.
    """
    if len(groups) != 2 or not groups[0].seeds or groups[0].seeds != groups[1].seeds:
        return None
    tests = [[result.get(key) for key in TEST] for group in groups for result in group.results]
    if any(test != tests[0] for test in tests):
        return None
    pairs = zip(*(group.spread(metric).values for group in groups), strict=True)
    return Spread(tuple(first - second for first, second in pairs))


def describe_test(results: Sequence[dict]) -> str:
    """The test images: `RAF-DB basic, aligned, test`, with the rule for their labels."""
    title = ", ".join(filter(None, (agreed(results, "data"), agreed(results, "split"))))
    rule = agreed(results, "rule")
    return f"{title}; labels by {rule}" if rule else title


def conditions(results: Sequence[dict]) -> str:
    """`describe_test`, and the split on which the epochs were chosen."""
    chosen_on = agreed(results, "selected_on")
    chosen = f"epoch chosen on {chosen_on}" if chosen_on else ""
    return "; ".join(filter(None, (describe_test(results), chosen)))


def is_flattered(result: Mapping) -> bool:
    """Whether the epoch was chosen on the images that the result is about."""
    return result.get("selected_on") not in (None, "") and result["selected_on"] == result.get(
        "split"
    )


def chance(result: Mapping, metric: str) -> float | None:
    """What needs no training, in %: UAR of any constant answer, accuracy of the most frequent one.

    None for a macro-F1, or if the numbers of images by class are not known.
    """
    support = [n for count in part(result, "support").values() if (n := number(count))]
    if not support or min(support) < 0 or metric not in ("uar", "accuracy"):
        return None
    return 100 / len(support) if metric == "uar" else 100 * max(support) / sum(support)


def describe_run(folder: Path) -> str:
    """The model of a run and what it was trained from: `resnet18, from scratch, 80 images`."""
    config, result = parse_object(read_text(folder / "config.json")), read_result(folder)
    options = part(config, "options")
    told = [part(config, "model").get("name")]
    if source := result.get("checkpoint"):
        told.append(f"{result.get('classifier') or 'evaluation'} of {_end(source)}")
    elif "finetune" in options:
        source = options["finetune"]
        told.append(f"fine-tuned from {_end(source)}" if source else "from scratch")
    elif "mask_ratio" in options:
        told.append("pre-training")
    images = number(result.get("train_images") or part(config, "data").get("count"))
    if images is not None:
        told.append(f"{images:,.0f} training images")
    return ", ".join(word for word in told if isinstance(word, str) and word)


def _end(source: object) -> str:
    """The last two parts of a path, or a released name."""
    return str(Path(*Path(str(source)).parts[-2:]))


def agreed(results: Sequence[dict], key: str) -> str:
    """The value of `key` that the results share, or their different values joined by " / "."""
    values = [str(result[key]) for result in results if result.get(key) not in (None, "")]
    return " / ".join(dict.fromkeys(values))


def read_result(folder: Path) -> dict:
    """`eval.json` of a run; {} if it is missing or a metric in it is not a finite number."""
    result = parse_object(read_text(folder / "eval.json"))
    return result if all(number(result.get(key)) is not None for key in METRICS) else {}


def read_log(folder: Path) -> list[dict]:
    """The epochs in a run's log.txt; lines that are truncated or not objects are left out."""
    lines = read_text(folder / "log.txt").split("\n")
    return [entry for line in lines if (entry := parse_object(line))]


def is_finished(folder: Path) -> bool:
    """Whether a run has finished and left a result."""
    status = parse_object(read_text(folder / "status.json")).get("status")
    return status == "done" and bool(read_result(folder))
