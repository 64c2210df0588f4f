"""Reading labelled data sets in their owners' layouts, and recognising them."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from datasets.fer import class_folder, ferplus, rafdb
from datasets.fer.class_names import name_classes
from datasets.labels import EXPRESSIONS, ORDERS
from datasets.registry import detect_layout, open_labelled
from layouts import (
    clear_votes,
    write_fer2013,
    write_ferplus_csv,
    write_ferplus_folders,
    write_folder,
    write_lines,
    write_rafdb,
)
from layouts_affectnet import write_affectnet_csv
from util.errors import BadInput


def complaint(call, *args, **kwargs):
    """The one line of a BadInput."""
    with pytest.raises(BadInput) as e:
        call(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def named(images):
    """(file name, label) of each image."""
    return [(images.source.name(i).split("/")[-1], k) for i, k in enumerate(images.labels)]


def replace_line(path, number, text):
    """Replace line `number`, counted from 1."""
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    write_lines(path, lines)


# RAF-DB


@pytest.mark.parametrize("variant", ["list", "split", "folder"])
def test_rafdb_labels_are_read_in_every_variant(tmp_path, variant):
    root = write_rafdb(tmp_path, 2, 1, variant, drawn=False)
    data = rafdb.read(root)
    assert data.classes == ORDERS["rafdb"]
    assert {split: len(images) for split, images in data.splits.items()} == {"train": 14, "test": 7}
    for split, images in data.splits.items():
        for i, (name, label) in enumerate(named(images)):
            assert name.startswith(f"{split}_")
            assert (int(name[len(split) + 1 :][:5]) - 1) % 7 == label
            assert images.source.image(i).shape == (100, 100, 3)
    assert detect_layout(root) == "rafdb"


@pytest.mark.parametrize(
    "quirk",
    [
        {"last_newline": False},
        {"newline": "\r\n"},
        {"newline": "\n\n  \n"},
        {"between": " \t  "},
        {"list_name": "LIST_partition_label.TXT"},
        {"ending": ".PNG", "images": ("Aligned",)},
        {"images": ("original",)},
    ],
)
def test_rafdb_quirks_change_nothing(tmp_path, quirk):
    plain = rafdb.read(write_rafdb(tmp_path / "plain", drawn=False))
    data = rafdb.read(write_rafdb(tmp_path / "quirk", drawn=False, **quirk))
    for split, images in plain.splits.items():
        np.testing.assert_array_equal(data.splits[split].labels, images.labels)
        ours, theirs = named(data.splits[split]), named(images)
        assert [n.split(".")[0].removesuffix("_aligned") for n, _ in ours] == [
            n.split(".")[0].removesuffix("_aligned") for n, _ in theirs
        ]


@pytest.mark.parametrize("place", ["basic", "root", "beside"])
def test_the_rafdb_list_is_found_in_every_usual_place(tmp_path, place):
    root = write_rafdb(tmp_path, drawn=False) / "basic"
    if place == "root":
        shutil.move(root / "EmoLabel" / "list_patition_label.txt", root)
    if place == "beside":
        root = tmp_path
        shutil.move(root / "basic" / "EmoLabel", root)
        shutil.move(root / "basic" / "Image", root)
    assert detect_layout(root) == "rafdb"
    assert len(rafdb.read(root).splits["train"]) == 14


def test_rafdb_aligned_images_are_preferred_and_this_is_noted(tmp_path):
    data = rafdb.read(write_rafdb(tmp_path, images=("original", "aligned"), drawn=False))
    assert named(data.splits["train"])[0] == ("train_00001_aligned.jpg", 0)
    assert any("Image/original is not" in note for note in data.notes)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        *[
            (f"train_99999.jpg {label}".strip(), "row 22: must be the name of an image and a label")
            for label in ("8", "0", "nan", "2.5", "", "5 6")
        ],
        ("valid_99999.jpg 5", "row 22: its image is called neither"),
        ("train_00003.jpg 3", "row 22: the same image as in .*, row 3"),
    ],
)
def test_a_bad_line_in_the_rafdb_list_is_named_with_its_row(tmp_path, line, what):
    root = write_rafdb(tmp_path, extra=[line], drawn=False)
    with pytest.raises(BadInput, match=f"list_patition_label.txt, {what}"):
        rafdb.read(root)


def test_missing_rafdb_images_are_noted_or_refused_if_most_are_missing(tmp_path):
    root = write_rafdb(tmp_path, drawn=False)
    images = root / "basic" / "Image" / "aligned"
    (images / "train_00002_aligned.jpg").unlink()
    data = rafdb.read(root)
    assert named(data.splits["train"])[1] == ("train_00003_aligned.jpg", 2)
    assert any("1 of 14 images" in n and "train_00002_aligned.jpg" in n for n in data.notes)
    for path in images.iterdir():
        path.unlink()
    assert "14 of 14" in complaint(rafdb.read, root)
    shutil.rmtree(images)
    assert "unpack" in complaint(rafdb.read, root)


def test_missing_rafdb_annotations_are_named(tmp_path):
    root = write_rafdb(tmp_path, variant="split", drawn=False)
    (root / "basic" / "EmoLabel" / "test_label.txt").unlink()
    assert "test_label.txt cannot be read" in complaint(open_labelled, str(root))


def test_folders_called_1_to_7_are_recognised_as_rafdb_only_with_its_files(tmp_path):
    root = write_folder(tmp_path, {"train": 1, "valid": 1}, "1234567", drawn=False)
    assert detect_layout(root) is None
    (root / "train_labels.csv").touch()
    assert detect_layout(root) == "rafdb"
    data = open_labelled(str(root))
    assert [*data.splits] == ["train", "test"]
    assert data.classes == ORDERS["rafdb"]


def test_rafdb_published_counts_are_the_owners_totals():
    assert [sum(counts) for counts in rafdb.PUBLISHED.values()] == [12_271, 3_068]


# FERPlus: the five label rules against slow ones that go row by row


def first_most(counts):
    return max(range(len(counts)), key=lambda i: (counts[i], -i))


def slow_label(rule, counts):
    """(label or None, soft target or None) of ten counts."""
    if rule == "argmax":
        return (first_most(counts[:8]) if sum(counts[:8]) else None), None
    if rule in ("argmax10", "unique"):
        best = first_most(counts)
        alone = counts.count(counts[best]) == 1
        fits = sum(counts) and best < 8 and (rule == "argmax10" or alone)
        return (best if fits else None), None
    counts = [c if c >= 2 else 0 for c in counts]
    total = sum(counts)
    if rule == "majority":
        best = first_most(counts)
        return (best if best < 8 and counts[best] > 0.5 * total else None), None
    taken, blocked = {}, False
    while sum(taken.values()) < 0.75 * total and len(taken) < 3 and not blocked:
        most = max(c for i, c in enumerate(counts) if i not in taken)
        blocked = most in counts[8:]
        taken |= {i: c for i, c in enumerate(counts[:8]) if c == most}
    if not sum(taken.values()) > 0.5 * total or len(taken) > 3:
        return None, None
    target = [taken.get(i, 0) / sum(taken.values()) for i in range(8)]
    return first_most(target), target


def random_votes(n):
    """Ten votes per row over few or many columns, with all kinds of ties."""
    rng = np.random.default_rng(0)
    rows = [
        rng.multinomial(10, rng.dirichlet(np.full(10, spread)))
        for spread in rng.choice([0.1, 0.4, 1, 30], n)
    ]
    return np.array([*rows, *np.eye(10, dtype=int), np.zeros(10, int), np.ones(10, int)])


@pytest.mark.parametrize("rule", ferplus.RULES)
def test_ferplus_rules_equal_slow_references(rule):
    votes = random_votes(4000)
    labels, kept, targets = ferplus.RULES[rule].label(votes)
    slow = [slow_label(rule, row.tolist()) for row in votes]
    np.testing.assert_array_equal(kept, [label is not None for label, _ in slow])
    np.testing.assert_array_equal(labels[kept], [k for k, _ in slow if k is not None])
    assert 0 < kept.sum() < len(votes)
    if rule == "votes":
        expected = [target for _, target in slow if target is not None]
        np.testing.assert_allclose(targets[kept], expected, atol=1e-12)
    else:
        assert targets is None


@pytest.mark.parametrize(
    ("counts", "labels"),
    [  # neutral happiness surprise sadness anger disgust fear contempt, unknown NF
        ([5, 5, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, None, None, 0]),
        ([0, 0, 4, 0, 1, 0, 0, 0, 5, 0], [2, None, None, None, None]),
        ([0, 0, 4, 0, 1, 0, 0, 0, 4, 1], [2, 2, None, None, None]),
        ([3, 0, 0, 4, 1, 1, 1, 0, 0, 0], [3, 3, 3, 3, 3]),
        ([2, 0, 0, 2, 3, 2, 0, 0, 1, 0], [4, 4, 4, None, None]),
        ([0, 0, 0, 0, 0, 0, 0, 0, 3, 7], [None] * 5),
    ],
)
def test_ferplus_rules_decide_hard_cases_as_described(counts, labels):
    found = [rule.label(np.array([counts])) for rule in ferplus.RULES.values()]
    assert [int(label[0]) if kept[0] else None for label, kept, _ in found] == labels


# FERPlus and FER2013: files


@pytest.mark.parametrize("quirk", [{}, {"newline": "\r\n"}, {"last_newline": False}])
@pytest.mark.parametrize("rule", ferplus.RULES)
def test_ferplus_csv_and_folders_hold_the_same(tmp_path, rule, quirk):
    votes = [[0, 0, 0, 0, 0, 0, 0, 0, 2, 8], [4, 4, 0, 0, 0, 0, 0, 0, 2, 0]]
    files = ferplus.read(write_ferplus_csv(tmp_path / "a", votes=votes, nameless=1, **quirk), rule)
    more = {"header": rule == "votes", "box": rule != "unique", **quirk}
    folders = ferplus.read(write_ferplus_folders(tmp_path / "b", votes=votes, **more), rule)
    dropped = 1 + (rule in ("unique", "majority"))
    assert [len(images) for images in files.splits.values()] == [16 - dropped, 8, 8]
    assert files.rule.endswith(f"(--label_rule {rule})")
    assert sum("left out" in note for note in files.notes) == 1
    for split, ours in files.splits.items():
        theirs = folders.splits[split]
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(ours.source.image(3), theirs.source.image(3))
        assert (ours.targets is None) == (theirs.targets is None) == (rule != "votes")


def test_ferplus_is_compared_with_the_published_counts_of_its_layout(tmp_path):
    """The owners' label.csv files are not fer2013new.csv: 1,602 rows have other votes."""
    write_ferplus_csv(tmp_path / "csv", drawn=False)
    write_ferplus_folders(tmp_path / "folders", drawn=False)
    published = {
        layout: open_labelled(str(tmp_path / layout), label_rule="majority").published
        for layout in ("csv", "folders")
    }
    assert published == {
        "csv": {"train": 25_060, "val": 3_199, "test": 3_153},
        "folders": {"train": 25_045, "val": 3_191, "test": 3_137},
    }


