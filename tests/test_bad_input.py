"""Bad input: exit code 2 and one line that names the flag or file, before any training."""

import json
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from main_pretrain import build_parser, check_options
from runs import command, pretrain, signal_at, start, status
from util import program
from util.checkpoint.read import read_checkpoint
from util.errors import BAD_INPUT, BadInput, Fault
from util.program import run_program
from util.stop import SIGNALS


@pytest.fixture(autouse=True)
def signals():
    """Restore the signal handlers that a run in this process replaces."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--modle", "x"], ["--modle", "--model"]),
        (["--model", "mae_vit_bse_patch16"], ["--model", "mae_vit_base_patch16"]),
        (["--mask_ratio", "1.0"], ["--mask_ratio", "< 1", "'1.0'"]),
        (["--mask_ratio", "nan"], ["--mask_ratio", "'nan'"]),
        (["--mask_ratio", "0.99"], ["--mask_ratio 0.99", "leaves 0 of 9"]),
        (["--mask_ratio", "1e-9"], ["--mask_ratio 1e-09 leaves 9 of 9"]),
        (["--predict_ratio", "0"], ["--predict_ratio", "> 0", "'0'"]),
        (["--predict_ratio", "1.5"], ["--predict_ratio", "<= 1", "'1.5'"]),
        (["--input_size", "50"], ["--input_size 50", "multiple of the patch size, 16", "48"]),
        (["--batch_size", "0"], ["--batch_size", "whole number >= 1"]),
        (["--batch_size", "91"], ["90 images", "--batch_size 91", "× 1 processes = 91"]),
        (["--blr", "inf"], ["--blr", "'inf'"]),
        (["--lr", "-1"], ["--lr", ">= 0"]),
        (["--epochs", "two"], ["--epochs", "'two'"]),
        (["--start_epoch", "2"], ["--start_epoch 2", "--epochs 2"]),
        (["--norm_pix_loss", "maybe"], ["--norm_pix_loss", "True or False"]),
        (["--decoder_embed_dim", "30"], ["--decoder_embed_dim 30", "--decoder_num_heads 2"]),
        (
            ["--model", "convnextv2_atto"],
            ["--decoder_num_heads", "not an option of convnextv2_atto"],
        ),
        (["--device", "tpu"], ["--device tpu"]),
        (["--amp", "fp16", "--device", "cpu"], ["--amp fp16", "CPU"]),
        (["--data_path", "/nowhere/at/all"], ["--data_path", "/nowhere/at/all"]),
        (["--resume", "/nowhere/x.pth"], ["/nowhere/x.pth", "no such file"]),
        (["@/nowhere/recipe.args"], ["/nowhere/recipe.args"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_wrong_options_are_named(refuse, options, expected):
    line = refuse(options)
    for text in expected:
        assert text in line


def test_an_empty_folder_and_one_of_broken_images_are_named(refuse, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}" in refuse(["--data_path", empty])
    for k in range(90):
        (empty / f"{k}.jpg").write_bytes(b"<html>quota exceeded</html>")
    assert "none of the 32 images tried can be read" in refuse(["--data_path", empty])


def test_more_than_five_percent_unreadable_images_end_a_run(tmp_path, capfd):
    folder = tmp_path / "faces"
    folder.mkdir()
    for k in range(48):
        Image.fromarray(np.full((20, 20, 3), 5 * k, np.uint8)).save(folder / f"{k}.png")
    for k in range(0, 48, 12):
        (folder / f"{k}.png").write_bytes(b"")
    assert pretrain(tmp_path, f"--data_path {folder}") == BAD_INPUT
    error = capfd.readouterr().err
    assert "of 48 images cannot be read, more than 5%" in error
    assert (tmp_path / "bad_images.txt").read_text().count("\n") >= 3
    assert status(tmp_path) == "bad_input"


@pytest.fixture
def checkpoints(tmp_path):
    """Files that are not checkpoints of this run."""
    torch.save({"model": {"weight": torch.full((3,), 1.5)}}, tmp_path / "good.pth")
    whole = (tmp_path / "good.pth").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(np.full(3, 1.5, np.float32).tobytes())] ^= 1
    contents = {
        "empty": b"",
        "zeros": b"\0" * 3000,
        "page": b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>",
        "truncated": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "text": b"hello",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
    torch.save([1, 2], tmp_path / "list.pth")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty", "empty"),
        ("zeros", "damaged"),
        ("page", "a web page"),
        ("truncated", "truncated or damaged"),
        ("flipped", "damaged (checksum"),
        ("text", "not a PyTorch checkpoint"),
        ("list", "holds a list"),
        ("good", "no ViT, ConvNeXt V2 or ResNet in a known layout"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_named(refuse, checkpoints, name, expected):
    path = checkpoints / f"{name}.pth"
    before = path.read_bytes()
    line = refuse(["--resume", path])
    assert str(path) in line
    assert expected in line
    assert path.read_bytes() == before


def test_official_checkpoints_with_a_namespace_can_be_read(tmp_path):
    from argparse import Namespace

    torch.save({"model": {}, "args": Namespace(lr=0.1)}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["args"].lr == 0.1
    with pytest.raises(BadInput, match="no such file"):
        read_checkpoint(tmp_path / "b.pth")


def test_a_fault_is_reported_with_its_reason(tmp_path, capfd):
    def work(args):
        raise Fault("the loss was not finite")

    argv = ["--output_dir", str(tmp_path)]
    assert run_program(build_parser, check_options, work, argv) == 1
    assert "error: the loss was not finite" in capfd.readouterr().err
    state = json.loads((tmp_path / "status.json").read_text())
    assert state == {"status": "failed", "reason": "the loss was not finite"}


def test_only_rank_0_prints_the_error_under_a_launcher(tmp_path):
    arguments = command(tmp_path / "out", more="--data_path /nowhere/at/all", processes=2)
    process = start(arguments)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert output.count("main_pretrain.py: error: --data_path") == 1
    runpy = r'Traceback \(most recent call last\):\n  File "(<frozen runpy>|\S*runpy\.py)'
    launcher = re.compile(runpy)
    assert "Traceback" not in launcher.sub("", output.split("ChildFailedError")[0])
    assert status(tmp_path / "out") == "bad_input"


@pytest.mark.parametrize(("rank", "local", "speaks"), [(0, 0, True), (8, 0, True), (9, 1, False)])
def test_before_the_rendezvous_one_process_per_machine_prints_the_error(
    monkeypatch, rank, local, speaks
):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(program.time, "sleep", lambda seconds: None)
    assert program.is_reporter(BAD_INPUT, "--device cuda: …") == speaks


def test_ctrl_c_saves_and_leaves_a_resumable_run(tmp_path):
    code, output = signal_at(command(tmp_path), "epoch 0/2  step 3/", signal.SIGINT)
    assert code == 75, output
    assert status(tmp_path) == "resumable"


def test_auto_resume_off_never_overwrites_a_run(refuse, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "checkpoint-last.pth").write_bytes(b"precious")
    line = refuse(["--auto_resume", "False"], tmp_path / "kept")
    assert "would overwrite" in line
    assert (tmp_path / "kept" / "checkpoint-last.pth").read_bytes() == b"precious"
