"""Images per second: our loading of files and packed stores against torchvision's pipeline.

    python benchmarks/data.py [--files 200] [--workers 2] [--json FILE]

The peer is the pipeline of the official code: ImageFolder, Pillow, RandomResizedCrop (bicubic),
RandomHorizontalFlip, ToTensor, Normalize. Ours is the pipeline of `main_pretrain.py`, mask noise
included; normalising its batches is timed as well. The JPEG files are synthetic faces of quality
90. Crops are compared with Pillow's before anything is timed.

Besides producing images, workers collate them and hand the batches over. The number of cores that
a node needs is therefore computed from the workers' CPU time.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import timing
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from datasets import PretrainDataset, build_loader, open_images
from datasets.decode import load_rgb
from datasets.sampler import GlobalBatchSampler
from datasets.synthetic.generator import SyntheticFaces
from datasets.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalise,
    crop_and_resize,
    random_crop_box,
)
from util.distributed import ProcessInfo
from util.seeding import SAMPLE, generator

SIDES = (224, 500)
BATCH = 32
GPU_RATES = (1000, 4000)  # images per second that each of eight GPUs consumes


def write_faces(folder: Path, side: int, count: int, distinct: int = 100) -> None:
    """Write synthetic faces as JPEG files of one class, `distinct` different ones in turn."""
    (folder / "faces").mkdir(parents=True)
    drawn = SyntheticFaces(min(count, distinct), size=side)
    for i in range(count):
        image = Image.fromarray(drawn.image(i % len(drawn)))
        image.save(folder / "faces" / f"{i:05d}.jpg", quality=90)


def peer(folder: Path) -> Dataset:
    """The files, loaded by torchvision's pipeline."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    return ImageFolder(str(folder), transforms.Compose(steps))


def difference(folder: Path) -> float:
    """Mean absolute difference of our crops from Pillow's, of 255."""
    off = []
    for k, path in enumerate(sorted(folder.rglob("*.jpg"))[:100]):
        with Image.open(path) as image:
            whole = np.asarray(image.convert("RGB"))
        assert np.array_equal(load_rgb(path), whole), path
        left, top, w, h = box = random_crop_box(*whole.shape[:2], generator(SAMPLE, 0, 0, k))
        cut = Image.fromarray(whole[top : top + h, left : left + w])
        theirs = np.asarray(cut.resize((224, 224), Image.Resampling.BICUBIC), float)
        ours = crop_and_resize(whole, box, 224).permute(1, 2, 0).numpy()
        off.append(np.abs(ours - theirs).mean())
    return float(np.mean(off))


def through(items: Iterable, finish: Callable | None = None) -> Callable[[], None]:
    """A function that iterates over `items` once and calls `finish` on each batch's images."""

    def run() -> None:
        for item in items:
            if finish:
                finish(item[0])

    return run


def pack(folder: Path, store: Path) -> None:
    """Pack the files into a store with main_pack.py."""
    import main_pack
    from util.program import run_program

    options = ["--data_path", str(folder), "--output", str(store), "--num_workers", "0"]
    assert (
        run_program(main_pack.build_parser, main_pack.check_options, main_pack.work, options) == 0
    )


def worker_seconds() -> float:
    """CPU time of all data workers so far, in seconds, as Linux counts it."""
    stats = (Path(f"/proc/{child.pid}/stat").read_text() for child in active_children())
    fields = [stat.rpartition(")")[2].split() for stat in stats]
    ticks = sum(int(f[11]) + int(f[12]) for f in fields)  # user and system time
    return ticks / os.sysconf("SC_CLK_TCK")


def worker_ms_per_image(run: Callable[[], None], images: int, rounds: int) -> float:
    """CPU time of a loader's workers, without their start: they must be persistent."""
    run()
    before = worker_seconds()
    for _ in range(rounds):
        run()
    return 1000 * (worker_seconds() - before) / (rounds * images)


def measure(folder: Path, args: argparse.Namespace, side: int) -> tuple[list, list, list]:
    """Rows for one process, for the whole loader, and for the CPU time of its workers."""
    normalise, theirs = Normalise(), peer(folder)
    pack(folder, folder.with_name(f"{side}-packed"))
    ours = {
        "files": PretrainDataset(open_images(str(folder)).source, 224, 196, 0),
        "packed": PretrainDataset(
            open_images(str(folder.with_name(f"{side}-packed"))).source, 224, 196, 0
        ),
    }

    def alone(dataset: Dataset) -> Iterable:
        return (dataset[i] for i in range(len(dataset)))

    class Again:
        """Iterable as often as needed: makes a new generator each time."""

        def __init__(self, dataset: Dataset) -> None:
            self.dataset = dataset

        def __iter__(self) -> Iterable:
            return alone(self.dataset)

    single = {"torchvision": through(Again(theirs))}
    single |= {name: through(Again(dataset)) for name, dataset in ours.items()}
    loaders = {
        "torchvision": through(
            DataLoader(theirs, BATCH, True, num_workers=args.workers, persistent_workers=True)
        )
    }
    for name, dataset in ours.items():
        sampler = GlobalBatchSampler(len(dataset), BATCH, 1, ProcessInfo(), 0)
        loaders[name] = through(build_loader(dataset, sampler, args.workers), normalise)
    rates = []
    for candidates in (single, loaders):
        taken = timing.alternate(candidates, args.rounds, warmup=1)
        rates.append({name: len(theirs) / seconds for name, seconds in taken.items()})
    tables = [[[side, n, r, r / rate["torchvision"]] for n, r in rate.items()] for rate in rates]
    work = []
    for name, run in loaders.items():
        own, whole = 1000 / rates[0][name], worker_ms_per_image(run, len(theirs), args.rounds)
        cores = [math.ceil(8 * rate * whole / 1000) for rate in GPU_RATES]
        work.append([side, name, own, whole, whole - own, *cores])
    return tables[0], tables[1], work


def main() -> None:
    parser = timing.parser(__doc__.splitlines()[0], rounds=5)
    parser.add_argument(
        "--files",
        type=int,
        default=192,
        help="number of JPEG files of each size (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="number of data-loading workers (default: %(default)s)",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = timing.Report("Data loading, RandomResizedCrop 224 and flip", args)
    off, single, loaded, work = [], [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        for side in SIDES:
            folder = Path(temporary, str(side))
            write_faces(folder, side, args.files)
            off.append([side, difference(folder)])
            one, all_of, cpu = measure(folder, args, side)
            single += one
            loaded += all_of
            work += cpu
    report.table("Mean difference from Pillow's crops, of 255", ["px", "mean"], off)
    head = ["px", "path", "images/s", "× torchvision"]
    report.table("One process, one thread", head, single)
    report.table(f"Whole loader, {args.workers} workers", head, loaded)
    head = ["px", "path", "ms alone", "ms in a worker", "extra", *(f"{r:,}/s" for r in GPU_RATES)]
    report.table("CPU time per image, and cores needed to feed 8 GPUs", head, work)
    report.close()


if __name__ == "__main__":
    main()
