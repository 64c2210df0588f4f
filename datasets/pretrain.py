"""The data set for pre-training: augmented images and mask noise."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.decode import UnreadableImage
from datasets.labelled import Source
from datasets.transforms import centre_crop, crop_and_resize, random_crop_box
from datasets.unreadable import read_or_replace
from util.seeding import SAMPLE, generator


class PretrainDataset(Dataset):
    """(epoch, index) -> augmented image, mask noise, and what was wrong with the file, if anything.

    Crop, flip and noise are functions of (seed, epoch, index); a plain index means epoch 0.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        patches: int,
        seed: int,
        size_at: Callable[[int], int] | None = None,
    ) -> None:
        """`patches`: the number of patches in an image with a side length of `size` pixels.

        `size_at(epoch)` gives the side length in an epoch, if it changes (picklable, for workers).
        """
        self.source, self.size, self.patches, self.seed = source, size, patches, seed
        self.size_at = size_at

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int | tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        """-> image (3, S, S) uint8, noise (L,) float32, "" or "name<TAB>reason"."""
        epoch, index = position if isinstance(position, tuple) else (0, position)
        size = self.size_at(epoch) if self.size_at else self.size
        patches = (math.isqrt(self.patches) * size // self.size) ** 2
        rng = generator(SAMPLE, self.seed, epoch, index)
        noise = torch.from_numpy(rng.random(patches, dtype="float32"))
        flip = rng.random() < 0.5
        image, _, problem = read_or_replace(self.source, index, rng)
        box = random_crop_box(*image.shape[:2], rng)
        return crop_and_resize(image, box, size, flip), noise, problem

    def view(self, index: int, crop_pct: float) -> Tensor | None:
        """The central square without augmentation, (3, S, S) uint8; None if it is unreadable."""
        try:
            return centre_crop(self.source.image(index), self.size, crop_pct)
        except UnreadableImage:
            return None
