"""Reading checkpoints while the disk or the memory fails, and files that would fill the memory."""

import copy
import errno
import io
import os
import resource
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import main_export
import main_finetune
import main_predict
import main_pretrain
from engine_train import TrainState
from models_registry import create_classifier
from runs import (
    CLASSIFIERS,
    FAMILIES,
    SMALL,
    SMALL_FINETUNE,
    assert_same_run,
    load,
    log,
    pretrain,
    run_here,
    status,
)
from training import resume
from util.checkpoint import newest_checkpoint, save_checkpoint
from util.checkpoint.container import Damaged
from util.checkpoint.read import read_checkpoint
from util.download import cached_path, fetch
from util.errors import BAD_INPUT, DONE, FAULT, BadInput, ReadFault
from util.rundir import LAST
from util.weights import load_pretrained

# Programs ignore these warnings of torch; pytest replaces their filters.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("Validating sparse", "Sparse CSR", "TypedStorage", ".*nested", "torch.quantize")
]

NAME = "mae_vit_tiny_300e"


def contents_of(folder):
    """The bytes of a run's files, but for what any start writes."""
    files = {path.name: path for path in Path(folder).iterdir() if path.is_file()}
    return {name: files[name].read_bytes() for name in files.keys() - {".lock", "status.json"}}


# The disk


def fail_reads(monkeypatch, path, fails):
    """Let the n-th read of a file raise ESTALE if `fails(n)`; -> a list that grows with each."""
    reads, usual = [], open

    class Stumbling(io.FileIO):
        def readinto(self, buffer):
            reads.append(path)
            if fails(len(reads)):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return super().readinto(buffer)

    def stumbling(name, mode="r", *rest, **more):
        if not isinstance(name, int) and Path(name) == path and mode == "rb":
            return io.BufferedReader(Stumbling(name))
        return usual(name, mode, *rest, **more)

    monkeypatch.setattr("builtins.open", stumbling)
    monkeypatch.setattr("io.open", stumbling)
    return reads


@pytest.fixture
def two(tmp_path):
    """A folder with two checkpoints; the newer is the last."""
    for epoch in range(2):
        weights = {"w": torch.full((100_000,), float(epoch)), "b": torch.ones(3)}
        save_checkpoint({"model": weights, "epoch": epoch}, tmp_path, epoch if not epoch else None)
    return tmp_path


@pytest.fixture
def reads(two, monkeypatch):
    """How often the newest checkpoint is read from when it is good. There are no pauses then."""
    monkeypatch.setattr("util.files.time.sleep", lambda seconds: None)
    with monkeypatch.context() as counting:
        made = fail_reads(counting, two / LAST, lambda n: False)
        newest_checkpoint(two)
    assert len(made) > 5
    return len(made)


def test_the_newest_checkpoint_is_used_whichever_read_fails_once(two, reads, monkeypatch):
    for bad in range(1, reads + 1):
        with monkeypatch.context() as failing:
            made = fail_reads(failing, two / LAST, lambda n, bad=bad: n == bad)
            found = newest_checkpoint(two)
            assert (found.path, found.damaged) == (two / LAST, [])
            assert found.checkpoint["epoch"] == 1
            assert len(made) == bad + reads


def test_no_older_checkpoint_is_used_whichever_read_keeps_failing(two, reads, monkeypatch):
    for bad in range(1, reads + 1):
        with monkeypatch.context() as failing:
            fail_reads(failing, two / LAST, lambda n, bad=bad: n >= bad)
            with pytest.raises(ReadFault, match=rf"{LAST}: could not be read \(Stale file handle"):
                pytest.fail(f"read {bad} failed, but this was used: {newest_checkpoint(two)}")


