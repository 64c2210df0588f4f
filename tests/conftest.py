"""Data sets on disk and runs on them, made once for all tests."""

import gc
import os
import signal

# Before anything imports Triton: on the CPU, its kernels can only be interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Runs inherit signals that are ignored, as those of tests in the background or under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import skimage.data
from PIL import Image
from torch.utils.data._utils import signal_handling

import main_finetune
import main_pretrain
import odd_images
from exported import checkpoint, exported  # noqa: F401 – fixtures
from layouts import write_ferplus_csv, write_rafdb
from layouts_affectnet import write_affectnet_csv
from released import address, only_here, server  # noqa: F401 – fixtures
from runs import FAMILIES, SMALL, finetune_options, run, run_here, small_run
from util.errors import BAD_INPUT


def pytest_collection_finish():
    """Programs collect garbage when they end: exempt the modules that tests have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def torch_watches_workers():
    """Let torch install its SIGCHLD handler again after a program that has lost a worker."""
    yield
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL:
        signal_handling._SIGCHLD_handler_set = False


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """RAF-DB (56 training, 21 test images), AffectNet (40, 15) and FERPlus in owners' layouts."""
    root = tmp_path_factory.mktemp("sets")
    write_rafdb(root / "rafdb", 8, 3)
    write_affectnet_csv(root / "affectnet", {"train": (5,) * 8, "test": (2,) * 7 + (1,)})
    votes = [[7, 2, 0, 0, 0, 0, 0, 0, 1, 0], [0, 5, 4, 0, 0, 0, 0, 0, 1, 0]]
    write_ferplus_csv(root / "ferplus", 2, 1, 2, votes=votes)
    return root


@pytest.fixture(scope="session")
def pretrained(sets, tmp_path_factory):
    """A checkpoint of each family, pre-trained by `main_pretrain.py` on RAF-DB or AffectNet."""
    root, paths = tmp_path_factory.mktemp("pretrained"), {}
    families = (("vit", "mae"), ("convnext", "fcmae"), ("resnet", "resnet"))
    for name, family in families:
        data = "affectnet" if name == "vit" else "rafdb"
        size = "--input_size 32 --model mae_vit_tiny_patch16" if name == "vit" else ""
        data = f"--data_path {sets / data} --num_workers 0 --epochs 1 --output_dir {root / name}"
        options = f"{SMALL} {FAMILIES[family]} {size} {data}"
        assert run_here(main_pretrain, options.split()) == 0
        paths[name] = root / name / "checkpoint-last.pth"
    return paths


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Photographs of one person, of two and of none, and files that are not pictures."""
    folder = tmp_path_factory.mktemp("photographs")
    astronaut = skimage.data.astronaut()
    (folder / "people").mkdir()
    Image.fromarray(astronaut).save(folder / "people" / "astronaut.jpg")
    mirrored = astronaut[::2, ::-2]
    both = np.full((512, 768, 3), 128, np.uint8)
    both[:, :512], both[:256, 512:] = astronaut, mirrored
    Image.fromarray(both).save(folder / "people" / "two.jpg")
    (folder / "bomb.png").write_bytes(odd_images.bomb())
    Image.fromarray(np.full((300, 300, 3), 90, np.uint8)).save(folder / "grey.png")
    (folder / "page.jpg").write_text("<!doctype html><p>quota exceeded")
    return folder


@pytest.fixture(scope="session")
def finetune(sets, pretrained, tmp_path_factory):
    """Fine-tune in this process, but with the same options only once."""
    made = {}

    def run(family="vit", more="", data="rafdb"):
        if (family, more, data) not in made:
            folder = tmp_path_factory.mktemp("run")
            source = "" if "--finetune" in more else f"--finetune {pretrained[family]}"
            more_ = f"--data_path {sets / data} {source} {more}"
            assert run_here(main_finetune, finetune_options(folder, family, more_)) == 0
            made[family, more, data] = folder
        return made[family, more, data]

    return run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Uninterrupted pre-trainings by (family, processes), made on first use."""
    made = {}

    def make(family, processes):
        if (family, processes) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{processes}")
            run("main_pretrain", small_run(folder, family=family), processes)
            made[family, processes] = folder
        return made[family, processes]

    return make


@pytest.fixture
def refuse(tmp_path, capfd):
    """Run with invalid options; -> the one error line."""

    def run(options, output=None):
        output = output or tmp_path / "out"
        small = f"{SMALL} {FAMILIES['mae']}".split()
        argv = [*small, "--num_workers", "0", "--output_dir", str(output), *map(str, options)]
        code = run_here(main_pretrain, argv)
        captured = capfd.readouterr()
        lines = captured.err.strip().splitlines()
        assert code == BAD_INPUT, captured
        assert len(lines) == 1, lines
        assert not list(tmp_path.glob("out/checkpoint*"))
        return lines[0]

    return run
