"""What pre-training draws from images."""

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
    """(epoch, index) -> augmented image, mask noise, and what was wrong with its file if anything.

    Crop, flip and noise are functions of (seed, epoch, index); a plain index is epoch 0.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        patches: int,
        seed: int,
        size_at: Callable[[int], int] | None = None,
    ) -> None:
        """`patches`: how many an image of `size` pixels a side has.

        `size_at(epoch)` is the size in an epoch where it changes (workers need to pickle it).
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
        """The image as a whole, (3, S, S) uint8, without augmentation; None if unreadable."""
        try:
            return centre_crop(self.source.image(index), self.size, crop_pct)
        except UnreadableImage:
            return None
