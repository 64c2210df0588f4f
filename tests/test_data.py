"""Data of pre-training: order, crops, mask noise, replacements of unreadable images."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tvf

from datasets import build_loader, build_pretrain_dataset
from datasets.sampler import GlobalBatchSampler
from datasets.transforms import Normalise, centre_crop, crop_and_resize, random_crop_box
from datasets.unreadable import check_readable
from engine_pretrain import MaskedLoss
from runs import assert_as_pillow
from training.bad_images import BadImages
from util.distributed import ProcessInfo
from util.errors import BadInput
from util.log import RunLog
from util.seeding import generator


@pytest.fixture
def folder(tmp_path):
    """A folder of forty small images."""
    rng = np.random.default_rng(0)
    for k in range(40):
        pixels = rng.integers(0, 256, (20 + k, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k:02d}.png")
    return tmp_path


def micro_batches(count, batch_size, accum, world, epoch=0, step=0):
    """[rank][k] -> the k-th micro-batch of a rank."""
    samplers = [
        GlobalBatchSampler(count, batch_size, accum, ProcessInfo(r, world)) for r in range(world)
    ]
    for sampler in samplers:
        sampler.start_at(epoch, step)
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize(("batch_size", "accum", "world"), [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_the_images_of_a_step_do_not_depend_on_the_number_of_processes(batch_size, accum, world):
    parts = micro_batches(50, batch_size, accum, world, epoch=3)
    steps = [set() for _ in range(7)]
    for rank in parts:
        assert len(rank) == 7 * accum
        for k, batch in enumerate(rank):
            steps[k // accum].update(batch)
    expected = GlobalBatchSampler(50, 8)
    expected.start_at(3)
    assert steps == [set(batch) for batch in expected]


def test_every_step_is_full_and_every_image_is_seen():
    seen = [index for batch in micro_batches(50, 8, 1, 1)[0] for _, index in batch]
    assert len(seen) == 56
    assert set(seen) == set(range(50))
    assert seen[50:] == seen[:6]  # filled up from the start of the epoch


def test_an_epoch_with_repeats_is_one_pass_after_the_other():
    sampler = GlobalBatchSampler(50, 8, repeats=3)
    order = sampler.order()
    assert (len(order), sampler.steps) == (152, 19)
    for k in range(3):  # repetitions have other sample numbers, hence other augmentation
        assert sorted(order[50 * k : 50 * (k + 1)]) == list(range(50 * k, 50 * (k + 1)))
    assert np.array_equal(order[:50], GlobalBatchSampler(50, 8).order()[:50])
    assert not np.array_equal(order[:50], order[50:100] - 50)


def test_an_epoch_can_begin_at_any_step():
    whole = micro_batches(50, 4, 2, 1, epoch=1)[0]
    assert micro_batches(50, 4, 2, 1, epoch=1, step=5)[0] == whole[10:]
    assert whole != micro_batches(50, 4, 2, 1, epoch=2)[0]


def test_less_data_than_a_global_batch_is_refused_with_the_arithmetic():
    with pytest.raises(BadInput, match=r"30 images.*8 × --accum_iter 2 × 2 processes = 32"):
        GlobalBatchSampler(30, 8, 2, ProcessInfo(0, 2))


def test_a_sample_is_a_function_of_seed_epoch_and_index(folder):
    ds = build_pretrain_dataset(folder, 32, num_patches=16)
    image, noise, problem = ds[2, 7]
    assert (image.shape, image.dtype, noise.shape, problem) == ((3, 32, 32), torch.uint8, (16,), "")
    again = build_pretrain_dataset(folder, 32, num_patches=16)[2, 7]
    assert torch.equal(image, again[0])
    assert torch.equal(noise, again[1])
    for other in (ds[3, 7], build_pretrain_dataset(folder, 32, num_patches=16, seed=1)[2, 7]):
        assert not torch.equal(noise, other[1])
        assert not torch.equal(image, other[0])
    assert torch.equal(ds[5][0], ds[0, 5][0])


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(folder, workers):
    ds = build_pretrain_dataset(folder, 32, num_patches=16)
    loaders = [build_loader(ds, GlobalBatchSampler(len(ds), 8), w) for w in (0, workers)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    frozen = gc.get_freeze_count()
    for ours, alone in zip(*loaders, strict=True):
        assert gc.get_freeze_count() > frozen, (
            "collecting garbage would unshare memory from workers"
        )
        assert torch.equal(ours[0], alone[0])
        assert torch.equal(ours[1], alone[1])
    assert torch.equal(torch.get_rng_state(), before), "loading must not draw from torch's state"


@pytest.mark.parametrize(
    "box", [(23, 11, 61, 50), (0, 0, 120, 90), (5, 3, 13, 17), (9, 80, 100, 1)]
)
@pytest.mark.parametrize("flip", [False, True])
def test_crops_equal_those_of_torchvision_and_pillow(box, flip):
    pixels = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    pixels.flags.writeable = False  # as in a memory map
    ours = crop_and_resize(pixels, box, 48, flip)
    bicubic = tvf.InterpolationMode.BICUBIC
    left, top, w, h = box
    theirs = tvf.resized_crop(Image.fromarray(pixels), top, left, h, w, [48, 48], bicubic)
    assert_as_pillow(ours, tvf.hflip(theirs) if flip else theirs)
    assert ours.permute(1, 2, 0).is_contiguous(), "collated as they lie"


def test_crop_boxes_are_distributed_like_torchvisions():
    torch.manual_seed(0)
    image = torch.empty(3, 100, 80)
    theirs = [RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    ours = [random_crop_box(100, 80, generator(9, 0, 0, k)) for k in range(4000)]
    # Theirs are (top, left, height, width).
    a, b = np.array(ours, float), np.array(theirs, float)[:, [1, 0, 3, 2]]
    assert (a[:, 0] + a[:, 2]).max() <= 80
    assert (a[:, 1] + a[:, 3]).max() <= 100
    spread = b.std(axis=0)
    assert np.all(np.abs(a.mean(axis=0) - b.mean(axis=0)) < 5 * spread / np.sqrt(2000))
    assert np.all(np.abs(a.std(axis=0) / spread - 1) < 0.1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (3000, 2)])
def test_crop_boxes_of_extreme_shapes_lie_inside_the_image(height, width):
    for k in range(50):
        left, top, w, h = random_crop_box(height, width, generator(9, 0, 0, k))
        assert h > 0
        assert w > 0
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w


def test_centre_crop_and_normalisation_are_those_of_imagenet():
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[25:75, 75:125] = 255
    assert (centre_crop(pixels, 40, 0.5) == 255).all()
    normalise = Normalise()
    x = normalise(torch.tensor([255, 0, 128], dtype=torch.uint8).view(1, 3, 1, 1))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    assert x.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert normalise.pixels(x).flatten().tolist() == [255, 0, 128]
    given = torch.full((1, 3, 1, 1), 128.0)
    normalise(given)
    assert (given == 128).all(), "what is given stays as it is"


def test_an_unreadable_image_is_reported_and_replaced_reproducibly(folder):
    (folder / "07.png").write_bytes(b"<html>not found</html>")
    ds = build_pretrain_dataset(folder, 32, num_patches=16)
    image, noise, problem = ds[1, 7]
    assert problem.startswith(f"{folder}/07.png\t")
    again = build_pretrain_dataset(folder, 32, num_patches=16)[1, 7]
    assert torch.equal(image, again[0])
    assert torch.equal(noise, again[1])
    assert not torch.equal(ds[2, 7][0], image)


class Lines(RunLog):
    """A log that stores its lines."""

    def __init__(self):
        self.lines, self._late = [], {}

    def line(self, text):
        self.lines.append(text)


def test_unreadable_images_are_named_once_and_too_many_end_the_run(tmp_path):
    record, log = tmp_path / "bad_images.txt", Lines()
    loss = MaskedLoss(Normalise())
    bad = BadImages(loss, 100, record, True, log)
    loss.problems = {"b.jpg\tempty", "a.jpg\ttruncated"}
    bad.tell()
    loss.problems = {"b.jpg\tempty", "c.jpg\tempty"}
    bad.tell()
    assert [line.split(": ")[1] for line in log.lines] == [
        "cannot read a.jpg",
        "cannot read b.jpg",
        "cannot read c.jpg",
    ]
    going_on = BadImages(loss, 100, record, False, log)
    assert list(going_on.known) == ["a.jpg", "b.jpg", "c.jpg"]
    loss.problems = {f"{k}.jpg\tempty" for k in range(3)}
    with pytest.raises(BadInput, match=r"6 of 100 images.*5%.*bad_images\.txt"):
        going_on.tell()
    assert len(record.read_text().splitlines()) == 6
    assert BadImages(loss, 100, record, True, log).known == {}


def test_a_folder_without_one_readable_image_is_refused_at_once(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"none of the 32 images tried can be read .*empty"):
        check_readable(build_pretrain_dataset(folder, 32).source)


def test_synthetic_accepts_a_count():
    assert len(build_pretrain_dataset("synthetic:17", 32)) == 17
    assert len(build_pretrain_dataset()) == 10_000
    with pytest.raises(BadInput, match="synthetic:0"):
        build_pretrain_dataset("synthetic:0")
