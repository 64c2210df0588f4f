"""A new labelled data set, declared in a single file, can be trained on and packed."""

import pytest
from PIL import Image

import main_finetune
import main_pack
from datasets import open_images, open_labelled
from datasets.folder import ImageFiles, list_images
from datasets.labelled import LabelledImages, LabelledSet
from datasets.layout import Layout
from datasets.registry import OWNERS
from finetuned import results
from layouts import save
from runs import SMALL_FINETUNE, run_here

CLASSES = ("Happy", "Sad")


def recognise(root):
    return ["Toy Faces"] if (root / "toy.txt").exists() else []


def read(root, asked):
    """Splits are folders; the class is the last digit of a file name: `train/3_1.png`."""
    splits = {}
    for split in ("train", "test"):
        files = list_images(str(root / split))
        images = ImageFiles(files)
        labels = [int(images.name(i)[-5]) for i in range(len(files))]
        splits[split] = LabelledImages(images, labels)
    return LabelledSet("toy", "Toy Faces", CLASSES, splits)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    layout = Layout(title="Toy Faces", shape="toy.txt", recognise=recognise, read=read)
    monkeypatch.setitem(OWNERS, "toy", layout)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "faces"
    for split, count in (("train", 8), ("test", 4)):
        for k in range(count):
            save(Image.new("RGB", (32, 32), (20 * k, 90, 200)), folder / split / f"{k}_{k % 2}.png")
    (folder / "toy.txt").write_text("")
    return folder


def test_it_is_recognised_with_and_without_its_name(root):
    for name in ("auto", "toy"):
        data = open_labelled(str(root), name)
        assert (data.title, data.classes) == ("Toy Faces", CLASSES)
        assert data.splits["train"].labels.tolist() == [0, 1] * 4
    assert len(open_images(str(root)).source) == 8  # pre-training leaves out test images


def test_it_can_be_fine_tuned_on_unpacked_and_packed(root, tmp_path):
    options = f"--data_path {root} --output {tmp_path}/store --num_workers 0"
    assert run_here(main_pack, options.split()) == 0
    for data in (root, tmp_path / "store"):
        out = tmp_path / f"run-{data.name}"
        options = f"{SMALL_FINETUNE} --model vit_tiny_patch16 --data_path {data} --output_dir {out}"
        assert run_here(main_finetune, options.split()) == 0
        assert (results(out)["data"], results(out)["n"]) == ("Toy Faces", 4)
