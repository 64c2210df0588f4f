"""Whatever is given, a user sees it work or one line: never a traceback.

`make test` tries the same few examples every time, `make test-long` many new ones.
"""

import csv
import io
import os
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from layouts import write_ferplus_csv, write_ferplus_folders, write_fer2013, write_rafdb
from layouts_affectnet import write_affectnet_csv, write_affectnet_npy, write_affectnet_plus
from odd_images import write_faces
from runs import run_here
from safetensors.torch import save_file

import main_finetune
import main_pack
import main_pretrain
from datasets import open_labelled, open_source
from datasets.decode import UnreadableImage
from models_registry import create_classifier
from util import download, options_finetune, report
from util.checkpoint import read_checkpoint
from util.errors import BAD_INPUT, DONE, BadInput
from util.program import run_program
from util.rundir import RunDir
from util.weights import find_source, load_pretrained

CALM = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


def few(count):
    """So many examples in `make test`, always the same."""
    return settings(max_examples=count, derandomize=True, **CALM)


def many(count):
    return settings(max_examples=count, **CALM)


NASTY = [
    *("", " ", "0", "-0", "1", "-1", "2", "7", "0.5", "1e3", "1e-320", "1e400", "nan", "inf", "-inf"),
    *("1" + "0" * 30, "-1" + "0" * 30, "9" * 400, "9" * 5000, "1e30", "1_000", "0x10", " 5 ", "+3"),
    *("٣", "²", "½", "𝟝", "true", "False", "maybe", "None", "[]", "16:48", "48:16", "0:0", ":", "a:b"),
    *("a\nb", "\r", "\t", "\x1b[31m", "caf\udce9", "\udcff", "a\0b", "é" * 4000, "/" * 4000, "..", "~"),
    *("~nobody/x", "/dev/null", "/dev/full", "/proc/self/mem", "%s%n", "{0}", "$HOME", "`id`", "--"),
    *("@", "@nowhere", "@/dev/null", "@self.args", "@binary.args", "@quote.args", "@.", "@a\0b", "@@"),
    *("cpu", "synthetic:0", "synthetic:-1", "synthetic:٣", "mae_vit_tiny_patch16", "convnextv2_atto"),
]
VALUES = st.one_of(st.sampled_from(NASTY), st.text(max_size=20), st.floats().map(str))
VALUES |= st.integers(-(10**31), 10**31).map(str)
PROGRAMS = {
    "pretrain": (main_pretrain.build_parser, main_pretrain.check_options),
    "finetune": (options_finetune.build_parser, options_finetune.check_options),
    "pack": (main_pack.build_parser, main_pack.check_options),
    "download": (download.build_parser, lambda _: None),
    "report": (report.build_parser, lambda _: None),
}


