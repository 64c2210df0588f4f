"""Submit a training run to SLURM. A job that is preempted or out of time is requeued and resumes.

    python main_submit.py --nodes 2 --gpus 8 --hours 24 --partition gpu \\
        main_pretrain.py @recipes/pretrain_convnextv2_base.args --accum_iter 4 --data_path … \\
        --output_dir /shared/run

Needs `pip install -r requirements/submit.txt`. Options of the job come before the program's name,
options of the program after it; both are checked before anything is queued.
"""

import argparse
import importlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by python -P

from util.errors import DONE, RESUMABLE, BadInput, Fault
from util.options.parser import COUNT, SIZE, Parser, bounded, find_output_dir
from util.program import run_program
from util.stop import StopRequest

if TYPE_CHECKING:
    import submitit

PROGRAMS = ("main_pretrain.py", "main_finetune.py")
MOST_TIMEOUTS = 1000  # how often a job may run out of time and be requeued
WARNING = 300  # seconds between the stop signal and the time limit: enough for an evaluation
KILL_WAIT = 600  # seconds to wait for SLURM's kill after SIGTERM; it usually comes after 30
ROOT = Path(__file__).resolve().parent


def build_parser() -> Parser:
    """Options of the job; everything after the program's name belongs to the program."""
    parser = Parser(
        "Submit a training run to SLURM. A job that is preempted or runs out of time is queued "
        "again and resumes, until training is done."
    )
    parser.add_argument(
        "--nodes", type=SIZE, default=1, help="number of machines (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus",
        type=COUNT,
        default=8,
        help="GPUs per machine, one process each; 0: one process on the CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--cpus",
        type=SIZE,
        default=10,
        help="CPU cores per process, for data loading (default: %(default)s)",
    )
    parser.add_argument(
        "--hours",
        type=bounded(float, above=0),
        default=72,
        help="time limit of each job in hours; the next one resumes (default: %(default)s)",
    )
    parser.add_argument("--partition", metavar="NAME", help="SLURM partition (default: SLURM's)")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another option of sbatch, such as account=LAB; may be given several times",
    )
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local"),
        default="slurm",
        help="local: run the job on this machine, to try it out (default: %(default)s)",
    )
    parser.add_argument(
        "program",
        type=os.path.basename,
        choices=PROGRAMS,
        help="training program; the job's options come before it",
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the training program")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raises BadInput for options that would otherwise fail only after waiting in the queue."""
    for pair in args.sbatch:
        if not all(pair.partition("=")):
            raise BadInput(f"--sbatch {pair}: must be KEY=VALUE, such as account=faces")
    if args.cluster == "local" and args.nodes > 1:
        raise BadInput(f"--nodes {args.nodes}: --cluster local only uses this machine")
    program = importlib.import_module(args.program.removesuffix(".py"))
    program.check_options(program.build_parser().parse(args.options))


def work(args: argparse.Namespace) -> None:
    """Submit the job and print its number."""
    # submitit reads these here and in the job: the signal that the programs handle, and where their
    # modules are.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"SUBMITIT_PREEMPT_SIGNAL": "USR1", "PYTHONPATH": os.pathsep.join(paths)}
    os.environ |= environment
    try:
        import submitit
    except ImportError:
        raise BadInput(
            "submitit is not installed: pip install -r requirements/submit.txt"
        ) from None

    logs = Path(find_output_dir(args.options) or "output_dir") / "jobs"
    executor = submitit.AutoExecutor(logs, args.cluster, slurm_max_num_timeout=MOST_TIMEOUTS)
    executor.update_parameters(
        name=Path(args.program).stem,
        nodes=args.nodes,
        tasks_per_node=max(args.gpus, 1),
        gpus_per_node=args.gpus,
        cpus_per_task=args.cpus,
        slurm_srun_args=[f"--cpus-per-task={args.cpus}"],  # srun no longer takes it from sbatch
        timeout_min=int(60 * args.hours),
        slurm_partition=args.partition,
        slurm_signal_delay_s=WARNING,
        slurm_setup=[f"export {name}={shlex.quote(value)}" for name, value in environment.items()],
        slurm_additional_parameters={
            "requeue": True,
            **dict(pair.split("=", 1) for pair in args.sbatch),
        },
    )
    job = executor.submit(Training(args.program, args.options))
    said = f"{logs}/{job.job_id}_0_log.out and .err"
    print(f"job {job.job_id}; logs: {said}", flush=True)
    if args.cluster == "local" and job.exception():
        raise Fault(f"job {job.job_id} failed; see {said}")


class Training:
    """One process of a job."""

    def __init__(self, program: str, options: list[str]) -> None:
        self.program, self.options = program, options

    def __call__(self) -> None:
        """Run the program; if it was stopped by the job's time limit, requeue the job."""
        import submitit

        place = submitit.helpers.TorchDistributedEnvironment()
        place.export(set_cuda_visible_devices=False)
        # submitit's handler requeues the job; the program will replace it with its own.
        queue_again = signal.getsignal(signal.SIGUSR1)
        program = importlib.import_module(self.program.removesuffix(".py"))
        sys.argv = [self.program, *self.options]
        code = run_program(program.build_parser, program.check_options, program.work)
        asked_by = StopRequest.latest if code == RESUMABLE else ""
        if asked_by == "SIGUSR1":
            if place.rank == 0:
                queue_again(signal.SIGUSR1, None)
            return
        if asked_by == "SIGTERM":
            # Cancelled or preempted. SLURM knows which, and requeues a preempted job that it had to
            # kill; a job that exits on its own counts as finished.
            time.sleep(KILL_WAIT)
        if code != DONE:
            sys.exit(code)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """The job that submitit requeues: the same one, which resumes from its checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