def test_a_ferplus_rule_that_leaves_no_images_is_named(tmp_path):
    undecided = [[0, 0, 0, 0, 0, 0, 0, 0, 10, 0]] * 16  # all training images are unknown
    write_ferplus_csv(tmp_path, votes=undecided)
    said = complaint(open_labelled, str(tmp_path), label_rule="majority")
    assert "--label_rule majority: none of the 16 images of train gets a label" in said


def test_ferplus_pixels_and_votes_come_from_the_same_row(tmp_path):
    write_ferplus_csv(tmp_path, 1, 1, 1, nameless=2, drawn=False)
    data = pickle.loads(pickle.dumps(open_labelled(str(tmp_path))))  # as a worker receives it
    lines = (tmp_path / "fer2013.csv").read_text().splitlines()
    names = {split: images.source.name(0) for split, images in data.splits.items()}
    assert names == {"train": "fer2013.csv:2", "val": "fer2013.csv:12", "test": "fer2013.csv:20"}
    for images in data.splits.values():
        assert images.labels.tolist() == [*range(8)]
        for i in range(8):
            row = int(images.source.name(i).split(":")[1])
            grey = np.array(lines[row - 1].split(",")[1].split(), np.uint8).reshape(48, 48)
            np.testing.assert_array_equal(images.source.image(i), np.stack([grey] * 3, axis=-1))


