"""Commands and Python in README.md and docs/*.md run, with small settings; named options exist.

Unknown commands fail the test. See `CANNOT_RUN` for the commands that are not run, `places` for the
paths in the documentation, and tests/helpers/shown.py for the options that make runs small.
"""

import re

import pytest
import torch

import main_pack
from documents import PAGES, all_code, commands, split_shell
from finetuned import RAF_NAMES
from runs import ROOT, load, run_here
from shown import (
    check,
    check_script,
    find_start,
    in_places,
    model_of,
    module_of,
    read,
    result,
    run_start,
    small,
    source_of,
)
from util.errors import BadInput
from util.options.parser import underscored

THEIRS = ("rafdb", "ferplus", "affectnet7", "finetune_affectnet", "pretrain_convnextv2")
EXPORT = "python main_export.py --checkpoint runs/rafdb/checkpoint-best.pth"
# How a command begins, and why it is not run. Its options and targets are checked nevertheless.
CANNOT_RUN = {
    "python3 -m venv": "makes an environment",
    ". .venv/bin/activate": "changes the shell",
    "export": "changes the shell",
    "pip install": "installs packages",
    "make": "takes minutes, or runs this test",
    "tensorboard": "serves pages until it is stopped",
    "python app.py": "serves a page until it is stopped",
    "grep -q resumable": "is part of a SLURM job",
    "scontrol requeue": "is part of a SLURM job",
    "python benchmarks": "takes minutes on two cores",
    **{f"python main_{name}": "belongs to the original MAE-SFER" for name in THEIRS},
    f"{EXPORT} --to mae-sfer": "needs a large model: see tests/test_export_authors.py",
    f"{EXPORT} --to s2d": "needs a large model: see tests/test_export_authors.py",
}
# Options of other programs, and of which.
FOREIGN = {
    "--signals-to-handle": "torchrun",
    "--max_restarts": "torchrun",
    "--nproc_per_node": "torchrun",
    "--logdir": "tensorboard",
    "--shm-size": "docker",
    "--ipc": "docker",
    **dict.fromkeys(
        [
            *("--layer-decay", "--learning-rate", "--epoch", "--model-name", "--checkpoint-whole"),
            *("--raf_path", "--warmup", "--loss-fn", "--opt-level", "--num_class", "--evaluate"),
        ],
        "the original MAE-SFER",
    ),
}
# Replacements that make the documented Python code small.
PYTHON = {
    'create_pretrain_model("mae_vit_base_patch16")': "create_pretrain_model("
    '"mae_vit_tiny_patch16", input_size=32, decoder_embed_dim=32, decoder_depth=1, '
    "decoder_num_heads=2)",
    'len(saved["classes"]))': 'len(saved["classes"]), input_size=32)',
}
SHOWN = commands()
HAVE_RUN = set()
PROGRAMS = [path.stem for path in sorted([*ROOT.glob("main_*.py"), *ROOT.glob("app.py")])]


def by_place(command):
    return f"{command.place}-{' '.join(command.words)[:60]}"


def typed(command):
    """A command as it is typed, with python before a program that is named alone."""
    return " ".join(["python"] * command.words[0].endswith(".py") + [*command.words])


def is_run(command):
    return not typed(command).startswith(tuple(CANNOT_RUN))


def start_of(command):
    start = find_start(command.words)
    assert start or not is_run(command), (
        f"{command.place}: {typed(command)}: is no program of ours. If it is a command, say in "
        "CANNOT_RUN why it is not run; if it is none, fence its block as ```text"
    )
    return start


# --- commands ---


@pytest.mark.parametrize("command", SHOWN, ids=by_place)
def test_documented_options_exist(command, places, monkeypatch):
    """For every command, run or not, and for its launcher."""
    start = start_of(command)
    if start is None:
        check_target(command.words)
    elif is_run(command):
        check(in_places(start, places(model_of(start))))
    elif "def build_parser(" in source_of(start.program).read_text():
        read(start)
    else:
        check_script(start, monkeypatch)


