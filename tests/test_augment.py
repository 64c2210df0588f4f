"""Augmentation of images and labels in fine-tuning, on the CPU and on the device."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from datasets.augment import face_augment, plain, posterize, random_augment
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, Normalise
from engine_finetune import ClassifierLoss
from runs import assert_as_pillow
from training.precision import Precision
from util.seeding import AUGMENT, borrowed_globals, generator, seed_globals

CPU = torch.device("cpu")
CLASSES = 7
DRAWS = 200


def noise_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def drawn(augment, image, k):
    """The k-th augmentation of an image."""
    with borrowed_globals(generator(AUGMENT, 0, 0, k)):
        return augment(image)


def global_states():
    """Python's, NumPy's and torch's, comparable with ==."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


# Augmentations of one image


VIEWS = {
    "plain": plain(48),
    "centre": plain(48, 0.875),
    "fer": face_augment(48, 0.25, "bilinear"),
    "randaug": random_augment(48),
}


@pytest.mark.parametrize("shape", [(100, 70), (31, 48), (7, 5)])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_of_any_image_is_a_uint8_square(view, shape):
    x = drawn(VIEWS[view], noise_image(*shape), 0)
    assert (x.shape, x.dtype) == ((3, 48, 48), torch.uint8)
    assert x.permute(1, 2, 0).is_contiguous(), "collated as they lie"


def test_the_plain_view_is_the_whole_image_resized_as_by_pillow():
    image = noise_image(70, 100)  # Pillow resamples tall images along the axes in reverse order
    expected = Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC)
    assert_as_pillow(plain(48)(image), expected)


@pytest.fixture(scope="module")
def placements():
    """(DRAWS, 2, 2): slope and offset with which the face augmentation maps output x and y.

    source = slope * output + offset, in a square of side length 1 around 0. Measured on a picture
    whose red is x, whose green is y, and whose blue marks everything but the fill.
    """
    side = 96
    steps = np.linspace(0, 255, side)
    x, y = np.meshgrid(steps, steps)
    image = np.stack([x, y, np.full_like(x, 255)], axis=-1).round().astype(np.uint8)
    augment = face_augment(side, 0.0, "bilinear")
    centres = (np.arange(side) + 0.5) / side - 0.5
    found = []
    for k in range(DRAWS):
        red, green, inside = drawn(augment, image, k).float().numpy()
        kept = inside == 255
        rows, columns = np.nonzero(kept)
        scale = (side - 1) / side / 255
        across = np.polyfit(centres[columns], (red[kept] - 127.5) * scale, 1)
        down = np.polyfit(centres[rows], (green[kept] - 127.5) * scale, 1)
        found.append((across, down))
    return np.array(found)


def test_faces_are_shifted_and_enlarged_no_further_than_published(placements):
    slopes, offsets = np.abs(placements[..., 0]), placements[..., 1]
    zoom = 1 / slopes
    assert zoom.min() > 0.99
    assert zoom.max() < 1.26
    assert np.abs(offsets * zoom).max() < 0.1 + 0.01
    # So the middle 64 % of each side – eyes, mouth, brows – are always visible.
    edges = slopes * 0.5 - np.abs(offsets)
    assert edges.min() > 0.5 - 0.185


def test_half_the_faces_stay_in_place_and_others_reach_the_bounds(placements):
    zoom = 1 / np.abs(placements[:, 0, 0])
    still = np.isclose(zoom, 1, atol=0.003) & (np.abs(placements[..., 1]).max(axis=1) < 0.003)
    assert still.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(DRAWS))
    assert zoom.max() > 1.22
    assert np.abs(placements[..., 1]).max() > 0.07


def test_half_the_faces_are_mirrored_and_none_is_upside_down(placements):
    mirrored = placements[:, 0, 0] < 0
    assert mirrored.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(DRAWS))
    assert (placements[:, 1, 0] > 0).all()


def test_no_face_is_recoloured_without_jitter():
    image = np.full((24, 24, 3), (150, 120, 100), np.uint8)
    augment = face_augment(24, 0.0, "bilinear")
    for k in range(20):
        assert drawn(augment, image, k)[:, 12, 12].tolist() == [150, 120, 100]