def test_ferplus_digest_depends_on_pixels_and_labels(tmp_path):
    write_ferplus_csv(tmp_path, drawn=False)
    before = {rule: ferplus.read(tmp_path, rule).splits["train"].digest for rule in ferplus.RULES}
    assert len(set(before.values())) == 2  # soft targets differ, clear votes do not
    text = (tmp_path / "fer2013.csv").read_text().splitlines()[1]
    replace_line(tmp_path / "fer2013.csv", 2, text.replace(" ", " 1", 1).replace(" 1", " ", 1))
    assert ferplus.read(tmp_path).splits["train"].digest == before["argmax"]
    replace_line(tmp_path / "fer2013.csv", 2, ",".join(["0", " ".join(["7"] * 2304), "Training"]))
    assert ferplus.read(tmp_path).splits["train"].digest != before["argmax"]


@pytest.mark.parametrize("cell", ["", "-1", "nan", "2.5", "many"])
@pytest.mark.parametrize("write", [write_ferplus_csv, write_ferplus_folders])
def test_ferplus_bad_votes_are_named_with_their_row(tmp_path, write, cell):
    votes = [clear_votes(0), [*clear_votes(1)[:9], cell]]
    root = write(tmp_path, votes=votes, drawn=False)
    place = "fer2013new.csv, row 3" if write is write_ferplus_csv else "label.csv, row 2"
    with pytest.raises(BadInput, match=f"{place}: its votes for NF must be"):
        ferplus.read(root)


