"""Where a run starts: from a checkpoint that it resumes, from weights alone, or from scratch.

Everything about resuming is here: which checkpoint is used, whether it belongs to the same run, and
how its state is restored.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from datasets.sampler import GlobalBatchSampler
from engine_train import TrainState
from util.checkpoint import newest_checkpoint
from util.checkpoint.container import Damaged, first_line, no_memory
from util.checkpoint.read import read_checkpoint
from util.distributed import on_main
from util.errors import BadInput, out_of_memory
from util.options.parser import MOST, ResumeOptions
from util.rundir import LAST
from util.weights import find_source
from util.wording import changed_images

# Values of options that older releases did not record.
UNNAMED_BEFORE = {
    "test_interpolation": "bicubic",
    "freeze_pos_embed": False,
    "joint_jitter": False,
    "predict_ratio": 1.0,
    "epoch_repeats": 1,
}


class Beginning(NamedTuple):
    """Where a run starts."""

    path: Path | None  # training state to resume; None for a new run
    weights: Path | None  # weights given by `--resume`, to start a new schedule with
    notes: list[str]  # log lines that say which, and why


def find_beginning(folder: Path, options: ResumeOptions) -> Beginning:
    """Find the training state or the weights to start from, if any; the same on all ranks."""

    def find() -> Beginning:
        path, notes = choose_checkpoint(folder, options.auto_resume, options.resume)
        if not (options.resume and path == Path(options.resume)):
            return Beginning(path, None, notes)
        path = find_source(options.resume)
        if has_training_state(read_checkpoint(path, peek=True)):
            return Beginning(path, None, notes)
        told = f"starting a new schedule with the weights of --resume {options.resume}"
        return Beginning(None, path, [*notes[:-1], told])

    return on_main(find)


def restore_state(
    path: Path | None,
    options: ResumeOptions,
    state: TrainState,
    identity: dict[str, object],
    sampler: GlobalBatchSampler,
) -> list[str]:
    """Restore `state` from the checkpoint at `path`, or set a new run's first epoch; -> log lines.

    `path`: see Beginning. `identity`: what determines the result of a run, see `check_same_run`.
    Raises BadInput for a checkpoint of another run or without its training state, ReadFault if it
    cannot be read, or restored for want of memory.
    """
    if path is None:
        state.position.epoch = options.start_epoch
        return []
    saved = read_checkpoint(path)
    parts = StepParts(sampler.batch_size, sampler.accum, sampler.process.world)
    try:
        note = check_same_run(
            path, saved, run=identity, step=parts, override=options.override_resume
        )
        at = [saved[name] for name in ("epoch", "step")]
        if not all(type(n) is int and -1 <= n <= MOST for n in at):
            raise ValueError(f"epoch and step {at}")
        state.load_state_dict(saved)
    except BadInput:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        if out_of_memory(error):
            raise no_memory(path) from None
        what = f"does not hold the training state of such a run ({misfit(error)})"
        raise BadInput(f"{path}: {what}; name another checkpoint") from None
    position = state.position
    if position.step and any(saved["run"].get(n) != identity[n] for n in ("global_batch", "data")):
        # Its steps now have other images: start the epoch over.
        position.step, position.sums = 0, type(position.sums)()
    at = f"at epoch {position.epoch}, step {position.step}"
    return [*([note] if note else []), at]


def misfit(error: Exception) -> str:
    """A one-line message; of a state-dict mismatch, the first differences, not the heading."""
    first, *rest = str(error).splitlines() or [""]
    if rest and first.startswith("Error(s) in loading state_dict"):
        more = f"; and {len(rest) - 2} more" if len(rest) > 2 else ""
        return "; ".join(line.strip() for line in rest[:2]) + more
    return first_line(error)


def choose_checkpoint(
    folder: Path, auto_resume: bool, resume: str
) -> tuple[Path | None, list[str]]:
    """Choose the checkpoint to start from; -> its path, and log lines that say why.

    In this order: the newest readable one in the run's folder (`auto_resume`), so that the same
    command resumes the run; `resume`; none. Raises BadInput rather than overwrite a run.
    """
    notes = []
    try:
        found = newest_checkpoint(folder) if auto_resume else None
    except Damaged as error:
        if not resume:
            raise
        found, notes = None, [f"warning: {error}"]
    if found:
        notes = [f"warning: skipped {problem}" for problem in found.damaged]
        return found.path, [*notes, f"resuming from {found.path}"]
    if resume:
        return Path(resume), [*notes, f"resuming from --resume {resume}"]
    if not auto_resume and (folder / LAST).exists():
        raise BadInput(
            f"--output_dir {folder}: holds a run that --auto_resume False would overwrite; "
            "name another folder, or move its checkpoints away"
        )
    return None, ["starting from scratch"]


def has_training_state(saved: dict[str, Any]) -> bool:
    """Whether a checkpoint is one of ours that can be resumed; others at most hold weights."""
    return {"model", "optimizer", "epoch", "step", "run"} <= saved.keys()


class StepParts(NamedTuple):
    """The factors of the number of images in an optimizer step."""

    batch_size: int
    accum: int
    processes: int


def batch_change(saved: dict[str, Any], step: StepParts) -> str:
    """Say how the number of images per step has changed, and what restores it."""
    total, options = saved["run"]["global_batch"], saved.get("args", {})
    b, a = (options.get(name) or 1 for name in ("batch_size", "accum_iter"))
    own, rest = divmod(total, step.processes)
    if rest:
        number = greatest_divisor(total, step.processes)
        advice = f"{total} cannot be divided among {step.processes} processes: start {number}"
    else:
        batch = greatest_divisor(own, step.batch_size)
        advice = f"restore this with --batch_size {batch} --accum_iter {own // batch}"
    return (
        f"each step has --batch_size {step.batch_size} × --accum_iter {step.accum} × "
        f"{step.processes} processes = {math.prod(step)} images, but had {b} × {a} × "
        f"{total // (b * a)} = {total} before; {advice}"
    )


def greatest_divisor(number: int, limit: int) -> int:
    """The greatest divisor of `number` that does not exceed `limit`."""
    return next((n for n in range(min(number, limit), 0, -1) if number % n == 0), 1)


def check_same_run(
    path: Path, saved: dict[str, Any], run: dict[str, Any], step: StepParts, override: bool
) -> str:
    """Compare what determines a run's result with that in a checkpoint; -> a line on differences.

    More epochs than before are fine. Raises BadInput that lists any other differences, unless
    overridden, or if the model differs; and for a checkpoint that our training did not write.
    """
    if not has_training_state(saved):
        raise BadInput(f"{path}: holds weights, but no training state to resume")
    before = {**UNNAMED_BEFORE, **saved["run"]}
    before.setdefault("head_init_std", run.get("head_init_std"))  # no effect once started
    images = changed_images(before.get("images"), run["images"])
    before["images"] = run["images"]  # only counted, for the message: `data` identifies them
    changed = {k: (before.get(k), v) for k, v in run.items() if before.get(k) != v}
    if "epochs" in changed and (changed["epochs"][0] or 0) < changed["epochs"][1]:
        longer = changed.pop("epochs")
        note = f"note: --epochs {longer[0]} -> {longer[1]}, the schedule is stretched"
    else:
        note = ""
    if not changed:
        return note
    kind = "images" if changed.keys() == {"data"} else "options"
    listed = ", ".join(
        images if name == "data" else f"{name} {old} -> {new}"
        for name, (old, new) in changed.items()
    )
    if changed.get("global_batch", (None, None))[0]:
        listed += f" ({batch_change(saved, step)})"
    if "model" in changed or not override:
        raise BadInput(
            f"{path}: from a run with other {kind} ({listed}); use the same {kind}, another "
            "--output_dir, or --override_resume to resume anyway"
        )
    return f"{note} warning: continuing with changed {kind}: {listed}".strip()