@pytest.mark.parametrize(
    ("policy", "jitter", "scale"),
    [("rand-m9-mstd0.5-inc1", None, 0.08), ("", None, 0.5), ("", 0.4, 0.08), ("augmix-m5", 0, 1)],
)
def test_the_random_augmentation_equals_timms_with_equal_seeds(policy, jitter, scale):
    ours = random_augment(40, policy, jitter, smallest_crop=scale)
    theirs = create_transform(
        40,
        is_training=True,
        scale=(scale, 1.0),
        color_jitter=jitter,
        auto_augment=policy or None,
        interpolation="bicubic",
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    image = noise_image(70, 60)
    seen = set()
    for k in range(6):
        x = drawn(ours, image, k)
        y = drawn(lambda pixels: theirs(Image.fromarray(pixels)), image, k)
        assert torch.equal(x, ((y * std + mean) * 255).round().to(torch.uint8))
        seen.add(x.numpy().tobytes())
    assert len(seen) == 6


# Borrowed generators


def draw_from_all():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("policy", ["rand-m10-n15-inc1", "rand-m10-n15", "augmix-m10", "original"])
def test_the_strongest_augmentation_works_with_every_operation(policy):
    augment, image = random_augment(24, policy), noise_image(32, 32)
    for k in range(40):
        assert drawn(augment, image, k).shape == (3, 24, 24)


@pytest.mark.parametrize(("bits", "mask"), [(0, 0), (1, 0x80), (4, 0xF0), (8, 0xFF)])
def test_posterizing_keeps_the_upper_bits(bits, mask):
    image = noise_image(8, 9)
    assert (np.asarray(posterize(Image.fromarray(image), bits, resample=2)) == image & mask).all()


def test_borrowed_generators_are_reproducible_and_restored():
    before = global_states()
    drawn = []
    for k in (0, 0, 1):
        with borrowed_globals(generator(AUGMENT, 3, 1, k)):
            drawn.append(draw_from_all())
        assert global_states() == before
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


def test_borrowed_generators_are_restored_after_an_error():
    def unlucky():
        draw_from_all()
        raise ZeroDivisionError

    before = global_states()
    with pytest.raises(ZeroDivisionError), borrowed_globals(generator(AUGMENT, 0)):
        unlucky()
    assert global_states() == before


# The loss of a batch


class Flat(nn.Module):
    """A linear classifier of 8 × 8 pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * 8 * 8, CLASSES)

    def forward(self, x):
        return self.head(x.flatten(1))


def a_batch(n=8):
    """Images, labels, the labels as distributions."""
    rng = torch.Generator().manual_seed(1)
    imgs = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, CLASSES, (n,), generator=rng)
    return imgs, labels, torch.eye(CLASSES)[labels]


def mixup(**options):
    """Mixup as the program builds it; labels are smoothed before."""
    return Mixup(**options, label_smoothing=0.0, num_classes=CLASSES, multi_label=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_hard_labels_give_timms_loss(smoothing):
    imgs, labels, targets = a_batch()
    model, normalise = Flat(), Normalise()
    ours = ClassifierLoss(normalise, smoothing)(model, (imgs, targets, []))
    theirs = LabelSmoothingCrossEntropy(smoothing)(model(normalise(imgs)), labels)
    torch.testing.assert_close(ours, theirs)


KINDS = {
    "mixup": {"mixup_alpha": 0.8},
    "cutmix": {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
    "both": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "minmax": {"mixup_alpha": 0.0, "cutmix_minmax": (0.2, 0.8)},
    "sometimes": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.5},
}


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", KINDS)
def test_mixing_hard_labels_gives_timms_loss(kind, mode):
    imgs, labels, targets = a_batch()
    model, normalise = Flat(), Normalise()
    options = {**KINDS[kind], "mode": mode}
    loss = ClassifierLoss(normalise, 0.1, mixup(**options))
    theirs = Mixup(**options, label_smoothing=0.1, num_classes=CLASSES)
    for seed in range(4):
        np.random.seed(seed)
        ours = loss(model, (imgs, targets, []))
        np.random.seed(seed)
        x, mixed = theirs(normalise(imgs), labels)
        torch.testing.assert_close(ours, SoftTargetCrossEntropy()(model(x), mixed))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", KINDS)
def test_votes_are_mixed_in_proportion_to_their_images(kind, mode):
    """Each image has one colour, so that the mean colour of a mixed one gives its first's share."""
    n = 8
    colours = torch.tensor([0, 10, 30, 60, 100, 150, 200, 255], dtype=torch.uint8)
    imgs = colours.view(n, 1, 1, 1).expand(n, 3, 10, 10).contiguous()
    votes = torch.rand(n, CLASSES, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    loss = ClassifierLoss(Normalise((0, 0, 0), (1, 1, 1)), mix=mixup(**KINDS[kind], mode=mode))
    loss.cross_entropy = lambda x, targets: (x, targets)
    np.random.seed(3)
    x, targets = loss(nn.Identity(), (imgs, votes, []))
    own, other = colours.float() / 255, colours.flip(0).float() / 255
    share = ((x.mean(dim=(1, 2, 3)) - other) / (own - other)).unsqueeze(1)
    assert ((share > -1e-5) & (share < 1 + 1e-5)).all()
    torch.testing.assert_close(
        targets, share * votes + (1 - share) * votes.flip(0), atol=1e-5, rtol=1e-5
    )


def erased(step, **options):
    """A grey batch after erasing in one step of a run, and before."""
    loss = ClassifierLoss(
        Normalise(), erase=RandomErasing(1.0, mode="pixel", device=CPU, **options)
    )
    loss.cross_entropy = lambda x, targets: x
    seed_globals(5, 2, step, 0)
    batch = loss.blank_batch(6, 16, CLASSES)
    return loss(nn.Identity(), batch), loss.normalise(batch[0])


def test_erasing_is_a_function_of_the_step():
    first, clean = erased(0)
    assert (first != clean).flatten(1).any(dim=1).all()
    assert torch.equal(first, erased(0)[0])
    assert not torch.equal(first, erased(1)[0])


def test_resplit_erases_nothing_in_the_first_half():
    x, clean = erased(0, num_splits=2)
    assert torch.equal(x[:3], clean[:3])
    assert (x[3:] != clean[3:]).flatten(1).any(dim=1).all()


def test_the_loss_stays_in_fp32_and_close_under_half_precision():
    imgs, _, targets = a_batch()
    model, loss = Flat(), ClassifierLoss(Normalise(), 0.1)
    exact = loss(model, (imgs, targets, []))
    with Precision("bf16", CPU).autocast():
        half = loss(model, (imgs, targets, []))
    assert half.dtype == torch.float32
    assert half != exact
    torch.testing.assert_close(half, exact, rtol=0.01, atol=0)


def test_problems_of_batches_are_kept_until_they_are_reported():
    imgs, _, targets = a_batch(2)
    loss = ClassifierLoss(Normalise())
    for problems in (["", "a.jpg\tempty"], ["a.jpg\tempty", "b.jpg\ttruncated"]):
        loss(Flat(), (imgs, targets, problems))
    assert loss.problems == {"a.jpg\tempty", "b.jpg\ttruncated"}
