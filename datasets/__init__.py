"""Images by path: folders, lists, synthetic faces; what pre-training draws from them."""

import os
import re

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.decode import UnreadableImage
from datasets.folder import ImageFiles, list_images
from datasets.sampler import GlobalBatchSampler
from datasets.synthetic import SyntheticFaces
from datasets.transforms import centre_crop, crop_and_resize, random_crop_box
from util.errors import BadInput
from util.seeding import SAMPLE, generator
from util.stop import shield_worker

MAX_REPLACEMENTS = 20


class PretrainDataset(Dataset):
    """(epoch, index) -> augmented image, mask noise, and what was wrong with its file if anything.

    Crop, flip and noise are functions of (seed, epoch, index); a plain index is epoch 0.
    """

    def __init__(
        self, source: ImageFiles | SyntheticFaces, size: int, patches: int, seed: int
    ) -> None:
        self.source, self.size, self.patches, self.seed = source, size, patches, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int | tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        """-> image (3, S, S) uint8, noise (L,) float32, "" or "name<TAB>reason"."""
        epoch, index = position if isinstance(position, tuple) else (0, position)
        rng = generator(SAMPLE, self.seed, epoch, index)
        noise = torch.from_numpy(rng.random(self.patches, dtype="float32"))
        flip = rng.random() < 0.5
        problem = ""
        for _ in range(MAX_REPLACEMENTS):
            try:
                image = self.source.image(index)
                break
            except UnreadableImage as error:
                problem = problem or f"{self.source.name(index)}\t{error.reason}"
                index = int(rng.integers(len(self)))  # a replacement that depends on nothing else
        else:
            raise BadInput(
                f"--data_path: {MAX_REPLACEMENTS} files in a row are no images ({problem})"
            )
        box = random_crop_box(*image.shape[:2], rng)
        return crop_and_resize(image, box, self.size, flip), noise, problem

    def view(self, index: int, crop_pct: float) -> Tensor | None:
        """The image as a whole, (3, S, S) uint8, without augmentation; None if unreadable."""
        try:
            return centre_crop(self.source.image(index), self.size, crop_pct)
        except UnreadableImage:
            return None


def open_source(
    data_path: str = "synthetic", cache: str | os.PathLike | None = None, size: int = 256
) -> ImageFiles | SyntheticFaces:
    """The images of `--data_path`: a folder, a list or CSV of files, `synthetic[:COUNT]`.

    `cache` is where a folder's listing is kept; `size` is that of drawn faces. Raises BadInput.
    """
    if match := re.fullmatch(r"synthetic(?::(\d+))?", str(data_path)):
        if match[1] is not None and int(match[1]) < 1:
            raise BadInput(f"--data_path {data_path}: ask for at least one face")
        return SyntheticFaces(int(match[1] or 10_000), size=size)
    return ImageFiles(list_images(data_path, cache))


def build_pretrain_dataset(
    data_path: str = "synthetic",
    input_size: int = 224,
    num_patches: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike | None = None,
) -> PretrainDataset:
    """Images for masked pre-training, `ds[i][0]` an augmented one, (3, S, S) uint8.

    `num_patches` is how much mask noise is drawn beside each (patches of 16 px when not given).
    Raises BadInput for a path that holds no images.
    """
    # A little larger than the input, as photographs are: crops are scaled down and up.
    source = open_source(data_path, cache, size=max(16, round(input_size * 8 / 7)))
    return PretrainDataset(source, input_size, num_patches or (input_size // 16) ** 2, seed)


def build_loader(
    dataset: Dataset,
    sampler: GlobalBatchSampler,
    workers: int,
    pin_memory: bool = False,
    timeout: float = 600,
) -> DataLoader:
    """A loader of the sampler's micro-batches; the number of workers changes no batch.

    A batch that takes longer than `timeout` seconds is an error, not a hang.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        timeout=timeout if workers else 0,
        persistent_workers=workers > 0,
        worker_init_fn=shield_worker,
        generator=torch.Generator(),  # else every epoch would draw from the global one
    )
