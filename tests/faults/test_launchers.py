"""Launchers: what they set wrongly, ports in use, unknown hosts, and launchers that are killed."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import main_pretrain
from runs import (
    ROOT,
    assert_same_run,
    command,
    free_port,
    load,
    run_here,
    run_two,
    small_run,
    start,
    status,
    wait_for,
)
from util.distributed import ProcessInfo, find_process
from util.errors import FAULT, BadInput
from util.rendezvous import Address, find_address

MAINS = sorted(ROOT.glob("main_*.py"))
TWO = {"RANK": "0", "WORLD_SIZE": "2"}
HERE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def launch(monkeypatch):
    """Set the environment that a launcher sets."""

    def set_all(environment):
        for name in (*TWO, *HERE, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("environment", "options", "told"),
    [
        (TWO, "", "MASTER_ADDR is not set: start several processes with torchrun"),
        (TWO | HERE | {"RANK": ""}, "", "RANK is '' in the environment"),
        (TWO | HERE | {"RANK": "two"}, "", "RANK is 'two' in the environment"),
        (TWO | HERE | {"WORLD_SIZE": "-2"}, "", "WORLD_SIZE is '-2' in the environment"),
        (TWO | HERE | {"RANK": "2"}, "", "rank 2 of 2 processes: ranks start at 0"),
        (TWO | HERE | {"LOCAL_RANK": "x"}, "", "LOCAL_RANK is 'x' in the environment"),
        (TWO | HERE | {"MASTER_PORT": "abc"}, "", "MASTER_PORT is 'abc' in the environment"),
        (TWO | HERE | {"MASTER_PORT": "70000"}, "", "MASTER_PORT=70000: a port is a number from 1"),
        (TWO, "--dist_url nowhere", "--dist_url nowhere: must be env://, tcp://HOST:PORT or"),
        (TWO, "--dist_url tcp://here:0", "--dist_url tcp://here:0: a port is a number from 1"),
        ({"SLURM_PROCID": "4"}, "--world_size 4", "rank 4 of 4 processes"),
        ({"OMPI_COMM_WORLD_RANK": "x"}, "--dist_on_itp", "OMPI_COMM_WORLD_RANK is 'x' in"),
    ],
)
def test_a_wrong_environment_gives_one_line(environment, options, told, launch, refuse):
    launch(environment)
    assert told in refuse(options.split())


def test_a_program_without_a_launcher_is_one_process(launch):
    launch({})
    assert find_process() == find_process(dist_on_itp=True) == ProcessInfo()


def test_addresses_of_both_kinds_are_understood(launch):
    launch({"MASTER_ADDR": "::1", "MASTER_PORT": "29500"})
    assert find_address("env://")[1:] == ("::1", 29500)
    assert find_address("tcp://[fe80::1]:80") == Address(
        "--dist_url tcp://[fe80::1]:80", "fe80::1", 80
    )
    assert find_address("tcp://node-1.cluster:80")[1:] == ("node-1.cluster", 80)
    assert find_address("file:///shared/store") is None
    with pytest.raises(BadInput):
        find_address("tcp://fe80::1:80")


def fails(options, tmp_path, capfd):
    """Run in this process until it fails; -> its lines on standard error."""
    assert run_here(main_pretrain, small_run(tmp_path / "out", options)) == FAULT
    return capfd.readouterr().err.strip().splitlines()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_in_use_is_named(family, launch, tmp_path, capfd):
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family) as busy:
        busy.bind((host, 0))
        busy.listen()
        port = busy.getsockname()[1]
        launch(TWO | {"MASTER_ADDR": host, "MASTER_PORT": str(port)})
        [line] = fails("--dist_timeout 5", tmp_path, capfd)
    assert f"MASTER_PORT={port}: port {port} cannot be used" in line
    assert "(Address already in use)" in line


@pytest.mark.parametrize("host", ["nohost.invalid", "no..host"])
def test_an_unknown_host_is_named_at_once_and_after_the_time_out(host, launch, tmp_path, capfd):
    launch(TWO | {"RANK": "1", "MASTER_ADDR": host, "MASTER_PORT": "29500"})
    warning, error = fails("--dist_timeout 1", tmp_path, capfd)
    assert f"{host} is unknown here" in warning
    assert "even after --dist_timeout 1 s; correct the name" in error


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("main_*.py"), ROOT / "app.py"]), ids=lambda p: p.stem
)
def test_programs_start_without_their_folder_on_the_path(path, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-P", path, "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr


# Launchers that end before their processes


def torchrun(output, port):
    _, *program = command(output, more="--num_workers 1 --epochs 2")
    options = ["--nproc_per_node", "2", "--master_port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *options, *program]


def await_line(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines))


def test_processes_whose_launcher_is_killed_save_and_stop(undisturbed, tmp_path):
    launcher = start(torchrun(tmp_path, free_port()))
    await_line(launcher, "epoch 0/2  step 2/")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    rest = launcher.communicate(timeout=60)[0]  # until its processes have closed their output
    assert "asked to stop (launcher ended): saved after step" in rest
    assert "Traceback" not in rest
    assert status(tmp_path) == "resumable"
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), 20)
    run_two("main_pretrain", small_run(tmp_path))
    assert_same_run(tmp_path, undisturbed("mae", 2))


@pytest.mark.long
def test_torchrun_under_nohup_saves_on_a_hang_up(tmp_path):
    """It handles SIGHUP in spite of nohup, and passes it on."""
    launcher = start(["nohup", *torchrun(tmp_path, free_port())])
    await_line(launcher, "epoch 0/2  step 2/")
    launcher.send_signal(signal.SIGHUP)
    rest = launcher.communicate(timeout=60)[0]
    assert "asked to stop (SIGHUP): saved after step" in rest
    assert status(tmp_path) == "resumable"
    assert load(tmp_path)["step"] >= 2


def test_a_second_torchrun_on_the_same_port_does_not_disturb_the_first(undisturbed, tmp_path):
    port = free_port()
    first = start(torchrun(tmp_path / "first", port))
    await_line(first, "epoch 0/2  step 1/")
    first.send_signal(signal.SIGSTOP)  # keeps the port, even if its processes end before then
    second = start(torchrun(tmp_path / "second", port))
    said = second.communicate(timeout=120)[0]
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert f"port: {port}" in said
    rest = first.communicate(timeout=120)[0]
    assert first.returncode == 0, rest
    assert_same_run(tmp_path / "first", undisturbed("mae", 2))
