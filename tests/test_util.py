"""Small parts: schedule, weight decay, checkpoint files, logs, processes and GPUs."""

import json
import os
from contextlib import suppress

import pytest
import torch

from models_registry import create_pretrain_model
from training.resume import choose_checkpoint
from util import distributed
from util.checkpoint import newest_checkpoint, save_checkpoint
from util.distributed import ProcessInfo, find_process, pick_device
from util.errors import FAULT, BadInput
from util.files import creating, replacing
from util.log import Meter, cut_log, duration
from util.optim import adamw, parameter_groups
from util.program import outcome
from util.schedule import lr_at, scaled_lr


def test_the_schedule_warms_up_linearly_and_ends_at_its_floor():
    def lr(epoch, warmup=40):
        return lr_at(epoch, peak=1.0, floor=0.1, warmup=warmup, epochs=400)

    assert lr(0) == 0
    assert lr(20) == pytest.approx(0.5)
    assert lr(40) == pytest.approx(1.0)
    assert lr(220) == pytest.approx(0.55)  # halfway down the cosine
    assert lr(400) == pytest.approx(0.1)
    assert lr(0, warmup=0) == pytest.approx(1.0)
    assert lr(399, warmup=500) == pytest.approx(399 / 500)
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch16", "convnextv2_atto"])
def test_every_parameter_is_in_one_group_and_only_weights_are_decayed(name):
    model = create_pretrain_model(name, input_size=64, decoder_depth=1)
    decayed, rest = adamw(parameter_groups(model, 0.05), 0.1).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    rest_names = {names[id(p)] for p in rest["params"]}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert decayed_names | rest_names == trained
    assert not decayed_names & rest_names
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    for name in trained:
        exempt = name.endswith("bias") or any(
            part in name for part in ("norm", "token", "grn", "downsample_layers.0.1")
        )
        exempt |= "downsample_layers" in name and model.get_parameter(name).ndim == 1
        assert (name in rest_names) == exempt, name


def checkpoint(epoch):
    return {"model": {"w": torch.full((50,), float(epoch))}, "epoch": epoch}


def test_only_the_newest_numbered_checkpoints_are_kept(tmp_path):
    for epoch in range(5):
        save_checkpoint(checkpoint(epoch), tmp_path, epoch, keep=2)
    save_checkpoint(checkpoint(9), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-3.pth", "checkpoint-4.pth", "checkpoint-last.pth"]
    assert torch.load(tmp_path / "checkpoint-4.pth", weights_only=True)["epoch"] == 4
    assert newest_checkpoint(tmp_path).checkpoint["epoch"] == 9


def test_resuming_an_earlier_epoch_deletes_no_later_checkpoint(tmp_path):
    for epoch in (7, 8, 2, 3, 4):
        save_checkpoint(checkpoint(epoch), tmp_path, epoch, keep=2)
    names = {path.name for path in tmp_path.glob("checkpoint-[0-9]*")}
    assert names == {f"checkpoint-{n}.pth" for n in (3, 4, 7, 8)}


def test_numbered_checkpoints_are_copied_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(checkpoint(1), tmp_path, 1)
    save_checkpoint(checkpoint(2), tmp_path)
    assert torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)["epoch"] == 1


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with replacing(path) as file:
            file.write(b"new, but")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_broken_pipe_is_a_fault_without_a_traceback(capfd):
    code, reason = outcome(BrokenPipeError(32, "Broken pipe"))
    assert (code, reason) == (FAULT, "BrokenPipeError: Broken pipe")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_filled_at_the_end_or_not_at_all(tmp_path, there):
    folder = tmp_path / "new"
    if there:
        folder.mkdir()
        before = folder.stat().st_ino
    for fails in (True, False):
        with suppress(OSError), creating(folder) as place:
            (place / "a").write_text("a")
            assert not (folder / "a").exists()
            if fails:
                raise OSError("disk full")
        assert os.listdir(tmp_path) == ["new"] * (there or not fails)
        assert not folder.exists() or os.listdir(folder) == ["a"] * (not fails)
    assert (
        not there or folder.stat().st_ino == before
    )  # a shell may be in it, or it may be a mount point


