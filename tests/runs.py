"""Starting real training runs from tests."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    "mae": "--model mae_vit_tiny_patch16 --decoder_embed_dim 32 --decoder_depth 1 "
    "--decoder_num_heads 2 --input_size 48",
    "fcmae": "--model convnextv2_atto --decoder_embed_dim 32 --input_size 64",
}
SMALL = (
    "--data_path synthetic:90 --epochs 2 --warmup_epochs 1 --batch_size 8 --print_freq 1 "
    "--num_workers 1 --vis_freq 0"
)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(output, family="mae", more="", processes=1):
    """The command line of a small run; later options overrule earlier ones."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.launch", f"--nproc_per_node={processes}"]
        launcher += ["--master_port", str(free_port())]
    options = f"{SMALL} {FAMILIES[family]} --output_dir {output} {more}"
    return [*launcher, str(ROOT / "main_pretrain.py"), *options.split()]


def start(arguments):
    """A run as a process, both outputs in one pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def finish(arguments, code=0):
    """Run to the end; its output."""
    process = start(arguments)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    return output


def send(process, number, output):
    """Ask the process started; but kill all of a run, for a launcher's children outlive it."""
    if number != signal.SIGKILL:
        process.send_signal(number)
        return
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if output in (entry / "cmdline").read_text() and int(entry.name) != os.getpid():
                os.kill(int(entry.name), number)
        except (OSError, UnicodeDecodeError):
            continue


def signal_at(arguments, text, number=signal.SIGTERM):
    """Run until a line holds `text`, send a signal; its exit code and output."""
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


def log(folder):
    """log.txt without what depends on the clock."""
    timed = {"images_per_s", "data_wait", "epoch_s"}
    records = [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


def status(folder):
    return json.loads((Path(folder) / "status.json").read_text())["status"]


def load(folder, name="checkpoint-last.pth"):
    return torch.load(Path(folder) / name, weights_only=True)


def same(a, b):
    """Whether two nested structures hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_run(ours, undisturbed):
    """Bit for bit the same weights and optimizer; every epoch logged once, with equal numbers."""
    a, b = load(ours), load(undisturbed)
    for part in ("model", "optimizer", "epoch", "step"):
        assert same(a[part], b[part]), part
    assert log(ours) == log(undisturbed)