PIXELS = " ".join(["0"] * 2304)


@pytest.mark.parametrize(
    ("file", "line", "what"),
    [
        ("fer2013.csv", f"0,{PIXELS} 1,Training", "row 3: 2,305 pixels"),
        ("fer2013.csv", "0,,Training", "row 3: 0 pixels"),
        ("fer2013.csv", f"0,{PIXELS[:-1]}256,Training", "row 3: pixels from 0 to 256"),
        ("fer2013.csv", f"0,{PIXELS[:-1]}-1,Training", "row 3: pixels from -1 to 0"),
        ("fer2013.csv", f"0,{PIXELS[:-1]}x,Training", "row 3: its pixels are not numbers"),
        ("fer2013.csv", f"7,{PIXELS},Training", "row 3: its emotion must be"),
        ("fer2013.csv", f"0,{PIXELS},Test", "row 3: its Usage must be"),
        ("fer2013.csv", f"0,{PIXELS}", "row 3: only 2 cells"),
        ("fer2013.csv", f"0,{PIXELS},PublicTest", "row 3: another Usage than row 3 of"),
        ("fer2013.csv", "", "has 32 rows, but fer2013.csv 31"),
        ("fer2013new.csv", "", "has 31 rows, but fer2013.csv 32"),
        ("fer2013new.csv", "Training,fer0000001.png,1,2,3", "row 3: only 5 cells"),
    ],
)
def test_ferplus_bad_row_is_named(tmp_path, file, line, what):
    write_ferplus_csv(tmp_path, drawn=False)
    replace_line(tmp_path / file, 3 if line else 33, line)
    assert what in complaint(ferplus.read, tmp_path)


def test_ferplus_missing_columns_and_files_are_named(tmp_path):
    write_ferplus_csv(tmp_path / "a", header=["Usage", "name", *"0123456789"], drawn=False)
    assert "row 1: no column Image name" in complaint(ferplus.read, tmp_path / "a")
    root = write_ferplus_folders(tmp_path / "b", drawn=False)
    replace_line(root / "FER2013Valid" / "label.csv", 2, "fer1.png,1,2,3")
    assert "label.csv, row 2: 4 cells" in complaint(ferplus.read, root)
    (root / "FER2013Valid" / "label.csv").unlink()
    assert "no label.csv" in complaint(ferplus.read, root)
    assert "argmax10" in complaint(ferplus.read, root, "most")


def test_fer2013_has_the_order_and_splits_of_its_owners(tmp_path):
    data = open_labelled(
        str(write_fer2013(tmp_path, 2, 1, 1, header=["emotion", " Pixels", "usage"]))
    )
    assert (data.name, data.classes) == ("fer2013", ORDERS["fer2013"])
    assert [*data.splits] == ["train", "val", "test"]
    assert data.splits["train"].labels.tolist() == [*range(7)] * 2
    assert data.splits["test"].source.name(0) == "fer2013.csv:23"


def test_fer2013_beside_ferplus_is_read_only_on_request(tmp_path):
    write_ferplus_csv(tmp_path, drawn=False)
    assert detect_layout(tmp_path) == "ferplus"
    assert open_labelled(str(tmp_path), "fer2013").name == "fer2013"


# Class folders


@pytest.mark.parametrize(
    "names",
    [
        [*EXPRESSIONS],
        ["neutral", "HAPPINESS", "sadness", "Surprised", "fearful", "di", "angry", "contempt"],
        ["6_neutral", "3-happy", "0_sad", "1_surprise", "2_fear", "4_disgust", "5_anger", "7_co"],
    ],
)
def test_folders_named_after_expressions_get_standard_names_and_order(tmp_path, names):
    root = write_folder(tmp_path, {"train": 2, "test": 1}, names, drawn=False)
    data = class_folder.read(root)
    assert data.classes == EXPRESSIONS
    for images in data.splits.values():
        for i, label in enumerate(images.labels):
            assert images.source.name(i).split("/")[-2] == names[label]


