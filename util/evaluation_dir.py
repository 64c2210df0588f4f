"""Where `--eval` and `--knn` write: a separate folder, never over the results of another run."""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from util.errors import BadInput
from util.options.trained import OF_DATA
from util.rundir import BEST, LAST
from util.safe_json import parse_object, part, read_text

CONFIG = "config.json"
RUN_FILES = (BEST, LAST, "log.txt", CONFIG)
RESULTS = ("eval.json", "predictions.csv", "figures", "report.html")


def holds_run(folder: str | Path) -> bool:
    """Whether a training run has written to a folder."""
    return any(os.path.exists(os.path.join(folder, name)) for name in RUN_FILES)


def own_checkpoint(folder: str) -> str:
    """The best checkpoint in a run's folder, else the last; "" if there is none."""
    paths = (os.path.join(folder, name) for name in (BEST, LAST))
    return next(filter(os.path.exists, paths), "")


def evaluation_folder(
    kind: str, source: str, data_path: str, output_dir: str | None, options: Mapping[str, object]
) -> str:
    """The folder for the results of one evaluation.

    `output_dir` if it was given and holds no training run; else KIND/NAME below it, or beside the
    checkpoint `source`. NAME combines the checkpoint, the data and the `options` that make it a
    different evaluation.
    """
    if output_dir is not None and not holds_run(output_dir):
        return output_dir
    beside = os.path.dirname(source) or "." if os.path.isfile(source) else "output_dir"
    stem = re.sub(r"\.(pth|pt|bin|safetensors)$", "", os.path.basename(source))
    words = [stem, os.path.basename(_absolute(data_path))]
    words += [f"{name}_{value}" for name, value in options.items()]
    name = "-".join(re.sub(r"[^\w.,=+-]+", "_", word).strip("._") for word in words)
    return os.path.join(output_dir or beside, kind, name[:200])


class FigureSource(NamedTuple):
    """What figures show, to compare it with the results in a folder."""

    checkpoint: str
    data_path: str
    facts: Mapping[str, Any] = {}  # as they would be in `eval.json`
    report: Sequence[str] = ()  # the lines on the data set


# Options of an evaluation whose effect `facts` and `report` show.
_TOLD = {*OF_DATA, "classes"}


def tests_other_images(folder: str | Path, drawn: FigureSource) -> bool:
    """Whether the results in a folder are about something else than what is `drawn`.

    They are about the same if the checkpoint, path, split, classes and everything reported about
    the data agree. Fine-tuning without results yet is about its test images.
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
        same = source in (comparable_path(drawn.checkpoint, str(folder)), drawn.checkpoint)
        same = same and kind == "eval" and part(made_by, "options").keys() <= _TOLD
    if not (
        same
        and isinstance(tested, str)
        and comparable_path(tested) == comparable_path(drawn.data_path)
    ):
        return True
    if not result:
        return drawn.facts.get("split") != "test"
    report = result.get("report")
    known = isinstance(report, list) and all(line in report for line in drawn.report)
    facts = drawn.facts or {"classes": None}  # no results are of images without labels
    return not known or any(result.get(name) != value for name, value in facts.items())


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def own_folder(folder: str, made_by: Mapping[str, Any]) -> str:
    """`folder`, or the first `folder-N`, that holds no results of another origin than `made_by`."""
    names = (folder if k == 1 else f"{folder}-{k}" for k in count(1))
    return next(name for name in names if not _others(name, made_by))


def check_results(folder: str | Path, made_by: Mapping[str, Any]) -> None:
    """Raises BadInput if a folder holds results of another origin, which would be replaced.

    `made_by` is the origin, as in `eval.json`: `kind` (training, eval or knn) and, of an
    evaluation, checkpoint, data and options.
    """
    if others := _others(folder, made_by):
        raise BadInput(
            f"--output_dir {folder}: holds results of another kind ({others}), which would be "
            "replaced; name another folder"
        )


def set_aside(folder: Path) -> list[str]:
    """Move the results in a folder to one below it; -> a log line, if there were any."""
    there = [folder / name for name in RESULTS if (folder / name).exists()]
    if folder / RESULTS[0] not in there:
        return []
    names = (f"earlier_results{'' if k == 1 else f'_{k}'}" for k in count(1))
    aside = next(folder / name for name in names if not (folder / name).exists())
    aside.mkdir()
    for path in there:
        path.rename(aside / path.name)
    return [f"results that are not from this run were moved to {aside}"]


def is_training(folder: Path) -> bool:
    """Whether the results in a folder, if any, are from training."""
    result = parse_object(read_text(folder / "eval.json"))
    return not result or _made_by(result).get("kind") == "training"


def comparable_path(path: str, folder: str = "") -> str:
    """A path in the form in which paths are compared.

    Relative to `folder`, which holds results, if that lies beside the path or deeper, since both
    are then moved together; absolute otherwise. A path that does not exist is returned as it is.
    """
    if not os.path.exists(os.path.expanduser(path)):
        return path  # a released name, or synthetic faces
    real, inside = os.path.realpath(os.path.expanduser(path)), os.path.realpath(folder or os.sep)
    below = inside.startswith(os.path.dirname(real).rstrip(os.sep) + os.sep)
    return os.path.relpath(real, inside) if below else real


def _others(folder: str | Path, made_by: Mapping[str, Any]) -> str:
    """How the origin of the results in a folder differs from `made_by`; "" if it does not."""
    result = parse_object(read_text(Path(folder) / "eval.json"))
    found = _made_by(result) if result else {}
    changed = [key for key in found if key in made_by and found[key] != made_by[key]]
    before, now = (_listed(of, changed) for of in (found, made_by))
    return f"{before}; now {now}" if changed else ""


def _made_by(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return part(result, "made_by") or {"kind": _guessed(result)}


def _guessed(result: Mapping[str, Any]) -> str:
    """The kind of results of older releases, which did not record it."""
    if "train_data" in result:
        return "training"
    return "knn" if "classifier" in result else "eval"


def _listed(of: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {of[key]}" for key in keys)