@pytest.fixture
def run_on_bad_disk(undisturbed, tmp_path):
    """A run's folder whose newest checkpoint gives a real I/O error; -> it, and the good file."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("mae", 1), folder)
    good = (folder / LAST).rename(tmp_path / "good")
    (folder / LAST).symlink_to("/proc/self/mem")  # nothing can be read at its beginning
    with pytest.raises(OSError, match="Input/output error"):
        (folder / LAST).read_bytes()
    return folder, good


def test_a_disk_that_keeps_failing_ends_the_run_and_changes_nothing(
    run_on_bad_disk, undisturbed, capfd
):
    folder, good = run_on_bad_disk
    assert pretrain(folder) == FAULT
    [line] = capfd.readouterr().err.strip().splitlines()
    assert f"{folder / LAST}: could not be read (Input/output error), although it was" in line
    assert status(folder) == "failed"
    os.replace(good, folder / LAST)
    assert contents_of(folder) == contents_of(undisturbed("mae", 1))
    assert pretrain(folder) == DONE
    assert f"resuming from {folder / LAST}" in capfd.readouterr().out
    assert_same_run(folder, undisturbed("mae", 1))


def test_a_disk_that_fails_for_a_moment_costs_nothing(
    run_on_bad_disk, undisturbed, monkeypatch, capfd
):
    folder, good = run_on_bad_disk
    monkeypatch.setattr("util.files.time.sleep", lambda _: os.replace(good, folder / LAST))
    assert pretrain(folder) == DONE
    said = capfd.readouterr()
    assert f"resuming from {folder / LAST}" in said.out
    assert "warning" not in said.out + said.err
    assert_same_run(folder, undisturbed("mae", 1))


PRETRAIN = f"{SMALL} {FAMILIES['mae']} --num_workers 0 --output_dir {{out}}"
FINETUNE = f"{SMALL_FINETUNE} {CLASSIFIERS['vit']} --data_path synthetic:16:8 --output_dir {{out}}"
READERS = {
    "pretrain --resume": (main_pretrain, f"{PRETRAIN} --resume {{file}}"),
    "--finetune": (main_finetune, f"{FINETUNE} --finetune {{file}}"),
    "--teacher": (main_finetune, f"{FINETUNE} --teacher {{file}}"),
    "--eval": (main_finetune, f"{FINETUNE} --eval --finetune {{file}}"),
    "predict": (main_predict, "--checkpoint {file} --detector none {file}"),
    "export": (main_export, "--checkpoint {file} --to safetensors --output {out}"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_failing_disk_is_a_fault_for_every_program(reader, tmp_path, capfd):
    program, options = READERS[reader]
    file = tmp_path / "weights.pth"
    file.symlink_to("/proc/self/mem")
    assert run_here(program, options.format(file=file, out=tmp_path / "out").split()) == FAULT
    *_, line = capfd.readouterr().err.strip().splitlines()
    assert f"{file}: could not be read (Input/output error)" in line
    assert not list(tmp_path.glob("out/*.pth"))


@pytest.mark.usefixtures("only_here")
@pytest.mark.parametrize("recorded", [True, False])
def test_downloaded_weights_stay_where_they_are_when_the_disk_fails(recorded):
    path = cached_path(NAME)
    path.parent.mkdir()
    path.symlink_to("/proc/self/mem")
    if recorded:
        path.with_name(f"{path.name}.sha256").write_text("0")
    with pytest.raises(ReadFault, match="Input/output error"):
        fetch(NAME)
    assert path.is_symlink()


# Memory


@contextmanager
def little_memory(more=30 << 20):
    """Let this process use only some more bytes than it does already."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, most = usual = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)


def saved_as(kind, content, path):
    """Write a checkpoint in one of three formats; -> its path."""
    if kind == "safetensors":
        save_file(content["model"], path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


LARGE = 30_000_000  # numbers of a tensor that does not fit; beyond what malloc may have kept


@pytest.mark.parametrize("peek", [False, True])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_too_little_memory_is_not_damage(kind, peek, tmp_path):
    path = saved_as(kind, {"model": {"w": torch.zeros(LARGE)}}, tmp_path / "weights")
    with little_memory(), pytest.raises(ReadFault, match="not enough memory to load it"):
        read_checkpoint(path, peek=peek)
    assert read_checkpoint(path, peek=peek)


def test_too_little_memory_while_resuming_ends_the_run_and_changes_nothing(
    undisturbed, tmp_path, monkeypatch, capfd
):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("mae", 1), folder)
    torch.save(load(folder) | {"more": torch.zeros(LARGE)}, folder / LAST)
    before = contents_of(folder)

    def with_little_memory(folder):
        with little_memory():
            return newest_checkpoint(folder)

    monkeypatch.setattr(resume, "newest_checkpoint", with_little_memory)
    assert pretrain(folder) == FAULT
    [line] = capfd.readouterr().err.strip().splitlines()
    assert f"{folder / LAST}: there is not enough memory to load it" in line
    assert contents_of(folder) == before
    assert status(folder) == "failed"


def test_too_little_memory_for_the_restored_state_is_a_fault(
    undisturbed, tmp_path, monkeypatch, capfd
):
    shutil.copytree(undisturbed("mae", 1), tmp_path / "run")
    monkeypatch.setattr(TrainState, "load_state_dict", lambda *_: torch.zeros(10**16))
    assert pretrain(tmp_path / "run") == FAULT
    [line] = capfd.readouterr().err.strip().splitlines()
    assert "not enough memory" in line
    assert log(tmp_path / "run") == log(undisturbed("mae", 1))


