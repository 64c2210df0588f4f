"""Where `--eval` and `--knn` write: a folder of their own, never over another run's results."""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from util.errors import BadInput
from util.options.trained import OF_DATA
from util.safe_json import parse_object, part, read_text

BEST, LAST = "checkpoint-best.pth", "checkpoint-last.pth"  # of a run
CONFIG = "config.json"
RUN_FILES = (BEST, LAST, "log.txt", CONFIG)
RESULTS = ("eval.json", "predictions.csv", "figures", "report.html")


def holds_run(folder: str | Path) -> bool:
    """Whether a training has written to a folder."""
    return any(os.path.exists(os.path.join(folder, name)) for name in RUN_FILES)


def own_checkpoint(folder: str) -> str:
    """The best checkpoint of a run's folder, else its last; "" without any."""
    paths = (os.path.join(folder, name) for name in (BEST, LAST))
    return next(filter(os.path.exists, paths), "")


def evaluation_folder(
    kind: str, source: str, data_path: str, output_dir: str | None, options: Mapping[str, object]
) -> str:
    """The folder for the results of one evaluation.

    `output_dir` if it was given and no training has written to it; else KIND/NAME below it, or
    beside the checkpoint `source`. NAME says which checkpoint was tested on what, and the `options`
    that make it another test.
    """
    if output_dir is not None and not holds_run(output_dir):
        return output_dir
    beside = os.path.dirname(source) or "." if os.path.isfile(source) else "output_dir"
    stem = re.sub(r"\.(pth|pt|bin|safetensors)$", "", os.path.basename(source))
    words = [stem, os.path.basename(_absolute(data_path))]
    words += [f"{name}_{value}" for name, value in options.items()]
    name = "-".join(re.sub(r"[^\w.,=+-]+", "_", word).strip("._") for word in words)
    return os.path.join(output_dir or beside, kind, name[:200])


class Drawn(NamedTuple):
    """What figures are of, for comparison with the results in a folder."""

    checkpoint: str
    data_path: str
    facts: Mapping[str, Any] = {}  # of `eval.json`, as they would stand there
    report: Sequence[str] = ()  # the lines on the data set


# Options of an evaluation that `facts` and `report` tell.
_TOLD = {*OF_DATA, "classes"}


def tests_other_images(folder: str | Path, drawn: Drawn) -> bool:
    """Whether a folder is about other results than those of what is `drawn`.

    They are the same where the checkpoint, the path, the split, the classes and all that is said
    of the data are. A fine-tuning without results yet is about its test images.
    """
    result, config = (parse_object(read_text(Path(folder) / n)) for n in ("eval.json", CONFIG))
    if not (result or config.get("classes")):
        return False
    made_by, options = part(result, "made_by"), part(config, "options")
    kind = made_by.get("kind") or (_guessed(result) if result else "training")
    if kind == "training":
        tested = options.get("eval_data_path") or options.get("data_path")
        same = _absolute(os.path.dirname(drawn.checkpoint)) == _absolute(str(folder))
    else:
        tested, source = made_by.get("data"), made_by.get("checkpoint")
        same = source in (located(drawn.checkpoint, str(folder)), drawn.checkpoint)
        same = same and kind == "eval" and part(made_by, "options").keys() <= _TOLD
    if not (same and isinstance(tested, str) and located(tested) == located(drawn.data_path)):
        return True
    if not result:
        return drawn.facts.get("split") != "test"
    report = result.get("report")
    known = isinstance(report, list) and all(line in report for line in drawn.report)
    facts = drawn.facts or {"classes": None}  # images without labels are no results'
    return not known or any(result.get(name) != value for name, value in facts.items())


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def own_folder(folder: str, made_by: Mapping[str, Any]) -> str:
    """`folder`, or if it holds results that are not `made_by` the same, the first `folder-N` that
    does not.
    """
    names = (folder if k == 1 else f"{folder}-{k}" for k in count(1))
    return next(name for name in names if not _others(name, made_by))


def check_results(folder: str | Path, made_by: Mapping[str, Any]) -> None:
    """Raises BadInput where a folder holds results of another kind, which would be replaced.

    `made_by` says what they come from and stands in `eval.json`: `kind` (training, eval, knn),
    and of an evaluation checkpoint, data and options.
    """
    if others := _others(folder, made_by):
        raise BadInput(
            f"--output_dir {folder}: holds results of another kind ({others}), which would be "
            "replaced; name another folder"
        )


def set_aside(folder: Path) -> list[str]:
    """Move the results in a folder to one below it; -> the line that says so, if there were any."""
    there = [folder / name for name in RESULTS if (folder / name).exists()]
    if folder / RESULTS[0] not in there:
        return []
    names = (f"earlier_results{'' if k == 1 else f'_{k}'}" for k in count(1))
    aside = next(folder / name for name in names if not (folder / name).exists())
    aside.mkdir()
    for path in there:
        path.rename(aside / path.name)
    return [f"results that are not of this run were moved to {aside}"]


def is_training(folder: Path) -> bool:
    """Whether the results in a folder, if there are some, are a training's own."""
    result = parse_object(read_text(folder / "eval.json"))
    return not result or _made_by(result).get("kind") == "training"


def located(path: str, folder: str = "") -> str:
    """A path as it is told apart from others: relative to a `folder` of results that lies beside or
    below it, for these are moved together, otherwise absolute; what is not there stays as it is.
    """
    if not os.path.exists(os.path.expanduser(path)):
        return path  # the name of a release, or drawn faces
    real, inside = os.path.realpath(os.path.expanduser(path)), os.path.realpath(folder or os.sep)
    below = inside.startswith(os.path.dirname(real).rstrip(os.sep) + os.sep)
    return os.path.relpath(real, inside) if below else real


def _others(folder: str | Path, made_by: Mapping[str, Any]) -> str:
    """What results in a folder were made by and now would be, where that differs."""
    result = parse_object(read_text(Path(folder) / "eval.json"))
    found = _made_by(result) if result else {}
    changed = [key for key in found if key in made_by and found[key] != made_by[key]]
    before, now = (_listed(of, changed) for of in (found, made_by))
    return f"{before}; now {now}" if changed else ""


def _made_by(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return part(result, "made_by") or {"kind": _guessed(result)}


def _guessed(result: Mapping[str, Any]) -> str:
    """The kind of results that do not say it, of releases that did not write it."""
    if "train_data" in result:
        return "training"
    return "knn" if "classifier" in result else "eval"


def _listed(of: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {of[key]}" for key in keys)
