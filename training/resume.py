"""Where a run begins: at a checkpoint that it resumes, at weights alone, or from nothing.

Everything about resuming is here: which checkpoint is taken, whether its run was the same, and how
its state is restored.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from datasets.sampler import GlobalBatchSampler
from engine_train import TrainState
from util.checkpoint import LAST, Damaged, first_line, newest_checkpoint, read_checkpoint
from util.distributed import on_main
from util.errors import BadInput
from util.options.parser import MOST, ResumeOptions
from util.weights import find_source

# What older releases did where they did not say so.
UNNAMED_BEFORE = {
    "test_interpolation": "bicubic",
    "freeze_pos_embed": False,
    "joint_jitter": False,
    "predict_ratio": 1.0,
    "epoch_repeats": 1,
}


class Beginning(NamedTuple):
    """Where a run begins."""

    path: Path | None  # of the training state to resume; None for a new run
    weights: Path | None  # of weights alone, by `--resume`, to begin a new schedule with
    notes: list[str]  # lines that say which and why


def find_beginning(folder: Path, options: ResumeOptions) -> Beginning:
    """A training state or weights to begin with, or nothing; equal on all ranks."""

    def find() -> Beginning:
        path, notes = find_start(folder, options.auto_resume, options.resume)
        if not (options.resume and path == Path(options.resume)):
            return Beginning(path, None, notes)
        path = find_source(options.resume)
        if has_training_state(read_checkpoint(path, peek=True)):
            return Beginning(path, None, notes)
        told = f"a new schedule, beginning with the weights of --resume {options.resume}"
        return Beginning(None, path, [*notes[:-1], told])

    return on_main(find)


def restore_state(
    path: Path | None,
    options: ResumeOptions,
    state: TrainState,
    identity: dict[str, object],
    sampler: GlobalBatchSampler,
) -> list[str]:
    """Bring `state` to where the run begins; -> lines that say so.

    `path`: see Beginning. `identity`: what determines the result of a run, see `check_same_run`.
    """
    if path is None:
        state.position.epoch = options.start_epoch
        return []
    saved = read_checkpoint(path)
    parts = StepParts(sampler.batch_size, sampler.accum, sampler.place.world)
    try:
        note = check_same_run(path, saved, identity, parts, options.override_resume)
        at = [saved[name] for name in ("epoch", "step")]
        if not all(type(n) is int and -1 <= n <= MOST for n in at):
            raise ValueError(f"epoch and step {at}")
        state.load_state_dict(saved)
    except BadInput:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"holds no training state of such a run ({misfit(error)})"
        raise BadInput(f"{path}: {what}; name another checkpoint") from None
    position = state.position
    if position.step and saved["run"].get("global_batch") != identity["global_batch"]:
        position.step, position.sums = 0, type(position.sums)()  # steps are of another size now
    at = f"at epoch {position.epoch}, step {position.step}"
    return [*([note] if note else []), at]


def misfit(error: Exception) -> str:
    """What an exception says; of a state dict's, what differs, which is below its first line."""
    first, *rest = str(error).splitlines() or [""]
    if rest and first.startswith("Error(s) in loading state_dict"):
        more = f"; and {len(rest) - 2} more" if len(rest) > 2 else ""
        return "; ".join(line.strip() for line in rest[:2]) + more
    return first_line(error)


def find_start(folder: Path, auto_resume: bool, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint a run begins from, and lines that tell why.

    In this order: the newest good one of its own folder (`auto_resume`), so that the same command
    goes on where it was; else `resume`; else none. Raises BadInput rather than overwrite a run.
    """
    notes = []
    try:
        found = newest_checkpoint(folder) if auto_resume else None
    except Damaged as error:
        if not resume:
            raise
        found, notes = None, [f"warning: {error}"]
    if found:
        notes = [f"warning: passed over {problem}" for problem in found.damaged]
        return found.path, [*notes, f"going on from {found.path}"]
    if resume:
        return Path(resume), [*notes, f"going on from --resume {resume}"]
    if not auto_resume and (folder / LAST).exists():
        raise BadInput(
            f"--output_dir {folder}: holds a run that --auto_resume False would overwrite; "
            "name another folder, or move its checkpoints away"
        )
    return None, ["starting from nothing"]


def has_training_state(saved: dict[str, Any]) -> bool:
    """Whether a checkpoint of ours can be resumed; others hold weights at the most."""
    return {"model", "optimizer", "epoch", "step", "run"} <= saved.keys()


class StepParts(NamedTuple):
    """What the images of an optimizer step come from."""

    batch_size: int
    accum: int
    processes: int


def batch_change(saved: dict[str, Any], step: StepParts) -> str:
    """How many images a step has and had, and what would make it so again."""
    total, options = saved["run"]["global_batch"], saved.get("args", {})
    b, a = (options.get(name) or 1 for name in ("batch_size", "accum_iter"))
    own, rest = divmod(total, step.processes)
    if rest:
        number = greatest_divisor(total, step.processes)
        advice = f"{total} cannot be shared out to {step.processes} processes, start {number}"
    else:
        batch = greatest_divisor(own, step.batch_size)
        advice = f"--batch_size {batch} --accum_iter {own // batch} would make it so again"
    return (
        f"a step is --batch_size {step.batch_size} × --accum_iter {step.accum} × {step.processes} "
        f"processes = {math.prod(step)} images and was {b} × {a} × {total // (b * a)} = {total}: "
        f"{advice}"
    )


def greatest_divisor(number: int, limit: int) -> int:
    """The greatest one that is not above a limit."""
    return next((n for n in range(min(number, limit), 0, -1) if number % n == 0), 1)


def check_same_run(
    path: Path, saved: dict[str, Any], run: dict[str, Any], step: StepParts, override: bool
) -> str:
    """Compare what determines a result in a checkpoint and in this run; -> a line on differences.

    More epochs than before are fine. Raises BadInput that lists everything else, unless
    overridden; and for a checkpoint that no training of ours wrote.
    """
    if not has_training_state(saved):
        raise BadInput(f"{path}: weights, but no training state to resume")
    before = {**UNNAMED_BEFORE, **saved["run"]}
    before.setdefault("head_init_std", run.get("head_init_std"))  # of no effect any more
    changed = {k: (before.get(k), v) for k, v in run.items() if before.get(k) != v}
    if "epochs" in changed and (changed["epochs"][0] or 0) < changed["epochs"][1]:
        longer = changed.pop("epochs")
        note = f"note: --epochs {longer[0]} -> {longer[1]}, the schedule is stretched"
    else:
        note = ""
    if not changed:
        return note
    listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
    if changed.get("global_batch", (None, None))[0]:
        listed += f" ({batch_change(saved, step)})"
    if "model" in changed or not override:
        raise BadInput(
            f"{path}: from a run with other options ({listed}); use those, another --output_dir, "
            "or --override_resume to go on all the same"
        )
    return f"{note} warning: going on with changed options: {listed}".strip()
