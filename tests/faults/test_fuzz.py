"""Whatever the input, a program works or prints one error line: never a traceback.

`make test` tries the same few examples every time, `make test-long` many new ones.
"""

import gc
import io
import os
import sys
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

import main_export
import main_pack
import main_pretrain
from datasets import open_images, open_labelled
from nasty import NASTY, tries
from util import download
from util.errors import BAD_INPUT, DONE, BadInput
from util.options import finetune as options_finetune
from util.options import predict as options_predict
from util.program import run_program
from util.report import __main__ as report
from util.rundir import RunDir
from util.weights import find_source

VALUES = st.one_of(st.sampled_from(NASTY), st.text(max_size=20), st.floats().map(str))
VALUES |= st.integers(-(10**31), 10**31).map(str)
PROGRAMS = {
    "pretrain": (cache(main_pretrain.build_parser), main_pretrain.check_options),
    "finetune": (cache(options_finetune.build_parser), options_finetune.check_options),
    "export": (cache(main_export.build_parser), main_export.check_options),
    "pack": (cache(main_pack.build_parser), main_pack.check_options),
    "predict": (cache(options_predict.build_parser), options_predict.check_options),
    "download": (cache(download.build_parser), lambda _: None),
    "report": (cache(report.build_parser), lambda _: None),
}


def command_lines(program):
    """Known and, now and then, unknown flags, each with up to two values."""
    flags = sorted(PROGRAMS[program][0]()._option_string_actions)
    flags = [flag for flag in flags if flag not in ("-h", "--help", "--output_dir")]
    flag = st.sampled_from(flags) | st.sampled_from(
        ["--modle", "-x", "--a\nb", "--é", "--batch-size"]
    )
    option = st.tuples(flag, st.lists(VALUES, max_size=2)).map(lambda o: [o[0], *o[1]])
    joined = st.tuples(flag, VALUES).map(lambda o: ["=".join(o)])
    return st.lists(option | joined | VALUES.map(lambda v: [v]), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The current folder of the commands, with options files in it."""
    here, before = tmp_path_factory.mktemp("here"), os.getcwd()
    (here / "self.args").write_text("--epochs 3\n@self.args\n")
    (here / "binary.args").write_bytes(bytes(range(256)))
    (here / "quote.args").write_text("--model 'mae")
    os.chdir(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)  # see conftest
        yield here
    os.chdir(before)


def ends_well(program, argv):
    """The program works, or ends with exit code 2 and one printable line."""
    parser, check = PROGRAMS[program]
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    try:
        try:
            code = run_program(parser, check, lambda _: None, list(argv))
        except SystemExit as end:  # -h among the values
            code = end.code
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


@pytest.mark.parametrize("share", [5, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("program", PROGRAMS)
def test_nasty_values_of_each_option_work_or_give_one_error_line(program, share, folder):
    """Every `share`-th nasty value, given as often as the option needs values."""
    options = PROGRAMS[program][0]()._option_string_actions.items()
    for number, (name, action) in enumerate(options):
        if name.startswith("--") and name != "--help":
            for value in NASTY[number % share :: share]:
                ends_well(program, [name, *[value] * (2 if action.nargs == 2 else 1)])
    for value in NASTY:
        ends_well(program, [value])


@tries(300, 3_000)
@pytest.mark.parametrize("program", PROGRAMS)
def test_any_command_line_works_or_gives_one_error_line(program, tried, folder):
    @tried
    @given(command_lines(program))
    def check(parts):
        ends_well(program, [arg for part in parts for arg in part])

    check()


# Paths


PATHS = [v for v in NASTY if "\0" not in v and v.strip("/.")]  # nor folders that would be searched
USES = {
    "images": open_images,
    "labels": open_labelled,
    "weights": find_source,
    "cache": lambda path: download.fetch("mae_vit_tiny_300e", path, url="http://127.0.0.1:9/"),
}


@pytest.mark.parametrize("use", USES)
def test_an_impossible_path_is_bad_input(use, folder, only_here, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    for path in [*PATHS, "/proc/self/fd/999", "/proc/1/root/x", "self.args/x", "x" * 300]:
        try:
            USES[use](path)
        except BadInput:
            continue


def test_an_impossible_output_dir_is_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ["é" * 4000, "x" * 300, "/proc/x", "/dev/null/x", "/proc/self/mem"]:
        with pytest.raises(BadInput):
            RunDir(path)
