"""Data of fine-tuning: splits, fractions, class balance, labels."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import FinetuneDataset, build_loader, face_augment, plain
from datasets.finetune import (
    check_classes,
    choose_splits,
    hold_out,
    match_classes,
    stratified,
    take_fraction,
)
from datasets.folder import ImageFiles, list_images
from datasets.labelled import LabelledImages, LabelledSet
from datasets.labels import ORDERS
from datasets.sampler import GlobalBatchSampler, balanced_order
from util.distributed import ProcessInfo
from util.errors import BadInput
from util.seeding import ORDER, generator

COUNTS = (60, 25, 7, 1)  # images of four classes
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))


@pytest.fixture
def coded(tmp_path):
    """Images with the label in red, the number in green, and noise in blue to detect crops."""
    for k, label in enumerate(LABELS):
        pixels = np.full((20, 20, 3), (60 * label, 2 * k, 0), np.uint8)
        pixels[..., 2] = np.random.default_rng(k).integers(0, 256, (20, 20))
        Image.fromarray(pixels).save(tmp_path / f"{k:03d}.png")
    return LabelledImages(ImageFiles(list_images(tmp_path)), LABELS)


def rows(labels, n_classes=7, name="rafdb", **splits):
    """A labelled set without pixels, with splits of the given labels."""
    made = {"train": labels, **splits} if labels is not None else splits
    images = {k: LabelledImages(Numbers(len(v), k), np.asarray(v)) for k, v in made.items()}
    return LabelledSet(name, "Test set", ORDERS[name][:n_classes], images)


class Numbers:
    """An image source without pixels."""

    def __init__(self, count, split):
        self.count, self.split, self.digest = count, split, f"{split} {count}"

    def __len__(self):
        return self.count

    def name(self, i):
        return f"{self.split} {i}"


def names(images):
    return [images.source.name(i) for i in range(len(images))]


# Balance


@pytest.mark.parametrize("epoch", range(4))
def test_a_balanced_epoch_draws_every_class_equally_often(epoch):
    draws = balanced_order(LABELS, generator(ORDER, 0, epoch))
    n = len(LABELS)
    assert len(draws) == n
    assert len(set(draws)) == n, "every draw has a number of its own, also of a repeated image"
    drawn = Counter(LABELS[draws % n].tolist())
    assert sorted(drawn.values()) == [23, 23, 23, 24]  # 93 images of 4 classes
    times = Counter((draws % n).tolist())
    for label, count in enumerate(COUNTS):
        seen = [times[i] for i in np.flatnonzero(label == LABELS)]
        assert max(seen) - min(seen) <= 1, "none twice before all once"
        assert sum(seen) == drawn[label]
        assert count < 23 or max(seen) == 1
    assert set(draws // n) == set(range(24 if drawn[3] == 24 else 23))


def test_a_balanced_epoch_mixes_classes_and_other_epochs_choose_others():
    first, second = (balanced_order(LABELS, generator(ORDER, 0, epoch)) for epoch in (0, 1))
    assert len(set(LABELS[first % len(LABELS)][:20].tolist())) == 4
    chosen = [{i for i in draws % len(LABELS) if LABELS[i] == 0} for draws in (first, second)]
    assert len(chosen[0] & chosen[1]) < 18  # of 23 out of 60; about 9 are expected


def balanced_steps(batch_size, accum, world, first_step=0):
    """[step] -> the set of samples of all ranks."""
    steps = [set() for _ in range(12 - first_step)]
    for rank in range(world):
        sampler = GlobalBatchSampler(
            len(LABELS), batch_size, accum, ProcessInfo(rank, world), 3, balance=LABELS
        )
        sampler.start_at(2, first_step)
        for k, batch in enumerate(sampler):
            steps[k // accum].update(batch)
    return steps


@pytest.mark.parametrize(("batch_size", "accum", "world"), [(4, 1, 2), (2, 1, 4), (2, 2, 2)])
def test_the_images_of_a_balanced_step_do_not_depend_on_the_number_of_processes(
    batch_size, accum, world
):
    expected = balanced_steps(8, 1, 1)
    assert [len(step) for step in expected] == [8] * 12
    assert balanced_steps(batch_size, accum, world) == expected


def test_a_balanced_epoch_can_begin_at_any_step():
    assert balanced_steps(4, 1, 2, first_step=7) == balanced_steps(8, 1, 1)[7:]


def test_a_balanced_epoch_with_repeats_has_no_sample_twice():
    sampler = GlobalBatchSampler(len(LABELS), 8, balance=LABELS, repeats=3)
    draws = sampler.order()[: 3 * len(LABELS)]
    assert len(set(draws.tolist())) == 3 * len(LABELS)
    for k in range(3):
        part = draws[k * len(LABELS) : (k + 1) * len(LABELS)]
        counts = np.bincount(LABELS[part % len(LABELS)])
        assert counts.max() - counts.min() <= 1


# Samples


def test_every_sample_has_the_label_of_its_image(coded):
    ds = FinetuneDataset(coded, 4, plain(20), seed=0)
    n = len(ds)
    for draw in (0, 1, 40, n - 1, n, n + 40, 3 * n + 5):
        image, target, problem = ds[1, draw]
        assert image[1, 0, 0] == 2 * (draw % n)
        assert target.tolist() == np.eye(4)[image[0, 0, 0].item() // 60].tolist()
        assert (target.dtype, problem) == (torch.float32, "")


def test_repeats_of_an_image_are_augmented_differently_but_reproducibly(coded):
    def dataset(seed=0):
        return FinetuneDataset(coded, 4, face_augment(20, 0.25, "bilinear"), seed=seed)

    views = [dataset()[1, 5 + k * len(coded)][0].numpy().tobytes() for k in range(8)]
    assert len(set(views)) >= 5  # two views may both be unchanged
    assert [dataset()[1, 5 + k * len(coded)][0].numpy().tobytes() for k in range(8)] == views
    for other in (dataset()[2, 5][0], dataset(seed=1)[1, 5][0]):
        assert other.numpy().tobytes() != views[0]
    assert torch.equal(dataset()[5][0], dataset()[0, 5][0])


def test_votes_are_used_as_targets(coded):
    votes = np.random.default_rng(0).dirichlet(np.ones(4), len(coded)).astype(np.float32)
    images = LabelledImages(coded.source, LABELS, votes)
    ds = FinetuneDataset(images.take(np.array([9, 4])), 4, plain(20), seed=0)
    assert torch.equal(ds[3, 3][1], torch.from_numpy(votes[4]))


def test_the_replacement_of_an_unreadable_image_has_its_own_label(coded, tmp_path):
    bad = np.flatnonzero(LABELS == 2)
    for k in bad:
        (tmp_path / f"{k:03d}.png").write_bytes(b"<html>")
    ds, replaced = FinetuneDataset(coded, 4, plain(20), seed=0), set()
    for k in bad:
        image, target, problem = ds[0, int(k)]
        assert problem.startswith(f"{tmp_path}/{k:03d}.png\t")
        assert target.argmax() == image[0, 0, 0] // 60 != 2
        replaced.add(int(image[1, 0, 0]))
    assert len(replaced) > 1


@pytest.mark.parametrize("balance", [None, LABELS])
def test_fine_tuning_batches_do_not_depend_on_the_number_of_workers(coded, balance):
    ds = FinetuneDataset(coded, 4, face_augment(20, 0.25, "bilinear"), seed=0)
    loaders = []
    for workers in (0, 2):
        sampler = GlobalBatchSampler(len(ds), 8, balance=balance)
        sampler.start_at(1)
        loaders.append(build_loader(ds, sampler, workers))
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for ours, alone in zip(*loaders, strict=True):
        assert torch.equal(ours[0], alone[0])
        assert torch.equal(ours[1], alone[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


# Fractions and splits


@pytest.mark.parametrize(("share", "counts"), [(0.1, [6, 2, 1, 1]), (0.5, [30, 12, 4, 1])])
def test_a_fraction_is_exact_in_every_class_and_never_empty(share, counts):
    chosen = stratified(LABELS, share, seed=0)
    assert np.bincount(LABELS[chosen]).tolist() == counts
    assert np.array_equal(chosen, stratified(LABELS, share, seed=0))
    assert not np.array_equal(chosen, stratified(LABELS, share, seed=1))


def test_held_out_images_are_not_trained_on_and_leave_one_per_class():
    images = rows(LABELS).splits["train"]
    kept, held = hold_out(images, 0.9, seed=0)
    assert sorted(names(kept) + names(held)) == sorted(names(images))
    assert kept.counts(4).tolist() == [6, 3, 1, 1]  # 22.5 of 25 is rounded to even
    for part in (kept, held):
        numbers = [int(name.split()[1]) for name in names(part)]
        assert part.labels.tolist() == LABELS[numbers].tolist()
        assert numbers == sorted(numbers)


def test_a_fraction_of_the_labels_depends_on_the_seed_only():
    images = rows(LABELS).splits["train"]
    assert take_fraction(images, 1, seed=0) is images
    tenth = [names(take_fraction(images, 0.1, seed)) for seed in (0, 0, 1)]
    assert tenth[0] == tenth[1] != tenth[2]
    assert len(tenth[0]) == 10


ALL = np.arange(7).repeat(4)


def split_names(data, other=None, select="test", share=0.25):
    """For training and each test split of a run: {original split: number of images}."""
    chosen = choose_splits(data, other, select, share, 0, "the/path")
    parts = {"train": chosen.train, **chosen.tests}
    return {k: Counter(name.split()[0] for name in names(v)) for k, v in parts.items()}


def test_existing_splits_are_used_and_missing_ones_held_out():
    whole = rows(ALL, val=ALL[:8], test=ALL[:9])
    assert split_names(whole) == {"train": {"train": 28}, "test": {"test": 9}}
    assert split_names(whole, select="val") == {
        "train": {"train": 28},
        "test": {"test": 9},
        "val": {"val": 8},
    }
    assert split_names(rows(ALL, test=ALL[:9]), select="val") == {
        "train": {"train": 21},
        "test": {"test": 9},
        "val": {"train": 7},
    }
    assert split_names(rows(None, all=ALL), select="val") == {
        "train": {"all": 21},
        "val": {"all": 7},
    }


def test_another_data_set_can_be_tested_on():
    own = rows(ALL, test=ALL[:9])
    for splits, expected in (
        ({"val": ALL[:5], "test": ALL[:6]}, {"test": 6}),
        ({"val": ALL[:5]}, {"val": 5}),
        ({"all": ALL[:4]}, {"all": 4}),
    ):
        other = rows(ALL if "all" not in splits else None, **splits)
        assert split_names(own, other)["test"] == expected
        chosen = choose_splits(own, other, "test", 0.25, 0, "the/path")
        used = next(iter(expected))
        assert chosen.splits == {"test": used}
        assert any("has no test split" in note for note in chosen.notes) == (used != "test")


@pytest.mark.parametrize(
    ("data", "other", "message"),
    [
        (rows(None, test=ALL), None, r"the/path: has no training images, only test"),
        (rows(ALL), None, r"the/path: has no test split.*--eval_data_path.*--select val"),
        (rows(ALL), rows(ALL), r"--eval_data_path: has neither a test nor a validation split"),
        (rows(ALL[ALL < 5], test=ALL), None, r"the/path: no training image of Anger, Neutral"),
    ],
)
def test_splits_that_cannot_be_chosen_are_refused(data, other, message):
    with pytest.raises(BadInput, match=message):
        choose_splits(data, other, "test", 0.1, 0, "the/path")


def test_for_affectnet_without_contempt_the_error_suggests_seven_classes():
    data = rows(np.arange(7), n_classes=8, name="affectnet")
    with pytest.raises(BadInput, match=r"Contempt;.*--nb_classes 7"):
        check_classes(data, data.splits["train"], "the/path")


@pytest.mark.parametrize(("model", "tested"), [("affectnet", "rafdb"), ("rafdb", "ferplus")])
def test_labels_of_another_data_set_are_mapped_to_the_models_classes(model, tested):
    classes, theirs = ORDERS[model], ORDERS[tested]
    data = rows(None, n_classes=8, name=tested, test=np.arange(len(theirs)).repeat(2))
    images, common, unknown, unasked = match_classes(data, data.splits["test"], classes)
    both = set(classes) & set(theirs)
    assert {classes[k] for k in common} == both
    assert list(common) == sorted(common)
    meant = [theirs[int(name.split()[1]) // 2] for name in names(images)]
    assert [classes[k] for k in images.labels] == meant
    assert meant == [name for name in theirs for _ in range(2) if name in both]
    assert unknown == dict.fromkeys(sorted(set(theirs) - both), 2)
    assert set(unasked) == set(classes) - both


def test_a_class_of_only_the_model_or_data_is_reported_with_its_nearest_name():
    data = rows(None, n_classes=3, test=np.arange(3).repeat(4))
    data = replace(data, classes=("happy", "Suprise", "sad"))
    matched = match_classes(data, data.splits["test"], ("Surprise", "Happy", "Sad"))
    assert matched.common == [1, 2]  # in any spelling of expressions
    assert matched.images.labels.tolist() == [1] * 4 + [2] * 4
    left_out, unasked = matched.lines()
    assert left_out.startswith("left out: 4 images of Suprise, a class that the model does not")
    assert left_out.endswith("did you mean Surprise?")
    assert "the model's Surprise, which the data set does not have" in unasked
    assert "other 2 classes" in unasked


def test_sets_with_fewer_than_two_classes_in_common_are_refused():
    data = rows(None, name="rafdb", test=[0, 1])
    with pytest.raises(BadInput, match=r"Test set: .*fewer than two in common.*\(cat, Sad\)"):
        match_classes(data, data.splits["test"], ("cat", "Sad"))
