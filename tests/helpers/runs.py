"""Start real training runs from tests."""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from engine_train import Trainer
from util.program import run_program
from util.stop import SIGNALS

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {
    "mae": "--model mae_vit_tiny_patch16 --decoder_embed_dim 32 --decoder_depth 1 "
    "--decoder_num_heads 2 --input_size 48",
    "fcmae": "--model convnextv2_atto --decoder_embed_dim 32 --input_size 64",
    "resnet": "--model resnet18 --patch_size 8 --decoder_embed_dim 32 --input_size 48",
}
SMALL = (
    "--data_path synthetic:90 --epochs 2 --warmup_epochs 1 --batch_size 8 --print_freq 1 "
    "--num_workers 1 --vis_freq 0"
)
CLASSIFIERS = {
    "vit": "--model vit_tiny_patch16",
    "convnext": "--model convnextv2_atto",
    "resnet": "--model resnet18",
}
SMALL_FINETUNE = (
    "--input_size 32 --epochs 2 --warmup_epochs 1 --batch_size 4 --print_freq 1 --num_workers 0"
)

SLOW_IMPORTS = ["timm", "sklearn.linear_model", "sklearn.neighbors", "matplotlib.figure"]
SLOW_IMPORTS += ["torchvision.transforms.v2", "torch.utils.tensorboard"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(output, family="mae", more="", processes=1):
    """The command line of a small pre-training; later options override earlier ones."""
    options = f"{SMALL} {FAMILIES[family]} --output_dir {output} {more}"
    return launched("main_pretrain.py", options.split(), processes)


def small_run(output, more="", family="mae"):
    """The options of that run, without data workers: two epochs of 12 steps on one process."""
    return f"{SMALL} {FAMILIES[family]} --num_workers 0 --output_dir {output} {more}".split()


def finetune_command(output, family="vit", more="", processes=1):
    """The command line of a small fine-tuning."""
    return launched("main_finetune.py", finetune_options(output, family, more), processes)


def finetune_options(output, family="vit", more=""):
    return f"{SMALL_FINETUNE} {CLASSIFIERS[family]} --output_dir {output} {more}".split()


def launched(program, options, processes=1):
    """A command line, with torch's launcher for several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.launch", f"--nproc_per_node={processes}"]
        launcher += ["--master_port", str(free_port())]
    return [*launcher, str(ROOT / program), *options]


def run_here(main, options):
    """Run a program in this process, on one thread like started programs; -> its exit code."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    still = {"freeze": lambda: None, "unfreeze": lambda: None}  # see conftest
    try:
        with mock.patch.multiple(gc, **still):
            return run_program(main.build_parser, main.check_options, main.work, options)
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def pretrain(output, more="", family="mae"):
    """Run `small_run` in this process; -> its exit code."""
    return run_here(importlib.import_module("main_pretrain"), small_run(output, more, family))


def run_two(program, options, code=0):
    """Run a program (such as `main_finetune`) as two processes, without a slow launcher.

    They are forked from a process that has imported the slow libraries; both must end with `code`.
    """
    ranks = start_ranks(program, options)
    for process in ranks:
        process.join(240)
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [code, code]


def run(program, options, processes=1):
    """Run a program, in this process or as two; it must succeed."""
    if processes == 1:
        assert run_here(importlib.import_module(program), options) == 0
    else:
        run_two(program, options)


def start_ranks(program, options, world=2, before=None, output=None):
    """Start the `world` processes of one run, which may be made to fail.

    `before(rank)` is called in each; its output goes to the file `{output}.{rank}`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    rest = (world, program, list(map(str, options)), free_port(), before, output)
    ranks = [context.Process(target=_run_rank, args=(rank, *rest)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def _run_rank(rank, world, program, options, port, before, output):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as usual
    if output:
        file = os.open(f"{output}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if before:
        before(rank)
    sys.exit(run_here(importlib.import_module(program), options))


def start(arguments, folder=ROOT, **more):
    """Start a process with stdout and stderr in one pipe; `more`: environment variables."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
    )


def finish(arguments, code=0):
    """Run to the end, which must be with `code`; -> the output."""
    process = start(arguments)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    return output


def send(process, number, output):
    """Send a signal to the started process; SIGKILL to all of the run, as children outlive it."""
    if number != signal.SIGKILL:
        process.send_signal(number)
        return
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if output in (entry / "cmdline").read_text() and int(entry.name) != os.getpid():
                os.kill(int(entry.name), number)
        except (OSError, UnicodeDecodeError):
            continue


def wait_for(condition, seconds=60):
    """Wait until `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline


def signal_at(arguments, text, number=signal.SIGTERM):
    """Run until a line contains `text`, then send a signal; -> exit code and output."""
    process = start(arguments)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            send(process, number, arguments[arguments.index("--output_dir") + 1])
            break
    else:
        raise AssertionError("".join(lines))
    lines.append(process.communicate(timeout=240)[0])
    return process.returncode, "".join(lines)


def stop_in_mid_epoch(rank=0):
    """Make this process get SIGTERM in the first step of epoch 1; -> the step to put back."""
    usual = Trainer._step

    def step(trainer, *rest):
        if (trainer.state.position.epoch, trainer.state.position.step) == (1, 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(trainer, *rest)

    Trainer._step = step
    return usual


def log(folder):
    """log.txt without values that depend on the clock."""
    timed = {"images_per_s", "data_wait", "epoch_s"}
    records = [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


def status(folder):
    return json.loads((Path(folder) / "status.json").read_text())["status"]


def load(folder, name="checkpoint-last.pth"):
    return torch.load(Path(folder) / name, weights_only=True)


def same(a, b):
    """Whether two nested structures are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_run(ours, undisturbed):
    """Weights and optimizer are equal bit for bit; each epoch is logged once with equal numbers."""
    a, b = load(ours), load(undisturbed)
    for part in ("model", "model_ema", "optimizer", "epoch", "step", "best", "best_epoch"):
        assert same(a.get(part), b.get(part)), part
    assert log(ours) == log(undisturbed)


def assert_as_pillow(ours, theirs):
    """A (3, S, S) uint8 tensor is Pillow's image up to rounding: 0.05 of 255 on average."""
    off = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs))
    assert off.max() <= 1
    assert off.mean() <= 0.05