def command_lines(program):
    """Known flags, once in a while an unknown one, each with none, one or two values."""
    flags = sorted(PROGRAMS[program][0]()._option_string_actions)
    flags = [flag for flag in flags if flag not in ("-h", "--help", "--output_dir")]
    flag = st.sampled_from(flags) | st.sampled_from(["--modle", "-x", "--a\nb", "--é", "--batch-size"])
    option = st.tuples(flag, st.lists(VALUES, max_size=2)).map(lambda o: [o[0], *o[1]])
    joined = st.tuples(flag, VALUES).map(lambda o: ["=".join(o)])
    return st.lists(option | joined | VALUES.map(lambda v: [v]), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a command is given; files of options lie in it."""
    here, before = tmp_path_factory.mktemp("here"), os.getcwd()
    (here / "self.args").write_text("--epochs 3\n@self.args\n")
    (here / "binary.args").write_bytes(bytes(range(256)))
    (here / "quote.args").write_text("--model 'mae")
    os.chdir(here)
    yield here
    os.chdir(before)


def ends_well(program, argv):
    """It works, or exit code 2 and one line of plain characters."""
    parser, check = PROGRAMS[program]
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    try:
        code = run_program(parser, check, lambda _: None, list(argv))
        sys.stderr.flush()
        said = sys.stderr.buffer.getvalue().decode()
    finally:
        sys.stdout, sys.stderr = stdout, stderr
    if code == DONE:
        assert said == "", argv
        return
    assert code == BAD_INPUT, (argv, said)
    assert said.count("\n") == 1, (argv, said)
    assert said[:-1].isprintable(), (argv, said)
    assert "Traceback" not in said


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_nasty_value_for_each_option(program, folder):
    """All of them, one after another."""
    for name, action in PROGRAMS[program][0]()._option_string_actions.items():
        if name.startswith("--") and name != "--help":
            for value in NASTY:
                ends_well(program, [name, value])
                if action.nargs == 2:
                    ends_well(program, [name, value, value])
    for value in NASTY:
        ends_well(program, [value])


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_command_line_works_or_is_one_line(program, folder):
    @few(60)
    @given(command_lines(program))
    def check(parts):
        ends_well(program, [arg for part in parts for arg in part])

    check()


@pytest.mark.long
@pytest.mark.parametrize("program", PROGRAMS)
def test_many_command_lines_work_or_are_one_line(program, folder):
    @many(20_000)
    @given(command_lines(program))
    def check(parts):
        ends_well(program, [arg for part in parts for arg in part])

    check()


# Paths, where they are used


PATHS = [v for v in NASTY if "\0" not in v and not v.startswith("/dev/full")]
USES = {
    "images": open_source,
    "labels": open_labelled,
    "weights": find_source,
    "cache": lambda path: download.fetch("mae_vit_tiny_300e", path, url="http://127.0.0.1:9/"),
}


@pytest.mark.parametrize("use", USES)
def test_a_path_that_cannot_be_is_bad_input(use, folder, only_here, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    for path in [*PATHS, "/proc/self/fd/999", "/proc/1/root/x", "self.args/x", "x" * 300]:
        try:
            USES[use](path)
        except BadInput as error:
            assert str(error)
    for path in folder.iterdir():  # what the cache's folders leave
        assert path.is_dir() or path.suffix == ".args"


def test_an_output_dir_that_cannot_be_is_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ["é" * 4000, "x" * 300, "/proc/x", "/dev/null/x", "/proc/self/mem", "a\0b"]:
        with pytest.raises(BadInput):
            RunDir(path)


# Bytes


BYTES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "zero", "swap", "number"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=6,
)


def damaged(data, changes):
    """The bytes after some changes, each at a share of the length."""
    data = bytearray(data)
    for kind, share, other in changes:
        at = int(share * len(data))
        if kind == "flip" and data:
            data[at] ^= other[0] or 1
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = other
        elif kind == "zero":
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        elif kind == "swap":
            data[at : at + len(other)] = other
        elif kind == "number":
            data[at : at + 8] = (2**63 - 1 - other[0]).to_bytes(8, "little")
    return bytes(data)


@pytest.fixture(scope="module")
def model():
    return create_classifier("convnextv2_atto", 7, input_size=32)


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """A small checkpoint in each format; torch's headers are most of it."""
    root = tmp_path_factory.mktemp("contents")
    tensors = {"norm.weight": torch.ones(4), "head.bias": torch.arange(3)}
    content = {"model": tensors, "epoch": 3, "args": {"lr": 0.1, "model": "x"}, "classes": ["a"]}
    torch.save(content, root / "zip")
    torch.save(content, root / "legacy", _use_new_zipfile_serialization=False)
    save_file(tensors, root / "safetensors")
    return {path.name: path.read_bytes() for path in root.iterdir()}


def loads_or_says_why(path, model):
    try:
        checkpoint = read_checkpoint(path)
        load_pretrained(model, path, checkpoint=checkpoint)
    except BadInput as error:
        assert str(error)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_damaged_checkpoint_is_bad_input(kind, contents, model, tmp_path):
    @few(150)
    @given(BYTES)
    def check(changes):
        (tmp_path / "weights").write_bytes(damaged(contents[kind], changes))
        loads_or_says_why(tmp_path / "weights", model)

    check()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_many_damaged_checkpoints_are_bad_input(kind, contents, model, tmp_path):
    @many(20_000)
    @given(BYTES)
    def check(changes):
        (tmp_path / "weights").write_bytes(damaged(contents[kind], changes))
        loads_or_says_why(tmp_path / "weights", model)

    check()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch that can be gone on from."""
    return pretrain(tmp_path_factory.mktemp("trained"), "--epochs 1") / "checkpoint-last.pth"


def pretrain(out, more, code=DONE):
    model = "--model convnextv2_atto --decoder_embed_dim 8 --input_size 64 --mask_ratio 0.5"
    data = "--data_path synthetic:4 --batch_size 4 --warmup_epochs 0 --num_workers 0 --vis_freq 0"
    assert run_here(main_pretrain, f"{model} {data} --output_dir {out} {more}".split()) == code
    return out


JUNK = [None, -1, 10**30, "x", [], {}, {"a": 1}, 0.5, float("nan"), torch.ones(2), [[1]], ("a",)]


@pytest.mark.parametrize("key", ["model", "optimizer", "scaler", "epoch", "step", "run", "sums"])
def test_a_checkpoint_with_something_else_in_it_is_one_line(key, trained, tmp_path, capfd):
    saved = torch.load(trained, weights_only=True)
    for number, junk in enumerate(JUNK):
        torch.save(saved | {key: junk}, tmp_path / "bad.pth")
        if key == "scaler" and not junk and not isinstance(junk, float):
            continue  # of a run without loss scaling
        out = tmp_path / f"out{number}"
        pretrain(out, f"--epochs 2 --resume {tmp_path / 'bad.pth'}", BAD_INPUT)
        [line] = capfd.readouterr().err.strip().splitlines()
        assert "bad.pth" in line


# Lists and CSVs


CELLS = [v for v in NASTY if len(v) < 1000] + ['"', "'", ",", "\n", "1e308", "-1e308", "8", "10", "11"]


def list_changes():
    """Changes to rows of a list: (kind, row as a share, cell, what it becomes)."""
    kinds = st.sampled_from(["cell", "cell", "cell", "drop", "row", "twice", "delete"])
    share = st.floats(0, 1, exclude_max=True)
    return st.lists(st.tuples(kinds, share, st.integers(0, 11), st.sampled_from(CELLS)), max_size=3)


def changed(text, changes, delimiter):
    """A list with other cells and rows; a cell is written as it is, quoted or not."""
    rows = [line.split(delimiter) for line in text.splitlines()]
    for kind, share, column, value in changes:
        at = int(share * len(rows))
        if at >= len(rows):
            continue
        row = rows[at]
        if kind == "cell":
            row[column % len(row)] = value
        elif kind == "drop":
            del row[column % len(row)]
        elif kind == "row":
            rows[at] = [value]
        elif kind == "twice":
            rows.insert(at, list(row))
        elif kind == "delete" and len(rows) > 1:
            del rows[at]
        if not rows[min(at, len(rows) - 1)]:
            rows[min(at, len(rows) - 1)] = [""]
    return "\n".join(delimiter.join(row) for row in rows).encode("utf-8", "surrogateescape")


LISTS = {  # how the set is written, its list, what stands between its cells
    "rafdb": (
        lambda root: write_rafdb(root, drawn=False),
        "basic/EmoLabel/list_patition_label.txt",
        " ",
    ),
    "affectnet": (
        lambda root: write_affectnet_csv(root, {"train": (1,) * 8, "test": (1,) * 8}),
        "Manually_Annotated_file_lists/training.csv",
        ",",
    ),
    "affectnet-npy": (
        lambda root: write_affectnet_npy(root, {"train": (2,) * 8}),
        "train_set/annotations/1_exp.npy",
        ",",
    ),
    "affectnet-json": (
        lambda root: write_affectnet_plus(root, {"train": (2,) * 8}),
        "human_annotated/train_set/annotations/1.json",
        " ",
    ),
    "ferplus": (lambda root: write_ferplus_csv(root, drawn=False), "fer2013new.csv", ","),
    "ferplus-pixels": (lambda root: write_ferplus_csv(root, drawn=False), "fer2013.csv", " "),
    "ferplus-folders": (
        lambda root: write_ferplus_folders(root, drawn=False),
        "FER2013Train/label.csv",
        ",",
    ),
    "fer2013": (lambda root: write_fer2013(root, drawn=False), "fer2013.csv", ","),
    "list": (lambda root: write_list(root, "list.txt"), "list.txt", ","),
    "csv": (lambda root: write_list(root, "list.csv"), "list.csv", ","),
}


def write_list(root, name):
    write_faces(root, 5)
    rows = [["id", "path"], *([k, f"good00{k}.png"] for k in range(5))]
    with open(root / name, "w", newline="") as file:
        csv.writer(file).writerows(rows if name.endswith(".csv") else [row[1:] for row in rows])


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """The file of a set's list, written once, and its own bytes."""
    written = {}

    def write(kind):
        if kind not in written:
            root = tmp_path_factory.mktemp(kind)
            LISTS[kind][0](root)
            path = root / LISTS[kind][1]
            written[kind] = root, path, path.read_bytes()
        return written[kind]

    return write


def opens_or_says_why(kind, root, path):
    rules = ("argmax", "votes") if kind.startswith("ferplus") else (None,)
    for rule in rules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if kind in ("list", "csv"):
                    source = open_source(path)
                else:
                    data = open_labelled(str(root), label_rule=rule)
                    source = next(iter(data.splits.values())).source
                source.image(0)
        except BadInput as error:
            assert str(error)
        except UnreadableImage:
            continue


def try_lists(kind, lists, how):
    root, path, whole = lists(kind)

    @how
    @given(list_changes(), BYTES | st.just([]))
    @example([], [])
    def check(changes, bytes_changes):
        data = whole
        if not kind.endswith("npy"):
            data = changed(os.fsdecode(whole), changes, LISTS[kind][2])
        path.write_bytes(damaged(data, bytes_changes))
        opens_or_says_why(kind, root, path)

    try:
        check()
    finally:
        path.write_bytes(whole)


@pytest.fixture
def never_wait(monkeypatch):
    monkeypatch.setattr("datasets.decode.RETRY_AFTER", ())


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_with_anything_in_it_is_read_or_is_bad_input(kind, lists, never_wait):
    try_lists(kind, lists, few(60))


@pytest.mark.long
@pytest.mark.parametrize("kind", LISTS)
def test_many_lists_with_anything_in_them_are_read_or_are_bad_input(kind, lists, never_wait):
    try_lists(kind, lists, many(5_000))