def test_the_start_order_is_own_checkpoint_then_resume_then_nothing(tmp_path):
    assert choose_checkpoint(tmp_path, True, "")[0] is None
    assert str(choose_checkpoint(tmp_path, True, "other.pth")[0]) == "other.pth"
    save_checkpoint(checkpoint(1), tmp_path)
    assert choose_checkpoint(tmp_path, True, "other.pth")[0] == tmp_path / "checkpoint-last.pth"
    assert str(choose_checkpoint(tmp_path, False, "other.pth")[0]) == "other.pth"
    with pytest.raises(BadInput, match="would overwrite"):
        choose_checkpoint(tmp_path, False, "")
    (tmp_path / "checkpoint-last.pth").write_bytes(b"")
    with pytest.raises(BadInput, match="--resume"):
        choose_checkpoint(tmp_path, True, "")
    assert str(choose_checkpoint(tmp_path, True, "other.pth")[0]) == "other.pth"


def test_only_later_repeated_and_incomplete_lines_are_cut_from_the_log(tmp_path):
    path = tmp_path / "log.txt"
    lines = [json.dumps({"epoch": k, "train_loss": k / 10}) for k in (0, 1, 1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"epoch": 4, "train_l')
    cut_log(path, 3)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1, 2]
    before = path.stat().st_mtime_ns
    cut_log(path, 3)
    assert path.stat().st_mtime_ns == before


def test_speed_data_wait_and_durations():
    meter = Meter(steps_left=10)
    for _ in range(4):
        meter.step(seconds=0.5, waited=0.1)
    values = meter.take(images_a_step=32)
    assert values["images_per_s"] == pytest.approx(64)
    assert values["data_wait"] == pytest.approx(0.2)
    assert meter.take(32)["images_per_s"] == 0
    assert [duration(s) for s in (9, 250, 7980)] == ["9 s", "4 min 10 s", "2 h 13 min"]


@pytest.mark.parametrize(
    ("environment", "options", "process"),
    [
        ({}, {}, ProcessInfo(0, 1, 0, 1)),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            {},
            ProcessInfo(3, 4, 1, 2),
        ),
        ({"RANK": "3", "WORLD_SIZE": "4"}, {"local_rank": 1}, ProcessInfo(3, 4, 1, 1)),
        (
            {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"},
            {"world_size": 8},
            ProcessInfo(5, 8, 1, 4),
        ),
        (
            {"SLURM_PROCID": "5", "SLURM_LOCALID": "5", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
            {"world_size": 16},
            ProcessInfo(5, 16, 5, 8),
        ),
        (
            {"SLURM_PROCID": "0"},
            {},
            ProcessInfo(0, 1, 0, 1),
        ),  # in an allocation, but not under srun
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            {"dist_on_itp": True},
            ProcessInfo(2, 4, 0, 2),
        ),
    ],
    ids=["alone", "torchrun", "launch", "srun", "srun of tasks", "sbatch", "mpi"],
)
def test_ranks_are_read_from_every_launcher(monkeypatch, environment, options, process):
    for name in list(os.environ):
        if name.startswith(("RANK", "WORLD", "LOCAL_", "SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_process(**options) == process


@pytest.mark.parametrize(
    ("gpus", "environment", "found"),
    [
        (8, ("RANK", "TORCHELASTIC_RUN_ID"), 3),
        (1, (), 0),
        (8, (), 3),
        (1, ("RANK",), 0),
        (1, ("RANK", "TORCHELASTIC_RUN_ID"), None),
    ],
    ids=["torchrun", "srun, own GPU", "srun, all GPUs", "RANK, own GPU", "torchrun, too few"],
)
def test_a_process_finds_its_gpu(monkeypatch, gpus, environment, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in environment:
        monkeypatch.setenv(name, "3")
    process = ProcessInfo(3, 8, 3, 8)
    if found is None:
        with pytest.raises(BadInput, match="this machine's processes need GPU 7, but torch sees 1"):
            pick_device("cuda", process)
    else:
        assert pick_device("cuda", process) == torch.device("cuda", found)


@pytest.mark.parametrize(
    ("others", "share"),
    [
        ([("here", range(80))] * 7, 10),  # torchrun: all use the same cores
        ([("here", range(80 + k, 90 + k)) for k in range(0, 70, 10)], 80),  # srun gave each its own
        ([("there", range(80))] * 8, 80),  # another machine
        ([("here", range(40))], 60),
    ],
    ids=["shared", "bound", "two machines", "overlapping"],
)
def test_cores_are_divided_among_the_processes_that_share_them(monkeypatch, others, share):
    monkeypatch.setattr(distributed, "_machine", lambda: "here")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(80)), raising=False)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, *others])
    assert distributed.own_cores() == share
