"""What every training run needs around its loop: folder, processes, start and end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from datasets.sampler import GlobalBatchSampler
from engine_train import Trainer, TrainState
from models_registry import compile_blocks, uncompiled
from training.gradients import BatchLoss, Eager, Gradients
from training.graphed import Graphed
from training.observer import RunObserver
from training.precision import Precision
from training.saver import Saver
from training.trace import StepTrace
from util import distributed
from util.distributed import Launch, ProcessInfo, on_main
from util.errors import BadInput, Fault, Stopped
from util.files import write_json
from util.log import Meter, NullLog, RunLog
from util.options.parser import Saving
from util.process_failures import explain, kill_workers
from util.report.page import write_report
from util.rundir import RunDir, provenance
from util.stop import StopRequest

T = TypeVar("T")


class Run(NamedTuple):
    """Where a program runs, and where it writes."""

    process: ProcessInfo
    device: torch.device
    stop: StopRequest
    output: Path
    folder: RunDir | None  # locked; only on rank 0
    cores: int  # this process's share of the CPU cores


def run_in_folder(output_dir: str, launch: Launch, work: Callable[[Run], None]) -> None:
    """Lock the folder, join the other ranks, do the work, write status and report, unlock."""
    process = distributed.find_process(launch.world_size, launch.local_rank, launch.dist_on_itp)
    folder = RunDir(output_dir) if process.main else None
    stop = StopRequest()
    stop.install()
    device = distributed.pick_device(launch.device, process)
    distributed.join(process, device, launch.dist_url, launch.dist_timeout)
    cores = distributed.own_cores()
    work(Run(process, device, stop=stop, output=Path(output_dir), folder=folder, cores=cores))
    if folder:
        try:
            folder.write_status("done")
            print(f"report: {write_report(folder.path)}")
        except OSError as error:
            print(f"warning: the run is done, but not everything was written: {error}")
        folder.release()


def open_log(run: Run, log_dir: str | None, state: TrainState, steps: int) -> NullLog:
    """Rank 0's log, truncated to the position of `state`; on other ranks, one that does nothing."""
    if not run.folder:
        return NullLog()
    position = state.position
    events = Path(log_dir) if log_dir else run.output
    return RunLog(run.folder.path, events, position.epoch, position.step / steps)


def write_config(run: Run, options: dict[str, Any], **facts: object) -> None:
    """Write `config.json`: everything needed to repeat the run."""
    if run.folder:
        run.folder.clear_status()
        config = {"options": options, **provenance(), **facts}
        write_json(run.folder.path / "config.json", config)


