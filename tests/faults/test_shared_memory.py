"""With little shared memory, as containers have it, runs work; without any, they say what to do."""

import os
import re
from functools import partial

import pytest
import torch
from injection import run_with
from torch.utils.data import Dataset

from datasets import build_loader
from datasets.loader import SPARE
from datasets.sampler import GlobalBatchSampler
from disks import shrink_shared_memory, with_shared_memory
from runs import assert_same_run
from util.errors import Lost
from util.process_failures import explain

COUNT, BATCH = 48, 8


class Images(Dataset):
    """Images of 300 kB, each different, with a tensor, a number and a text."""

    def __len__(self):
        return COUNT

    def __getitem__(self, item):
        rng = torch.Generator().manual_seed(item[1])
        image = torch.randint(256, (320, 320, 3), generator=rng, dtype=torch.uint8)
        return image.permute(2, 0, 1), torch.rand(5, generator=rng), item[1], f"image {item[1]}"


def batches(workers):
    sampler = GlobalBatchSampler(COUNT, BATCH)
    return build_loader(Images(), sampler, workers=workers, timeout=30)


def assert_all_arrive(after_first=lambda: None):
    """Batches of workers equal those of this process, also in memory."""
    for k, (ours, expected) in enumerate(zip(batches(2), batches(0), strict=True)):
        for a, b in zip(ours[:3], expected[:3], strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
        assert list(ours[3]) == list(expected[3])
        ours[0][0, 0, 0, 0] += 1  # it is writable
        if k == 0:
            after_first()


def fill():
    """Another program takes all shared memory."""
    with open("/dev/shm/other", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            return


def test_batches_that_do_not_fit_into_shared_memory_arrive():
    assert with_shared_memory("size=2m", assert_all_arrive) == 0


def test_shared_memory_may_fill_up_during_a_run():
    assert with_shared_memory(f"size={SPARE + 2**23}", assert_all_arrive, fill) == 0


def test_some_shared_memory_is_left_to_others():
    def act():
        first = iter(batches(2))
        kept = [next(first) for _ in range(5)]
        found = os.statvfs("/dev/shm")
        assert kept
        assert found.f_bavail * found.f_frsize > SPARE - BATCH * 320**2 * 3

    assert with_shared_memory(f"size={SPARE + 2**23}", act) == 0


@pytest.mark.parametrize("options", ["size=4m", "size=4m,ro"])
def test_without_shared_memory_workers_are_not_started(options):
    def act():
        if "ro" not in options:
            fill()
        with pytest.raises(Lost, match=r"--shm-size 8g or --ipc=host\), or use --num_workers 0"):
            next(iter(batches(2)))

    assert with_shared_memory(options, act) == 0


def test_a_run_in_a_small_container_is_the_same(undisturbed, tmp_path):
    before = partial(shrink, "size=2m")
    codes, said, _ = run_with(before, tmp_path, "--num_workers 2", world=1)
    if "CalledProcessError" in said[0]:
        pytest.skip("cannot mount another /dev/shm here")
    assert codes == [0], said
    assert_same_run(tmp_path, undisturbed("mae", 1))


def shrink(options, _rank):
    shrink_shared_memory(options)


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. ",
        "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to allocate "
        "shared memory(shm) for file </torch_4_2_1>: No space left on device (28)",
    ],
)
def test_a_worker_that_dies_of_it_names_the_cause_and_the_remedy(text):
    said = str(explain(RuntimeError(text)))
    assert re.search(r"shared memory \(/dev/shm\) .*--shm-size 8g or --ipc=host", said)
    assert "shows why" not in said