def test_other_folder_names_are_in_byte_order_with_images_at_any_depth(tmp_path):
    root = write_folder(tmp_path, 1, ["zebra", "Äpfel", "cat", "Dog"], drawn=False)
    (root / "cat" / "more" / "of").mkdir(parents=True)
    shutil.copy(root / "cat" / "0000.png", root / "cat" / "more" / "of" / "it.png")
    (root / ".cache").mkdir()
    data = open_labelled(str(root))
    assert data.classes == ("Dog", "cat", "zebra", "Äpfel")
    assert {split: images.labels.tolist() for split, images in data.splits.items()} == {
        "all": [0, 1, 1, 2, 3]
    }


@pytest.mark.parametrize(
    ("ids", "order", "classes"),
    [
        ("0123456", "rafdb", ORDERS["rafdb"]),
        ("1234567", "rafdb", ORDERS["rafdb"]),
        ("123456", "1:rafdb", ORDERS["rafdb"][:6]),
        ("123456", "0:rafdb", ORDERS["rafdb"][1:]),
        ("123456", "rafdb", None),  # the first or the last class is missing
        ("1234567", "affectnet", None),
        ("013456", "rafdb", ORDERS["rafdb"][:2] + ORDERS["rafdb"][3:]),
        ("01234567", "affectnet", EXPRESSIONS),
        ("12345678", "AffectNet", EXPRESSIONS),
        ("0123456", "affectnet", EXPRESSIONS[:7]),
        ("012", "sad, happiness ,Angry", ("Sad", "Happy", "Anger")),
        (["01", "02", "10"], None, None),
        (["9", "10", "11"], "a,b,c", None),
        ("024", "a,b,c", None),
        ("012", "a,b", None),
        ("01", "a,b,c", ("a", "b")),
        ("12", "a,b,c", None),
        ("12", " 1: a,b,c", ("a", "b")),
        ("03", "1:a,b,c", None),
        ("234", "rafdb", None),
        ("0238", "affectnet", None),
    ],
)
def test_numbered_folders_are_named_by_the_label_order_or_refused(ids, order, classes, tmp_path):
    if classes is None:
        assert "--label_order" in complaint(name_classes, str(tmp_path), [*ids], order)
    else:
        found, called, *_ = name_classes(str(tmp_path), [*ids], order)
        assert found == classes
        assert [called[name] for name in ids] == [*classes]


def test_numbered_folders_keep_their_classes_if_some_are_missing(tmp_path):
    known = name_classes("train", [*"0123456"], "rafdb")
    assert known.label_order == "0:rafdb"
    fewer = name_classes("test", [*"123456"], None, known.label_order)
    assert fewer.classes == known.classes[1:]
    assert {n: known.called[n] for n in "123456"} == fewer.called
    assert fewer.notes[0].endswith("; none stands for Surprise")
    both = "1, 2, 3, 4, 5, 6 may count from 0 or from 1: give --label_order 0:rafdb or 1:rafdb"
    assert both in complaint(name_classes, "test", [*"123456"], "rafdb")
    # An older checkpoint has an order without a number.
    assert both in complaint(name_classes, "test", [*"123456"], None, "rafdb")
    message = complaint(name_classes, "test", [*"1234567"], None, "0:rafdb")
    assert "and 0:rafdb, as in training, does not fit: give --label_order" in message


@pytest.mark.parametrize(
    "names", [["0", "1", "None"], ["-1", "0", "1"], ["0.5", "1.5"], ["1", "b"]]
)
def test_class_folders_that_are_partly_numbers_are_refused(names, tmp_path):
    message = complaint(name_classes, str(tmp_path), names)
    assert f"{tmp_path}: some class folders are numbers" in message
    assert name_classes(str(tmp_path), names, ",".join(names)).classes == tuple(names)


def test_numbered_folders_are_sorted_by_value(tmp_path):
    folders = [str(i) for i in range(11)]
    called = name_classes(str(tmp_path), sorted(folders), "a,b,c,d,e,f,g,h,i,j,k").called
    assert "".join(called[name] for name in folders) == "abcdefghijk"