def gradients_of(
    model: nn.Module,
    batch_loss: BatchLoss,
    precision: Precision,
    run: Run,
    *,
    compiled: bool,
    graphed: bool,
    tell: Callable[[str], None],
) -> Gradients:
    """How the run computes gradients; `compiled` and `graphed`: `--compile` and `--cuda_graph`.

    `tell` gets lines for the log. Raises BadInput if `--cuda_graph` is not supported.
    """
    if compiled:
        compile_blocks(model)
    if graphed:
        if run.device.type != "cuda":
            raise BadInput(f"--cuda_graph: needs a CUDA GPU; leave it out on {run.device.type}")
        if any("running_" in name for name, _ in model.named_buffers()):
            raise BadInput("--cuda_graph: batch norm is not supported; leave it out")
        return Graphed(model, batch_loss, precision, run.process, tell=tell)
    if run.process.world > 1:
        model = DistributedDataParallel(
            model,
            device_ids=[run.device.index] if run.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    return Eager(model, batch_loss, precision)


def same_everywhere(what: str, build: Callable[[], T], digest: Callable[[T], str]) -> T:
    """Call `build()` on every rank, on rank 0 first, so that the others find what it has cached.

    `what`: the option and its path, for messages. Raises rank 0's BadInput on all ranks, or
    BadInput on a rank that finds something else than rank 0.
    """
    made = []

    def first() -> str:
        made.append(build())
        return digest(made[0])

    expected = on_main(first)
    built = made[0] if made else build()
    if digest(built) != expected:
        raise BadInput(
            f"{what}: process 0 and another process read different files there; every machine "
            "must see the same files"
        )
    return built


def worker_count(asked: int | None, cores: int) -> int:
    """`--num_workers` if given, else one per core of this process, at most 10."""
    return min(10, cores) if asked is None else asked


def loading(
    run: Run, num_workers: int | None, pin_mem: bool, dist_timeout: float
) -> dict[str, Any]:
    """Settings of data workers, as arguments of `build_loader` and `build_test_loader`."""
    return {
        "workers": worker_count(num_workers, run.cores),
        "pin_memory": pin_mem and run.device.type == "cuda",
        # Expires before the others stop waiting for this process, which knows the reason.
        "timeout": 0.9 * dist_timeout,
    }


def step_line(sampler: GlobalBatchSampler, data_path: str, lr: float) -> str:
    """A log line about the size of an epoch and of an optimizer step."""
    repeats = f", each {sampler.repeats} times per epoch" if sampler.repeats > 1 else ""
    return (
        f"{sampler.count} images of {data_path}{repeats}, {sampler.steps} steps per epoch; per "
        f"step --batch_size {sampler.batch_size} × --accum_iter {sampler.accum} × "
        f"{sampler.process.world} processes = {sampler.global_batch} images, learning rate {lr:.3g}"
    )


def warmup_lines(warmup: float, epochs: int) -> list[str]:
    """A warning if the warm-up takes the whole run."""
    if warmup < epochs:
        return []
    return [
        f"warning: --warmup_epochs {warmup:g} does not end before --epochs {epochs}: "
        "the learning rate only rises"
    ]


def steps_between_saves(asked: int | None, run: Run) -> int:
    """`--save_steps` if given, else 500 on several GPUs, 0 (only after each epoch) elsewhere.

    If a GPU or its process fails, NCCL's watchdog may kill the others before they can save.
    """
    if asked is not None:
        return asked
    return 500 if run.process.world > 1 and run.device.type == "cuda" else 0


def observe(
    run: Run,
    log: NullLog,
    state: TrainState,
    sampler: GlobalBatchSampler,
    epochs: int,
    saving: Saving,
    at_lines: Callable[[], None],
    extra: dict[str, Any],
) -> RunObserver:
    """The observer of a run; `extra` goes into its checkpoints, `at_lines` is as in RunObserver."""
    folder = run.output if run.folder else None
    saver = Saver(
        folder,
        extra,
        every=saving.save_ckpt_freq,
        keep=saving.save_ckpt_num,
        epochs=epochs,
        begun=state.position,
        warn=log.line,
        give_up=run.stop.ask,
    )
    return RunObserver(
        log,
        saver if saving.save_ckpt else None,
        meter=Meter((epochs - state.position.epoch) * sampler.steps - state.position.step),
        at_lines=at_lines,
        device_type=run.device.type,
        steps=sampler.steps,
        epochs=epochs,
        global_batch=sampler.global_batch,
        print_freq=saving.print_freq,
        save_steps=steps_between_saves(saving.save_steps, run),
        trace=StepTrace(run.output / "trace.json", saving.profile if run.folder else 0, log.line),
    )


def run_epochs(
    trainer: Trainer,
    observer: RunObserver,
    sampler: GlobalBatchSampler,
    loader: DataLoader,
    measure: Callable[[int], dict[str, float]],
    begin: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train the remaining epochs.

    `begin(epoch)` is called before each epoch, and before the rest of a resumed one;
    `measure(epoch)` returns further values for its log line. However this ends, no save is in
    progress afterwards.
    """
    position = trainer.state.position
    with observer:
        try:
            while position.epoch < observer.epochs:
                begin(position.epoch)
                sampler.start_at(position.epoch, position.step)
                trainer.run_epoch(loader, sampler.steps, observer)
                with uncompiled():
                    observer.finish_epoch(trainer, measure)
        except (BadInput, Fault, Stopped):
            raise
        except Exception as error:
            kill_workers()  # memory may have run out: free theirs
            ended, kept = explain(error), observer.rescue(trainer.state, trainer.is_consistent)
            if not ended:
                observer.log.line(f"warning: stopped by an error; {kept}")
                raise
            raise type(ended)("; ".join(filter(None, (str(ended), kept)))) from None
