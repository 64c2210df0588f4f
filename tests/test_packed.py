"""Reading packed stores: the same data set as unpacked; incomplete stores are refused."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pack
import main_pretrain
from datasets import build_finetune_dataset, build_pretrain_dataset, open_images, open_labelled
from datasets.labelled import describe_labelled
from datasets.packed.store import MANIFEST, PackedImages, manifest_digest
from datasets.registry import detect_layout
from layouts import write_fer2013, write_ferplus_csv, write_folder
from layouts_affectnet import write_affectnet_csv
from runs import FAMILIES, SMALL, finetune_options, run_here
from util.errors import BAD_INPUT, BadInput

ALL = ("rafdb", "affectnet", "ferplus", "fer2013", "folder", "all", "synthetic")


def pack(data, output, *more):
    """Pack in this process; must succeed."""
    options = ["--data_path", data, "--output", output, "--num_workers", "0", *more]
    assert run_here(main_pack, list(map(str, options))) == 0
    return output


@pytest.fixture(scope="module")
def sources(sets, tmp_path_factory):
    """A path for every kind of labelled data set."""
    root = tmp_path_factory.mktemp("more_sets")
    write_fer2013(root / "fer2013", drawn=False)
    order = ("anger", "happiness", "other")
    write_folder(root / "folder", {"train": 3, "val": 1, "test": 2}, order, drawn=False)
    write_folder(root / "all", 3, drawn=False)
    own = {name: sets / name for name in ("rafdb", "affectnet", "ferplus")}
    return {**own, **{p.name: p for p in root.iterdir()}, "synthetic": "synthetic-lab:16:8"}


@pytest.fixture(scope="module")
def stores(sources, tmp_path_factory):
    """Each of them packed, with a short side of at most 48."""
    root = tmp_path_factory.mktemp("stores")
    return {name: pack(sources[name], root / name, "--short_side", 48) for name in sources}


def shrunk(image, short):
    """An obvious way to shrink an image to a short side of at most `short` pixels."""
    picture = Image.fromarray(image)
    factor = short / min(picture.size)
    if factor >= 1:
        return image
    size = [round(side * factor) for side in picture.size]
    return np.array(picture.resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("name", ALL)
def test_a_packed_data_set_equals_the_unpacked_one(sources, stores, name):
    own = open_labelled(str(sources[name]), size=48)
    packed = open_labelled(str(stores[name]))
    for attribute in ("name", "title", "classes", "rule", "published", "options"):
        assert getattr(packed, attribute) == getattr(own, attribute)
    shared = PackedImages(stores[name]).manifest["duplicates"]
    assert packed.notes[:-1] == (*own.notes, *shared)
    assert list(packed.splits) == list(own.splits)
    for split, images in own.splits.items():
        ours = packed.splits[split]
        assert np.array_equal(ours.labels, images.labels)
        assert (ours.targets is None) == (images.targets is None)
        for i in range(len(images)):
            expected = shrunk(images.source.image(i), 48)
            assert np.array_equal(ours.source.image(i), expected)
            assert images.source.name(i).endswith(ours.source.name(i))
    assert any("packed: " in line for line in describe_labelled(packed))


def test_soft_targets_are_packed(sources, tmp_path):
    store = pack(sources["ferplus"], tmp_path / "store", "--label_rule", "votes")
    own = open_labelled(str(sources["ferplus"]), label_rule="votes").splits["train"]
    packed = open_labelled(str(store)).splits["train"]
    assert len(np.unique(own.targets)) > 2
    assert np.array_equal(packed.targets, own.targets)


def test_images_are_read_only_views_into_the_memory_map(stores):
    store = PackedImages(stores["rafdb"])
    image = store.image(3)
    assert np.shares_memory(image, store._maps[0])
    assert image.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        image[:] = 0


def test_large_images_are_resized_and_small_ones_kept(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k, size in enumerate([(90, 60), (60, 90), (30, 200), (40, 40), (41, 400)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{k}.png")
    for short, shapes in (
        (40, [(60, 40), (40, 60), (30, 200), (40, 40), (40, 390)]),
        (0, [(90, 60), (60, 90), (30, 200), (40, 40), (41, 400)]),
    ):
        store = PackedImages(pack(folder, tmp_path / str(short), "--short_side", short))
        assert [store.image(i).shape[:2] for i in range(5)] == shapes
    original = np.array(Image.open(folder / "4.png"))
    assert np.array_equal(store.image(4), original)


def test_a_store_is_pickled_as_its_path_and_reads_the_same(stores):
    source = open_labelled(str(stores["rafdb"])).splits["test"].source
    source.image(0)
    data = pickle.dumps(source.source)
    assert len(data) < 10_000
    again = pickle.loads(pickle.dumps(source))
    assert again.digest == source.digest
    assert np.array_equal(again.image(5), source.image(5))
    assert again.name(5) == source.name(5)


@pytest.mark.parametrize("name", ALL)
def test_pre_training_uses_the_training_split_or_else_all_images(stores, name):
    splits = open_labelled(str(stores[name])).splits
    images = splits["all" if name == "all" else "train"].source
    dataset = build_pretrain_dataset(str(stores[name]), 32)
    assert len(dataset) == len(images)
    assert np.array_equal(dataset.source.image(1), images.image(1))
    assert dataset[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize("name", ALL)
def test_a_store_is_recognised_as_its_data_set(stores, name):
    data = open_labelled(str(stores[name]))
    assert open_labelled(str(stores[name]), data.name).digest == data.digest
    assert detect_layout(stores[name]) == data.name


def test_a_folder_and_a_list_without_labels_can_be_packed(tmp_path):
    folder = tmp_path / "faces"
    for k in range(6):
        (folder / str(k % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * k, 0, 0)).save(folder / str(k % 2) / f"{k}.png")
    (tmp_path / "list.txt").write_text("faces/1/3.png\nfaces/0/4.png\n")
    ours = pack(folder, tmp_path / "a", "--data_set", "none")
    store = open_images(str(ours)).source
    assert [store.name(i) for i in range(6)] == [f"{k % 2}/{k}.png" for k in (0, 2, 4, 1, 3, 5)]
    listed = open_images(str(pack(tmp_path / "list.txt", tmp_path / "b"))).source
    assert [listed.name(i) for i in range(2)] == ["faces/1/3.png", "faces/0/4.png"]
    assert listed.image(0)[0, 0, 0] == 120
    with pytest.raises(BadInput, match="images without labels"):
        open_labelled(str(ours))


def test_numbered_class_folders_are_refused_without_a_label_order(tmp_path, capfd):
    write_folder(tmp_path / "faces", 1, ("0", "1"), drawn=False)
    options = ["--data_path", str(tmp_path / "faces"), "--output", str(tmp_path / "store")]
    assert run_here(main_pack, options) == BAD_INPUT
    error = capfd.readouterr().err
    assert "--label_order" in error
    assert "--data_set none packs the images without labels" in error
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["ferplus", "synthetic"])
def test_a_store_can_be_packed_again(stores, tmp_path, name):
    small = pack(stores[name], tmp_path / "small", "--short_side", 24)
    a, b = (open_labelled(str(path)).splits["test"] for path in (stores[name], small))
    assert np.array_equal(a.labels, b.labels)
    assert np.array_equal(b.source.image(0), shrunk(a.source.image(0), 24))
    assert a.source.name(4) == b.source.name(4)


def test_a_moved_data_set_gives_the_same_bytes(sources, stores, tmp_path):
    shutil.copytree(sources["rafdb"], tmp_path / "moved")
    store = pack(tmp_path / "moved", tmp_path / "store", "--short_side", 48)
    assert (store / MANIFEST).read_bytes() == (stores["rafdb"] / MANIFEST).read_bytes()


# Options that decided what was packed


def complaint(store, **options):
    with pytest.raises(BadInput) as error:
        open_labelled(str(store), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_options_that_contradict_those_of_packing_are_refused(stores):
    ferplus, affectnet = stores["ferplus"], stores["affectnet"]
    assert "was packed with argmax" in complaint(ferplus, label_rule="votes")
    assert "was packed with 0.15" in complaint(affectnet, face_margin=0.4)
    assert "was packed without it" in complaint(stores["folder"], label_order="rafdb")
    assert "is a packed store of rafdb" in complaint(stores["rafdb"], data_set="affectnet")
    assert "this is rafdb" in complaint(stores["rafdb"], label_rule="votes")
    assert "has 7 classes" in complaint(stores["rafdb"], nb_classes=8)
    open_labelled(str(ferplus), "ferplus", label_rule="argmax", nb_classes=8)
    open_labelled(str(affectnet), face_margin=0.15)
    open_labelled(str(stores["rafdb"]), face_margin=0.4)  # no effect: RAF-DB has no boxes
    assert detect_layout(affectnet) == "affectnet"


def test_one_store_of_affectnet_gives_7_and_8_classes(sources, stores):
    own = open_labelled(str(sources["affectnet"]), nb_classes=7)
    packed = open_labelled(str(stores["affectnet"]), nb_classes=7)
    assert (packed.title, packed.classes, packed.published) == (
        own.title,
        own.classes,
        own.published,
    )
    for split, images in own.splits.items():
        ours = packed.splits[split]
        assert np.array_equal(ours.labels, images.labels)
        expected = shrunk(images.source.image(3), 48)
        assert np.array_equal(ours.source.image(3), expected)


def test_faces_are_packed_with_the_given_margin(tmp_path):
    counts = {"train": (1,) * 8, "test": (1,) * 8}
    write_affectnet_csv(tmp_path / "set", counts)
    store = pack(tmp_path / "set", tmp_path / "store", "--face_margin", 0.4)
    own = open_labelled(str(tmp_path / "set"), face_margin=0.4).splits["train"].source
    packed = open_images(str(store), face_margin=0.4).source
    assert all(np.array_equal(packed.image(i), own.image(i)) for i in range(len(own)))


# Damaged stores


@pytest.fixture
def store(stores, tmp_path):
    """A copy to damage."""
    return shutil.copytree(stores["rafdb"], tmp_path / "store")


def spoil_manifest(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def refused(folder):
    """The error on opening, which is the same for pre-training and fine-tuning."""
    said = complaint(folder)
    assert str(folder) in said
    with pytest.raises(BadInput) as error:
        open_images(str(folder))
    assert str(error.value) == said
    return said


def test_a_part_that_is_too_short_or_too_long_or_missing_is_refused(store):
    part = store / "part-00000.bin"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    assert f"part-00000.bin has {len(whole) - 1:,} bytes instead of {len(whole):,}" in refused(
        store
    )
    part.write_bytes(whole + b"\0")
    assert "part-00000.bin has" in refused(store)
    part.unlink()
    assert "part-00000.bin cannot be read (No such file" in refused(store)


@pytest.mark.parametrize("name", ["index.npy", "labels.npy", "names.bin"])
def test_edited_index_labels_and_names_are_refused(store, name):
    data = bytearray((store / name).read_bytes())
    data[-3] ^= 1
    (store / name).write_bytes(data)
    assert f"{name} has changed since it was packed" in refused(store)
    (store / name).write_bytes(data[: len(data) // 2])
    assert f"{name} has changed since it was packed" in refused(store)
    (store / name).unlink()
    assert f"{name} cannot be read" in refused(store)


def test_an_edited_incomplete_missing_or_newer_manifest_is_refused(store):
    path = store / MANIFEST
    whole = path.read_text()
    path.write_text(whole.replace('"train": 56', '"train": 55'))
    assert "has been edited" in refused(store)
    path.write_text(whole[:100])
    assert "is damaged" in refused(store)
    path.write_text("[]")
    assert "is damaged" in refused(store)
    spoil_manifest_from(path, whole, version=2)
    assert "version 2; this program reads version 1" in refused(store)
    path.unlink()
    assert f"its {MANIFEST} cannot be read" in refused(store)


def spoil_manifest_from(path, text, **changes):
    path.write_text(text)
    spoil_manifest(path.parent, **changes)


def test_an_index_beyond_the_parts_is_refused_even_with_matching_hashes(store):
    index = np.load(store / "index.npy")
    index[-1, 1] *= 2
    np.save(store / "index.npy", index)
    from datasets.packed.store import file_digest

    files = json.loads((store / MANIFEST).read_text())["files"]
    spoil_manifest(store, files=files | {"index.npy": file_digest(store / "index.npy")})
    assert "index.npy does not fit the pixels" in refused(store)


def test_verify_finds_one_flipped_bit_and_names_the_part(store, capfd):
    assert run_here(main_pack, ["--verify", str(store)]) == 0
    assert "every byte is intact" in capfd.readouterr().out
    part = store / "part-00000.bin"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    PackedImages(store)  # opening does not check all bytes, which would take too long
    assert run_here(main_pack, ["--verify", "--output", str(store)]) == BAD_INPUT
    assert "part-00000.bin has changed since it was packed" in capfd.readouterr().err
    assert run_here(main_pack, ["--verify", str(store.parent)]) == BAD_INPUT
    assert "is not a packed store" in capfd.readouterr().err


# Training from stores


def test_pre_training_from_a_store_resumes_only_with_the_same_store(stores, tmp_path, capfd):
    def run(name, epochs):
        options = f"{SMALL} {FAMILIES['mae']} --num_workers 1 --data_path {stores[name]}"
        more = f"--epochs {epochs} --input_size 32 --output_dir {tmp_path / 'run'}"
        return run_here(main_pretrain, f"{options} {more}".split())

    assert run("rafdb", 1) == 0
    saved = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)
    assert saved["run"]["data"] == open_images(str(stores["rafdb"])).source.digest
    capfd.readouterr()
    assert run("affectnet", 1) == BAD_INPUT
    assert (
        "from a run with other images (56 images before, 40 images now)" in capfd.readouterr().err
    )


def test_fine_tuning_from_a_store_equals_fine_tuning_from_files(sources, tmp_path, capfd):
    store = pack(sources["rafdb"], tmp_path / "store")  # 100 × 100: no image is resized
    capfd.readouterr()
    weights = []
    for name, path in (("files", sources["rafdb"]), ("store", store)):
        more = f"--data_path {path} --eval_data_path {path} --epochs 1"
        assert run_here(main_finetune, finetune_options(tmp_path / name, "vit", more)) == 0
        saved = torch.load(tmp_path / name / "checkpoint-last.pth", weights_only=True)
        weights.append(saved["model"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    said = capfd.readouterr().out
    assert "RAF-DB basic, aligned: 7 classes" in said
    assert "packed: 77 images, short side at most 256" in said
    assert len(build_finetune_dataset(str(store), 32, "test")) == 21


def test_a_probe_reads_a_store(stores, tmp_path, capfd):
    options = f"{SMALL} {FAMILIES['mae']} --num_workers 0 --epochs 1 --probe_freq 1"
    more = f"--probe_data_path {stores['rafdb']} --output_dir {tmp_path}"
    assert run_here(main_pretrain, f"{options} {more}".split()) == 0
    assert "knn" in (tmp_path / "log.txt").read_text()


def test_ferplus_votes_keep_their_images(tmp_path):
    """Rows without a label are left out of the store and of the unpacked data set."""
    write_ferplus_csv(tmp_path / "set", 2, 1, 1, nameless=2, drawn=False)
    store = PackedImages(pack(tmp_path / "set", tmp_path / "store", "--label_rule", "unique"))
    own = open_labelled(str(tmp_path / "set"), label_rule="unique")
    assert len(store) == sum(map(len, own.splits.values()))
