"""The structure of the code: levels, use of `args`, flags that have an effect, late imports."""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import app
import main_export
import main_finetune
import main_pack
import main_predict
import main_pretrain
import main_visualize
from main_pretrain import build_parser
from runs import ROOT

# By the first part of a module's name. Programs are on the highest level.
LEVELS = {
    **dict.fromkeys(("main", "builders", "app"), 4),
    **dict.fromkeys(("export", "inference"), 3),
    **dict.fromkeys(("engine", "training"), 2),
    **dict.fromkeys(("models", "ops", "datasets"), 1),
    **dict.fromkeys(("backbones", "util"), 0),
}
FOLDERS = (
    "builders",
    "export",
    "inference",
    "training",
    "ops",
    "datasets",
    "backbones",
    "util",
)
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))]
)
MAINS = [path for path in SOURCES if path.name.startswith("main_")]


def level(module):
    """The level of a dotted module name; None if the module is not ours."""
    first, *_, last = module.split(".") * 2
    return 4 if last == "__main__" else LEVELS.get(first.split("_")[0])


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_module_imports_from_a_higher_level(path):
    own = level(module_name(path))
    assert own is not None, f"{path.name} is on no level"
    for name in imports(ast.parse(path.read_text())):
        below = level(name)
        assert below is None or below <= own, f"{path.name} imports {name} from above"


def test_no_imports_are_circular():
    graph = {
        module_name(path): {n for n in imports(ast.parse(path.read_text())) if level(n) is not None}
        for path in SOURCES
    }
    done, under_way = set(), []

    def visit(name):
        assert name not in under_way, f"circle: {under_way} -> {name}"
        if name in done or name not in graph:
            return
        under_way.append(name)
        for other in graph[name]:
            visit(other)
        done.add(under_way.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", [p for p in SOURCES if level(module_name(p)) < 4], ids=module_name)
def test_only_the_mains_use_args(path):
    """Below the mains, only option handling itself may use the namespace."""
    if module_name(path).startswith("util.options") or module_name(path) == "util.program":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            names = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
            assert not names & {"args", "opts", "namespace"}, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    "main",
    [
        main_pretrain,
        main_finetune,
        main_pack,
        main_predict,
        main_export,
        main_visualize,
        app,
    ],
    ids=lambda main: main.__name__,
)
def test_every_flag_is_read(main):
    """By the program, the file that builds its parts, or the options' own bundles."""
    families = [f"backbones/{path.stem}" for path in (ROOT / "backbones").glob("*.py")]
    build = [f"builders/{name}" for name in ("finetune", "labelled_data", "weights", "evaluation")]
    more = {
        "main_pretrain": ["builders/pretrain", "util/options/pretrain", *families],
        "main_finetune": [*build, "util/options/finetune", "util/options/augmentations", *families],
        "main_pack": ["builders/pack"],
        "main_predict": ["builders/predict", "util/options/predict"],
        "main_visualize": ["builders/visualize", "util/options/visualize"],
    }
    places = more.get(main.__name__, [])
    read = set()
    for name in (main.__name__, *places, "util/options/parser"):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            of = getattr(getattr(node, "value", None), "id", "")
            if isinstance(node, ast.Attribute) and of in ("args", "options"):
                read.add(node.attr)
            # getattr(args, name) over a literal list of names, or over the options of `--aug`
            if isinstance(node, ast.List) or (isinstance(node, ast.Dict) and "augment" in name):
                node = ast.List(node.values) if isinstance(node, ast.Dict) else node
                read |= {e.value for e in node.elts if isinstance(e, ast.Constant)}
    flags = {action.dest for action in main.build_parser()._actions} - {"help"}
    assert flags <= read, f"accepted but never read: {flags - read}"


@pytest.mark.parametrize("path", MAINS, ids=module_name)
def test_options_are_parsed_without_heavy_imports(path):
    heavy = "[m for m in ('torch', 'numpy') if m in sys.modules]"
    code = f"import {module_name(path)} as m, sys; m.build_parser(); print({heavy})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [*MAINS, ROOT / "app.py"], ids=module_name)