def check_target(words):
    """Check the target of a command of another program."""
    assert words[0] not in ("python", "torchrun"), f"{words[1]}: no such program"
    if words[0] == "make":
        targets = re.findall(r"^([\w/-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    if words[:3] == ("pip", "install", "-r"):
        assert (ROOT / words[3]).is_file()


def test_every_exception_is_for_a_documented_command():
    shown = [typed(command) for command in SHOWN]
    assert [begin for begin in CANNOT_RUN if not any(c.startswith(begin) for c in shown)] == []


@pytest.fixture(scope="session")
def places(sets, pretrained, finetune, photographs, tmp_path_factory):
    """A function: model family -> {path in the documentation: real path}."""
    store = tmp_path_factory.mktemp("docs") / "store"
    packing = f"--data_path {sets / 'rafdb'} --num_workers 1 --output {store}"
    assert run_here(main_pack, packing.split()) == 0
    weights = store.parent / "weights.pth"  # without a training state
    torch.save({"model": load(pretrained["vit"].parent)["model"]}, weights)
    fine = finetune("vit")
    best = fine / "checkpoint-best.pth"
    pseudo = store.parent / "pseudo.csv"  # as main_predict.py writes it
    faces = sorted((sets / "rafdb" / "basic" / "Image" / "aligned").iterdir())[:8]
    header = ",".join(["path", *(f"p_{name}" for name in RAF_NAMES)])
    pseudo.write_text("\n".join([header, *(f"{face},1,0,0,0,0,0,0" for face in faces)]) + "\n")

    def find(kind):
        return {
            "/path/to/images": sets / "rafdb" / "basic" / "Image" / "aligned",
            "/path/to/RAF-DB": sets / "rafdb",
            "/path/to/AffectNet": sets / "affectnet",
            "DATA": sets / "rafdb",
            "AVATARS": sets / "rafdb",
            "FOLDER": sets / "rafdb",
            "AVATARS/unlabelled": sets / "rafdb" / "basic" / "Image" / "aligned",
            "save_results": fine.parent,
            "save_results/a": fine,
            "save_results/b": finetune("convnext"),
            "/path/to/RAF-DB/basic": sets / "rafdb",
            "/path/to/store": store,
            "STORE": store,
            "/path/to/checkpoint.pth": pretrained[kind],
            "/path/to/mae_pretrain_vit_base.pth": weights,
            "runs/pretraining/checkpoint-last.pth": pretrained["vit"],
            "save_results/checkpoint-last.pth": pretrained[kind],
            "FILE": best,
            "FILE.csv": pseudo,
            "pseudo.csv": pseudo,
            "runs/small/checkpoint-last.pth": finetune("resnet") / "checkpoint-last.pth",
            "save_results/checkpoint-best.pth": best,
            "rafdb/checkpoint-best.pth": best,
            "runs/rafdb/checkpoint-best.pth": best,
            "DIR": fine,
            "A/seed-*": fine,
            "B/seed-*": fine,
            "runs/seeds/seed-*": fine,
            "NAME": "mae_vit_base_300e",
            "photos/": photographs / "people",
            "a.jpg": photographs / "people" / "astronaut.jpg",
            "b.png": photographs / "people" / "two.jpg",
            "trip/**/*.jpg": photographs / "**" / "*o*.jpg",
            "faces/": sets / "rafdb" / "basic" / "Image" / "aligned",
        }

    return find


@pytest.fixture
def released(only_here, server, address, pretrained):
    """Serve a small ViT's weights under the name of every release."""
    path = pretrained["vit"].with_name("released.pth")
    if not path.exists():
        torch.save({"model": load(path.parent)["model"]}, path)
    server.answer = lambda request: request.send(path.read_bytes())


@pytest.mark.parametrize("command", list(filter(is_run, SHOWN)), ids=by_place)
def test_documented_commands_run(command, places, released, tmp_path, monkeypatch, capfd):
    """Each with options that make it small; of commands that then do the same, only one."""
    start = start_of(command)
    if start.options == ["--help"]:
        return  # test_documented_options_exist checks it
    start = small(in_places(start, places(model_of(start))))
    if (what := result(start)) in HAVE_RUN:
        return
    codes = run_start(start, tmp_path, monkeypatch)
    said = capfd.readouterr()
    assert set(codes) == {0}, (
        f"{command.place}: {typed(command)}\nran as: {start.program} {' '.join(start.options)}\n"
        f"(what is a path in the documents is made real by `places`)\n{said.out}{said.err}"
    )
    HAVE_RUN.add(what)


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.args")), ids=lambda path: path.stem)
def test_a_recipe_shows_the_command_that_uses_it(recipe):
    told = "\n".join(re.findall(r"^#     (.*)$", recipe.read_text(), re.M))
    starts = [find_start(words) for words in split_shell(told)]
    for start in starts:
        check(start)
    assert f"@{recipe}" in starts[-1].options


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_is_documented(program):
    assert any((start := find_start(c.words)) and start.program == program for c in SHOWN)


# --- Python ---


PYTHON_SHOWN = all_code("python")
# Code in docs/export.md needs exported models: tests/test_export*.py run it.
PYTHON_SHOWN = [block for block in PYTHON_SHOWN if "docs/export.md" not in block.place]


@pytest.mark.parametrize("block", PYTHON_SHOWN, ids=lambda block: block.place)
def test_documented_python_runs(block, places, tmp_path, monkeypatch):
    """With a batch of two images as `imgs`, and the replacements in PYTHON."""
    source = block.text
    paths = {f'"{shown}"': repr(str(real)) for shown, real in places("vit").items()}
    for shown, real in {**PYTHON, **paths}.items():
        source = source.replace(shown, real)
    monkeypatch.chdir(tmp_path)
    exec(compile(source, block.place, "exec"), {"imgs": torch.rand(2, 3, 32, 32)})


# --- options ---


def parsers():
    """The parsers of all programs that have a `build_parser`."""
    names = [*PROGRAMS, "util.report", "util.download", "datasets.synthetic"]
    return {name: module_of(name).build_parser() for name in names}


def names_of(parser):
    """The options of a parser, each with all of its names."""
    options = [tuple(action.option_strings) for action in parser._actions]
    return [names for names in options if names and "--help" not in names]


def test_every_option_is_documented():
    shown = {
        underscored(word)
        for piece in all_code("shell", "options", "inline")
        for word in re.findall(r"--[a-z][\w-]*", piece.text)
    }
    silent = [
        f"{name}: {'/'.join(option)}"
        for name, parser in parsers().items()
        for option in names_of(parser)
        if not shown & set(option)
    ]
    assert silent == []


def test_every_option_has_a_help_text():
    silent = [
        f"{name}: {action.option_strings or action.dest}"
        for name, parser in parsers().items()
        for action in parser._actions
        if not (action.help or "").strip()
    ]
    assert silent == []


# What readers stumbled over: STYLE is plain English, in the field's own words.
RIDDLES = re.compile(
    r"\b(goes|go|gone|going) on (from|with|where|there|after)\b|drawn face|running average|"
    r"passed over|tells? no classes|held? to be alike|pixels a side|(removed|kept) patch|"
    r"is no file of|once that is mended|images a process|an? step part",
    re.IGNORECASE,
)


def test_texts_for_users_have_no_riddles():
    texts = {page.name: page.read_text() for page in PAGES}
    texts |= {f"{name} --help": parser.format_help() for name, parser in parsers().items()}
    found = {name: match[0] for name, text in texts.items() if (match := RIDDLES.search(text))}
    assert found == {}


def test_options_named_in_the_text_exist():
    known = {"--help", *map(underscored, FOREIGN)}
    for parser in parsers().values():
        known |= {name for names in names_of(parser) for name in names}
    for script in ROOT.glob("benchmarks/*.py"):
        known |= set(re.findall(r'"(--\w+)"', script.read_text()))
    wrong = [
        f"{piece.place}: {word}"
        for piece in all_code("options", "inline")
        for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", piece.text)
        if underscored(word) not in known
    ]
    assert wrong == []


VALUE = re.compile(r"(--\w+) ([^\s…=]*[^\sA-Z_:…=][^\s…=]*)")  # --select val; not --resume PATH


def test_option_values_named_in_the_text_are_valid():
    wrong = []
    for piece in all_code("options", "inline"):
        lines = [line.partition("  #")[0].strip() for line in piece.text.splitlines()]
        for name, value in (m.groups() for line in lines if (m := VALUE.fullmatch(line))):
            takes = [
                parser for parser in parsers().values() if name in parser._option_string_actions
            ]
            if takes and not any(parses(parser, name, value) for parser in takes):
                wrong.append(f"{piece.place}: {name} {value}")
    assert wrong == []


def parses(parser, *words):
    """Whether a parser accepts these options; missing required ones are ignored."""
    for action in parser._actions:
        action.required = False
    try:
        parser.parse_known(words)
    except BadInput:
        return False
    return True