def test_label_order_fixes_the_order_of_named_folders(tmp_path):
    root = write_folder(tmp_path, {"train": 1}, ["happy", "sad", "0_anger"], drawn=False)
    order = "Anger,happiness,sad"
    assert open_labelled(str(root), label_order=order).classes == ("Anger", "Happy", "Sad")
    assert open_labelled(str(root), label_order="fer2013").classes == ("Anger", "Happy", "Sad")
    assert "class folder sad is not in --label_order anger,happy" in complaint(
        open_labelled, str(root), label_order="anger,happy"
    )
    assert "no class folder Fear" in complaint(
        open_labelled, str(root), label_order="anger,happy,sad,fear"
    )


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (["train", "val"], ["train", "test"], True),
        (["train", "validation"], ["train", "test"], True),
        (["train", "VALID", "Test"], ["train", "val", "test"], False),
        (["train"], ["train"], False),
        (["test"], ["test"], False),
    ],
)
def test_validation_alone_is_the_test_split(tmp_path, before, after, told):
    root = write_folder(tmp_path, dict.fromkeys(before, 1), drawn=False)
    data = open_labelled(str(root))
    assert [*data.splits] == after
    assert any("is used as test" in note for note in data.notes) == told


def break_folder(root, how):
    """Damage class folders in one way."""
    test = root / "test"
    if how == "empty":
        (test / "Smirk").mkdir()
    if how == "new":
        shutil.copytree(test / "Sad", test / "Contempt2")
    if how == "gone":
        shutil.rmtree(test / "Sad")
    if how == "twice":
        shutil.copytree(test / "Sad", test / "sadness")
    if how == "two":
        (root / "val").mkdir()
        (root / "valid").mkdir()
    if how == "loose":
        shutil.copy(test / "Sad" / "0000.png", test / "x.png")
    if how == "extra":
        shutil.copytree(test, root / "old")
        shutil.copytree(test, root / "@eaDir")  # a network disk's thumbnails are ignored
    if how == "beside":
        for name in ("x.png", "y.PNG", ".z.png", "notes.txt"):
            shutil.copy(test / "Sad" / "0000.png", root / name)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("empty", "test/Smirk: a class folder without images"),
        ("new", "test: class .*Contempt2, not in .*train;"),
        ("twice", "test: Sad and sadness are both Sad"),
        ("two", "val and valid are the same split"),
    ],
)
def test_class_folders_that_do_not_fit_are_named(tmp_path, how, what):
    root = write_folder(tmp_path, {"train": 1, "test": 1}, drawn=False)
    break_folder(root, how)
    with pytest.raises(BadInput, match=what):
        open_labelled(str(root))


@pytest.mark.parametrize(
    ("how", "what", "images"),
    [
        ("gone", "test has no images of Sad", 7),
        ("loose", "1 images of test are in no class folder and are left out (first: x.png)", 8),
        ("extra", "not in any split, so not used: old", 8),
        ("beside", "not in any split, so not used: 2 images", 8),
    ],
)
def test_class_folders_that_are_left_out_are_noted(tmp_path, how, what, images):
    root = write_folder(tmp_path, {"train": 1, "test": 1}, drawn=False)
    break_folder(root, how)
    data = open_labelled(str(root))
    assert what in data.notes
    assert len(data.splits["test"]) == images


# Recognising data sets


def test_every_layout_is_recognised_and_labelled_correctly(tmp_path):
    write = {
        "rafdb": lambda root: write_rafdb(root, 1, 1),
        "ferplus": lambda root: write_ferplus_folders(root, 1, 1, 1),
        "fer2013": lambda root: write_fer2013(root, 1, 1, 1),
        "folder": lambda root: write_folder(root, {"train": 1, "test": 1}),
    }
    shown, faces = [], []
    for name, make in write.items():
        data = open_labelled(str(make(tmp_path / name)))
        assert data.name == name
        assert detect_layout(tmp_path / name) == (None if name == "folder" else name)
        test = data.splits["test"]
        shown += [data.classes[label] for label in test.labels]
        small = [Image.fromarray(test.source.image(i)).convert("L") for i in range(len(test))]
        faces += [np.asarray(face.resize((12, 12), Image.Resampling.BOX), float) for face in small]
    apart = np.abs(np.stack(faces)[:, None] - np.stack(faces)).mean((2, 3))
    np.fill_diagonal(apart, np.inf)  # the most similar image is the same face in another layout
    assert [shown[i] for i in apart.argmin(1)] == shown