def test_help_lists_all_options_of_the_program(path):
    run = subprocess.run(
        [sys.executable, path, "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    parser = importlib.import_module(module_name(path)).build_parser()
    names = {name for action in parser._actions for name in action.option_strings}
    assert names <= set(re.findall(r"--?[a-z][\w-]*", run.stdout))
    usage, empty, *_ = run.stdout.splitlines()
    assert usage.startswith(f"usage: {path.name} [OPTION …]")
    assert empty == ""
    # An entry is an option with its text, up to the next option or heading.
    text = re.sub(r"\n {10,}", " ", run.stdout)
    entries = [line for line in text.splitlines() if line.startswith("  --")]
    told = re.compile(r"default|required|same as")
    assert [line for line in entries if not told.search(line)] == []


def test_training_starts_without_importing_what_is_needed_later():
    late = "[m for m in ('sklearn', 'matplotlib', 'torch.utils.tensorboard') if m in sys.modules]"
    modules = "builders.evaluation, builders.finetune, engine_pretrain, training.probe"
    code = f"import sys, {modules}; print({late})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [*SOURCES, *ROOT.glob("benchmarks/*.py")], ids=module_name)
def test_modules_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_folders_hold_few_modules():
    count = Counter(path.parent.relative_to(ROOT) for path in SOURCES)
    assert count[Path()] <= 20
    assert [folder for folder, modules in count.items() if modules > 25] == []


OFFICIAL = [
    "batch_size",
    "epochs",
    "accum_iter",
    "model",
    "input_size",
    "mask_ratio",
    "norm_pix_loss",
    "weight_decay",
    "lr",
    "blr",
    "min_lr",
    "warmup_epochs",
    "data_path",
    "output_dir",
    "log_dir",
    "device",
    "seed",
    "resume",
    "start_epoch",
    "num_workers",
    "pin_mem",
    "no_pin_mem",
    "world_size",
    "local_rank",
    "dist_on_itp",
    "dist_url",
    "update_freq",
    "decoder_depth",
    "decoder_embed_dim",
    "auto_resume",
    "save_ckpt",
    "save_ckpt_freq",
    "save_ckpt_num",
    "crop_pct",
]


# Options of MAE's and ConvNeXt V2's fine-tuning and linear probing, beyond pre-training's.
NOT_OF_FINETUNING = {"mask_ratio", "norm_pix_loss", "decoder_depth", "decoder_embed_dim"}
# fmt: off
OFFICIAL_FINETUNING = [
    "drop_path", "clip_grad", "layer_decay", "color_jitter", "aa", "smoothing", "reprob",
    "remode", "recount", "resplit", "mixup", "cutmix", "cutmix_minmax", "mixup_prob",
    "mixup_switch_prob", "mixup_mode", "finetune", "global_pool", "cls_token", "nb_classes",
    "eval", "dist_eval", "layer_decay_type", "model_ema", "model_ema_decay",
    "model_ema_force_cpu", "model_ema_eval", "warmup_steps", "opt", "opt_eps", "opt_betas",
    "momentum", "weight_decay_end", "train_interpolation", "head_init_scale", "model_key",
    "model_prefix", "eval_data_path", "imagenet_default_mean_and_std", "data_set",
    "disable_eval", "use_amp",
]
# fmt: on


def test_every_flag_of_the_official_scripts_is_accepted():
    known = build_parser()._option_string_actions
    assert [name for name in OFFICIAL if f"--{name}" not in known] == []
    known = main_finetune.build_parser()._option_string_actions
    wanted = {*OFFICIAL, *OFFICIAL_FINETUNING} - NOT_OF_FINETUNING
    assert sorted(name for name in wanted if f"--{name}" not in known) == []


def test_flags_may_be_spelled_with_hyphens_and_booleans_bare_or_as_words():
    parse = build_parser().parse
    args = parse(["--data-path", "a-b", "--norm-pix-loss", "--local-rank=3", "--update-freq=8"])
    assert (args.data_path, args.norm_pix_loss, args.local_rank, args.accum_iter) == (
        "a-b",
        True,
        3,
        8,
    )
    assert parse(["--norm_pix_loss", "False"]).norm_pix_loss is False
    assert parse(["--no_pin_mem"]).pin_mem is False


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.args")), ids=lambda p: p.stem)
def test_recipes_parse(recipe):
    main = main_pretrain if recipe.name.startswith("pretrain") else main_finetune
    args = main.build_parser().parse([f"@{recipe}", "--epochs", "2"])
    main.check_options(args)
    assert args.epochs == 2
    assert args.model in recipe.read_text()


def signatures():
    """Our functions and classes by (module, name), but for those that take any number."""
    found = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            takes_any = isinstance(node, ast.FunctionDef) and node.args.vararg
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not takes_any:
                found[module_name(path), node.name] = node
    return found


OURS = signatures()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_more_than_four_arguments_are_named(path):
    """In calls of our own functions; drawing the synthetic faces is mathematics."""
    if "synthetic" in path.parts:
        return
    tree = ast.parse(path.read_text())
    known = {name for module, name in OURS if module == module_name(path)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            ours = [a for a in node.names if (node.module, a.name) in OURS]
            known |= {alias.asname or alias.name for alias in ours}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            plain = [a for a in node.args if not isinstance(a, ast.Starred)]
            assert len(plain) <= 4, f"{path.name}:{node.lineno}: {node.func.id}"


# Of every program, of every builder of parts, of every data set.
SHARED = {"build_parser", "check_options", "work", "main", "read", "recognise"}
SHARED |= {"build_model", "build_state", "describe_model", "open_data", "preprocessing"}
SHARED |= {"run_identity"}


def test_a_public_name_means_one_thing_on_a_level():
    homes = {}
    for module, name in OURS:
        if not name.startswith("_") and name not in SHARED:
            homes.setdefault((level(module), name), []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_families_are_known_to_their_own_files_alone():
    """Nobody else asks whether a model is a ViT: see backbones/."""
    asks = re.compile(
        r"family(_of\(.*\))?(\.title)? (==|!=|in [^F])|== \"(vit|convnextv2|resnet)\""
    )
    wrong = [
        f"{path.name}: {line.strip()}"
        for path in SOURCES
        if "backbones" not in path.parts
        for line in path.read_text().splitlines()
        if asks.search(line)
    ]
    assert wrong == []


@pytest.mark.parametrize("path", [*MAINS, ROOT / "app.py"], ids=module_name)
def test_a_main_defers_imports_in_few_places(path):
    """What needs torch is imported once --help and wrong options are dealt with."""
    places = [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(node))
    ]
    assert len(places) <= 2, places