# Files that would fill the memory


def rewritten(path, compression=zipfile.ZIP_STORED, twice=0):
    """Pack a checkpoint again; its members are also listed `twice` more often."""
    with zipfile.ZipFile(path) as old:
        members = [(m.filename, old.read(m)) for m in old.infolist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in members:
            new.writestr(name, data)
        new.filelist += [copy.copy(m) for m in new.filelist for _ in range(twice)]
    return path


def compressed(path):
    torch.save({"model": {"w": torch.zeros(LARGE)}}, path)
    assert rewritten(path, zipfile.ZIP_DEFLATED).stat().st_size < 1_000_000
    return "is compressed, which torch.save never does"


def listed_often(path):
    torch.save({"model": {"w": torch.zeros(1_000_000)}}, path)
    assert rewritten(path, twice=100).stat().st_size < 5_000_000
    return r"its members claim 40\d,\d{3},\d{3} bytes, but the file has only 4,"


def repeated_values(path):
    torch.save({"model": {"w": torch.ones(1).expand(10**13)}}, path)
    return r"model\.w claims 40,000,000,000,000 bytes, but the file has only"


def long_storage(path):
    torch.save({"model": {"w": torch.ones(1000)}}, path, _use_new_zipfile_serialization=False)
    data, thousand = path.read_bytes(), b"M\xe8\x03"  # as a pickle has it
    assert data.count(thousand) == 2
    path.write_bytes(data.replace(thousand, b"\x8a\x06" + (10**13).to_bytes(6, "little")))
    return "damaged"


@pytest.mark.parametrize("peek", [False, True])
@pytest.mark.parametrize("bomb", [compressed, listed_often, repeated_values, long_storage])
def test_a_small_file_cannot_fill_the_memory(bomb, peek, tmp_path):
    path = tmp_path / "weights.pth"
    told = bomb(path)
    with little_memory(), pytest.raises(Damaged, match=told) as refusal:
        read_checkpoint(path, peek=peek)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


# Odd tensors

ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "without values": lambda: torch.empty(3, device="meta"),
    "of torch.bits8": lambda: torch.zeros(3, dtype=torch.uint8).view(torch.bits8),
    "of torch.float4": lambda: torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_refused_with_their_names(kind, tmp_path, capfd):
    weights = {**create_classifier("vit_tiny_patch16", 8, input_size=32).state_dict()}
    weights["blocks.0.norm1.weight"] = ODD[kind]()
    path = tmp_path / "weights.pth"
    torch.save({"model": weights, "epoch": 1}, path)
    capfd.readouterr()
    told = ("model.blocks.0.norm1.weight is ", "holds Python objects (")
    told = told if kind == "nested" else told[:1]  # which of them depends on torch's version
    for program, options in (READERS["--finetune"], READERS["predict"]):
        given = options.format(file=path, out=tmp_path / "out").split()
        assert run_here(program, given) == BAD_INPUT
        [line] = capfd.readouterr().err.strip().splitlines()
        assert any(f"{path}: {what}" in line for what in told)
        assert kind.split(" rows")[0] in line


def test_odd_tensors_in_the_state_of_a_run_are_refused(undisturbed, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("mae", 1), folder)
    saved = load(folder)
    saved["optimizer"]["state"][0]["exp_avg"] = ODD["sparse"]()
    torch.save(saved, folder / LAST)
    assert pretrain(folder) == BAD_INPUT
    [line] = capfd.readouterr().err.strip().splitlines()
    assert f"{folder / LAST}: optimizer.state.0.exp_avg is sparse; save it" in line


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"])
def test_weights_of_few_bits_are_loaded(dtype, kind, tmp_path):
    model = create_classifier("vit_tiny_patch16", 8, input_size=32)
    few = {name: v.to(getattr(torch, dtype)) for name, v in model.state_dict().items()}
    path = saved_as(kind, {"model": few}, tmp_path / "weights")
    other = create_classifier("vit_tiny_patch16", 8, input_size=32)
    load_pretrained(other, path, keep_head=True)
    for name, value in other.state_dict().items():
        assert torch.equal(value, few[name].float()), name


def test_a_checkpoint_that_contains_itself_is_read(tmp_path):
    endless = {"model": {"w": torch.ones(2)}}
    endless["again"] = [endless]
    torch.save(endless, tmp_path / "endless")
    assert read_checkpoint(tmp_path / "endless")["model"]["w"].tolist() == [1, 1]
    endless["again"].append(ODD["sparse"]())
    torch.save(endless, tmp_path / "endless")
    with pytest.raises(BadInput, match=r"again\.1 is sparse"):
        read_checkpoint(tmp_path / "endless")