def test_affectnet_has_the_requested_number_of_classes(tmp_path):
    write_affectnet_csv(tmp_path, {"train": (1,) * 8, "test": (1,) * 8})
    assert detect_layout(tmp_path) == "affectnet"
    assert open_labelled(str(tmp_path)).classes == EXPRESSIONS
    assert open_labelled(str(tmp_path), nb_classes=7).classes == EXPRESSIONS[:7]
    assert "--nb_classes 10" in complaint(open_labelled, str(tmp_path), nb_classes=10)
    assert "--label_rule" in complaint(open_labelled, str(tmp_path), label_rule="votes")


def test_two_data_sets_in_one_folder_are_both_listed(tmp_path):
    write_rafdb(tmp_path, drawn=False)
    write_fer2013(tmp_path, drawn=False)
    message = complaint(open_labelled, str(tmp_path))
    assert "rafdb (RAF-DB, basic/EmoLabel/list_patition_label.txt and Image/)" in message
    assert "fer2013 (FER2013, fer2013.csv)" in message
    assert "--data_set rafdb or --data_set fer2013" in message
    assert detect_layout(tmp_path) is None
    assert open_labelled(str(tmp_path), "rafdb").name == "rafdb"


@pytest.mark.parametrize("name", ["rafdb", "ferplus"])
def test_two_layouts_of_one_set_are_both_listed(tmp_path, name):
    if name == "rafdb":
        write_rafdb(tmp_path, 1, 1, "folder", drawn=False)
        write_rafdb(tmp_path, drawn=False)
    else:
        write_ferplus_folders(tmp_path / "data", 1, drawn=False)
        write_ferplus_csv(tmp_path, drawn=False)
    message = complaint(open_labelled, str(tmp_path))
    assert message.count(f"{name} (") == 2
    data = open_labelled(str(tmp_path), name)
    assert len(data.splits["train"]) == 2 * len(data.classes)
    assert "not used" in data.notes[-1]


def only_images(root):
    write_folder(root, 1, ["x"], drawn=False)
    return root / "x"


def without_list(root):
    shutil.rmtree(write_rafdb(root, drawn=False) / "basic" / "EmoLabel")
    return root


def without_pixels(root):
    (write_ferplus_csv(root, drawn=False) / "fer2013.csv").unlink()
    return root


def without_labels(root):
    (write_ferplus_folders(root, drawn=False) / "FER2013Train" / "label.csv").unlink()
    return root


def affectnet_images(root):
    write_folder(root / "Manually_Annotated_Images", 1, "123", drawn=False)
    return root


def with_aligned(make):
    """Beside them a folder called as one of RAF-DB's."""

    def made(root):
        write_folder(make(root) / "aligned", 1, "123", drawn=False)
        return root

    return made


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (only_images, "holds 1 images and nothing that labels them"),
        (without_list, "RAF-DB's images, but not EmoLabel/list_patition_label.txt"),
        (lambda root: without_list(root) / "basic" / "Image", "RAF-DB's images, but not EmoLabel"),
        (without_pixels, "FERPlus's votes, but no images"),
        (without_labels, "FERPlus's folders, but not both"),
        (affectnet_images, "neither training.csv nor validation.csv"),
        (with_aligned(affectnet_images), "neither training.csv nor validation.csv"),
        (lambda root: affectnet_images(root) / "Manually_Annotated_Images", "training.csv"),
        (lambda root: write_folder(root, 1, "12", drawn=False), "give --label_order"),
        (
            lambda root: (root / "empty").mkdir() or root / "empty",
            "is empty; known layouts: RAF-DB",
        ),
        (lambda root: (root / "a").touch() or root, "no data set with labels; it holds a; known"),
        (lambda root: (root / "a").touch() or root / "a", "is a list without entries"),
        (lambda root: (root / "a.zip").write_bytes(b"PK\3\4\0") and root / "a.zip", "an archive"),
        (lambda root: root / "gone", "does not exist"),
    ],
)
def test_for_a_path_without_a_data_set_the_missing_files_are_named(tmp_path, make, what):
    message = complaint(open_labelled, str(make(tmp_path)))
    assert message.startswith(("--data_path", str(tmp_path)))
    assert what in message


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"data_set": "CIFAR"}, "--data_set CIFAR: choose from auto, rafdb"),
        ({"data_set": "synthetic"}, "--data_set synthetic: takes --data_path synthetic"),
        ({"data_set": "ferplus"}, "no FERPlus; looked for"),
        ({"data_set": "fer2013"}, "no fer2013.csv"),
        ({"data_set": "IMNET"}, "--label_order"),
        ({"label_rule": "votes"}, "--label_rule votes: is for the votes of FERPlus"),
        ({"label_order": "rafdb"}, "--label_order rafdb: is for class folders"),
        ({"nb_classes": 8}, "--nb_classes 8: RAF-DB basic, class folders has 7 classes"),
    ],
)
def test_options_that_do_not_fit_the_data_set_are_refused(tmp_path, options, what):
    root = write_rafdb(tmp_path, 1, 1, "folder", drawn=False) / "DATASET"
    assert open_labelled(str(root), nb_classes=7).name == "rafdb"
    assert what in complaint(open_labelled, str(root), **options)


