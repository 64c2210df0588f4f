"""Whatever a checkpoint, list or CSV contains, it is read or one line says why not.

`make test` tries the same few examples every time, `make test-long` many new ones.
"""

import csv
import os
import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

import main_pretrain
from datasets import open_images, open_labelled
from datasets.decode import UnreadableImage, load_rgb
from datasets.pseudo import read_pseudo_labels
from layouts import write_fer2013, write_ferplus_csv, write_ferplus_folders, write_rafdb
from layouts_affectnet import write_affectnet_csv, write_affectnet_npy, write_affectnet_plus
from models_registry import create_classifier
from nasty import NASTY, tries
from odd_images import write_faces
from runs import run_here
from util.checkpoint.read import read_checkpoint
from util.errors import BAD_INPUT, DONE, BadInput
from util.weights import load_pretrained

pytestmark = [  # thousands of warnings about damaged files
    pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
]

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
    except BadInput:
        return


@tries(150, 20_000)
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_damaged_checkpoint_is_read_or_is_bad_input(kind, tried, contents, model, tmp_path):
    @tried
    @given(BYTES)
    def check(changes):
        (tmp_path / "weights").write_bytes(damaged(contents[kind], changes))
        loads_or_says_why(tmp_path / "weights", model)

    check()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a run of one epoch, to resume from."""
    return pretrain(tmp_path_factory.mktemp("trained"), "--epochs 1") / "checkpoint-last.pth"


def pretrain(out, more, code=DONE):
    model = "--model convnextv2_atto --decoder_embed_dim 8 --input_size 64 --mask_ratio 0.5"
    data = "--data_path synthetic:4 --batch_size 4 --warmup_epochs 0 --num_workers 0 --vis_freq 0"
    assert run_here(main_pretrain, f"{model} {data} --output_dir {out} {more}".split()) == code
    return out


JUNK = [None, -2, 10**30, "x", {"a": 1}, float("nan"), torch.ones(2), ("a",)]


KEYS = ["model", "optimizer", "epoch", "step", "run", "sums"]


def try_junk(key, some, trained, tmp_path, capfd):
    saved = torch.load(trained, weights_only=True)
    for number, junk in enumerate(some):
        torch.save(saved | {key: junk}, tmp_path / "bad.pth")
        out = tmp_path / f"out{number}"
        pretrain(out, f"--epochs 2 --resume {tmp_path / 'bad.pth'}", BAD_INPUT)
        [line] = capfd.readouterr().err.strip().splitlines()
        assert "bad.pth" in line


@pytest.mark.parametrize("key", KEYS)
def test_a_checkpoint_with_a_wrong_entry_gives_one_error_line(key, trained, tmp_path, capfd):
    try_junk(key, JUNK[KEYS.index(key) :: 6], trained, tmp_path, capfd)


@pytest.mark.long
@pytest.mark.parametrize("key", KEYS)
def test_a_checkpoint_with_any_wrong_entry_gives_one_error_line(key, trained, tmp_path, capfd):
    try_junk(key, JUNK, trained, tmp_path, capfd)


# Lists and CSVs


CELLS = [v for v in NASTY if len(v) < 1000] + [
    '"',
    "'",
    ",",
    "\n",
    "1e308",
    "-1e308",
    "8",
    "10",
    "11",
]


def list_changes():
    """Changes to rows of a list: (kind, row as a share, cell, what it becomes)."""
    kinds = st.sampled_from(["cell", "cell", "cell", "drop", "row", "twice", "delete"])
    share = st.floats(0, 1, exclude_max=True)
    return st.lists(st.tuples(kinds, share, st.integers(0, 11), st.sampled_from(CELLS)), max_size=3)


def changed(text, changes, delimiter):
    """A list after changes to cells and rows; cells are written as they are, without quoting."""
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


LISTS = {  # how to write the data set, its list, the delimiter of cells
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
    """The folder and the list of a data set, written once, and the list's bytes."""
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
                warnings.simplefilter("error", RuntimeWarning)
                if kind in ("list", "csv"):
                    source = open_images(path).source
                else:
                    data = open_labelled(str(root), label_rule=rule)
                    source = next(iter(data.splits.values())).source
                source.image(0)
        except (BadInput, UnreadableImage):
            continue


@pytest.fixture
def never_wait(monkeypatch):
    monkeypatch.setattr("datasets.decode.RETRY_AFTER", ())


@tries(60, 5_000)
@pytest.mark.parametrize("kind", LISTS)
def test_a_list_with_any_content_is_read_or_is_bad_input(kind, tried, lists, never_wait):
    root, path, whole = lists(kind)

    @tried
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


SECRETS = {
    "shadow": "root:$6$SECRET/SECRET:19000:0:99999:7:::\nSECRET:*:19000:0:99999:7:::\n",
    "key": "-----BEGIN SECRET KEY-----\nSECRET+SECRET/SECRET=\n",
    "csv": "user,password,SECRET\nme,SECRET,1\nSECRET,2,3\n",
    "words": "SECRET 1\nSECRET SECRET\n",
    "json": '{"human": "SECRET", "label": {"SECRET": 1}}\n',
    "cells": ",".join(["SECRET"] * 12) + "\n" + ",".join(["SECRET"] * 12) + "\n",
}


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("kind", LISTS)
def test_no_error_about_a_list_quotes_what_a_file_holds(kind, secret, lists, tmp_path):
    """As when /etc/shadow is given by mistake, or a data set from elsewhere links to it."""
    root, path, whole = lists(kind)
    (tmp_path / "shadow").write_text(SECRETS[secret])
    path.unlink()
    path.symlink_to(tmp_path / "shadow")
    try:
        for call in (open_images, open_labelled):
            with pytest.raises(BadInput) as error:
                call(str(path if kind in ("list", "csv") else root))
            assert "SECRET" not in str(error.value)
            assert path.name in str(error.value)
    finally:
        path.unlink()
        path.write_bytes(whole)


@pytest.mark.parametrize("secret", SECRETS)
def test_no_error_about_pseudo_labels_quotes_what_the_file_holds(secret, tmp_path):
    (tmp_path / "labels.csv").write_text(SECRETS[secret])
    with pytest.raises(BadInput) as error:
        read_pseudo_labels(str(tmp_path / "labels.csv"), ("Happy", "Sad"))
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("secret", [*SECRETS.values(), "P3 SECRET 2 255", "P6\n2 2\nSECRET\n"])
def test_no_error_about_an_image_quotes_the_file_that_a_list_names(secret, tmp_path):
    (tmp_path / "shadow").write_text(secret)
    with pytest.raises(UnreadableImage) as error:
        load_rgb(tmp_path / "shadow")
    assert "SECRET" not in str(error.value)