def test_names_of_the_official_scripts_mean_class_folders(tmp_path):
    write_rafdb(tmp_path, 1, 1, "folder", drawn=False)
    for name in ("IMNET", "image_folder", "folder"):
        data = open_labelled(str(tmp_path / "DATASET"), name, label_order="rafdb")
        assert (data.name, data.classes) == ("folder", ORDERS["rafdb"])


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rafdb(tmp_path / "data", drawn=False)
    assert detect_layout("~/data") == "rafdb"
    assert open_labelled("~/data").name == "rafdb"


@pytest.mark.parametrize(
    ("path", "sizes"),
    [("synthetic", [24, 16]), ("synthetic:40", [40, 16]), ("synthetic:9:8", [9, 8])],
)
def test_synthetic_faces_have_the_labels_of_their_generator(path, sizes):
    data = open_labelled(path, size=32, counts=(24, 16))
    assert (data.name, data.classes) == ("synthetic", EXPRESSIONS)
    assert [len(images) for images in data.splits.values()] == sizes
    train, test = data.splits["train"], data.splits["test"]
    assert train.labels.tolist() == [train.source.label(i) for i in range(len(train))]
    assert train.source.image(0).shape == (32, 32, 3)
    assert not np.array_equal(train.source.image(0), test.source.image(0))


@pytest.mark.parametrize(
    ("path", "data_set"), [("synthetic:7", "auto"), ("synthetic", "rafdb"), ("", "auto")]
)
def test_invalid_synthetic_and_empty_paths_are_refused(path, data_set):
    assert complaint(open_labelled, path, data_set).startswith("--data_path")


@pytest.mark.parametrize("aside", ["@eaDir", "#recycle", "$RECYCLE.BIN", ".@__thumb", "lost+found"])
def test_folders_of_network_disks_are_not_classes(tmp_path, aside):
    write_folder(tmp_path, 1, ["happy", "sad", aside], drawn=False)
    data = open_labelled(str(tmp_path))
    assert (data.classes, data.notes) == (("Happy", "Sad"), ())


def test_of_two_rafdb_images_with_one_name_the_first_is_read_and_the_other_counted(tmp_path):
    root = write_rafdb(tmp_path, 1, 1, drawn=False)
    aligned = root / "basic" / "Image" / "aligned"
    shutil.copy(aligned / "train_00003_aligned.jpg", aligned / "train_00003_aligned.png")
    data = rafdb.read(root)
    assert named(data.splits["train"])[2][0] == "train_00003_aligned.jpg"
    told = "aligned: 1 files have the name of another one except for the extension "
    assert data.notes == (f"{told}and are left out (first: train_00003_aligned.png)",)


@pytest.fixture
def label_csv(tmp_path):
    """A label.csv of FERPlus with 8 training images, one per class, to add rows to."""
    return write_ferplus_folders(tmp_path, 1, 1, 1, drawn=False) / "FER2013Train" / "label.csv"


def test_ferplus_rows_without_an_image_and_repeated_rows_are_counted(tmp_path, label_csv):
    first = label_csv.read_text().splitlines()[0]
    nameless = first.replace("fer0000000.png", "")
    label_csv.write_text("\n".join([label_csv.read_text().strip(), nameless, first, nameless]))
    data = ferplus.read(tmp_path)
    assert len(data.splits["train"]) == 8
    repeated = "1 rows of label.csv repeat an earlier row and are left out (first: row 10)"
    assert data.notes == (f"FER2013Train: {repeated}", "2 rows without an image are left out")


def test_a_ferplus_image_with_different_votes_is_named_with_both_rows(tmp_path, label_csv):
    lines = label_csv.read_text().strip().splitlines()
    other = lines[1].replace("fer0000001.png", "fer0000000.png")
    label_csv.write_text("\n".join([*lines, other]))
    message = complaint(ferplus.read, tmp_path)
    assert "label.csv, row 9: other votes than in row 1 for the same image; keep one" in message
