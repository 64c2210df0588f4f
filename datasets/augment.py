"""Augmentations for fine-tuning, and the plain view for testing.

Each is a function (H, W, 3) uint8 -> (3, S, S) uint8. The transforms of timm and torchvision use
the global random generators, which the data set seeds from the sample's position. All of them can
be pickled, which data workers need if they are not forked.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from datasets.transforms import centre_crop, crop_and_resize

Augment = Callable[[np.ndarray], Tensor]

POSTERIZE = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")  # timm's names


def plain(size: int, crop_pct: float | None = None, interpolation: str = "bicubic") -> Augment:
    """The whole image resized to a square, or a central square of `crop_pct` of its short side."""
    if crop_pct is not None:
        return partial(centre_crop, size=size, crop_pct=crop_pct, interpolation=interpolation)
    return partial(_whole, size=size, interpolation=interpolation)


def _whole(image: np.ndarray, size: int, interpolation: str) -> Tensor:
    height, width = image.shape[:2]
    return crop_and_resize(image, (0, 0, width, height), size, interpolation=interpolation)


def face_augment(size: int, color_jitter: float, interpolation: str) -> Augment:
    """Augment the whole face as the original MAE-SFER's `main_rafdb.py` does.

    Flips with probability 0.5. Independently, also with probability 0.5, applies colour jitter
    together with a shift of up to 0.1 and a zoom of up to 1.25; uncovered areas are black. The
    image is resized last, so all of this happens at its own size.
    """
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(*4 * (color_jitter,))
    bilinear = v2.InterpolationMode.BILINEAR
    move = v2.RandomAffine(0, translate=(0.1, 0.1), scale=(1.0, 1.25), interpolation=bilinear)
    steps = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter, move]),
            v2.Resize((size, size), v2.InterpolationMode(interpolation)),
            v2.PILToTensor(),
        ]
    )
    return partial(_through_pillow, steps)


def random_augment(
    size: int,
    policy: str = "rand-m9-mstd0.5-inc1",
    color_jitter: float | None = None,
    interpolation: str = "bicubic",
    smallest_crop: float = 0.08,
) -> Augment:
    """Augment as for ImageNet: random crop, flip, and RandAugment (or another of timm's policies).

    `smallest_crop` is a share of the image's area. An empty `policy` leaves crop, flip and jitter.
    """
    from timm.data import auto_augment, create_transform

    for name in POSTERIZE:
        auto_augment.NAME_TO_OP[name] = posterize
    steps = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,  # returns uint8: normalising and erasing happen on the device
        scale=(smallest_crop, 1.0),
        color_jitter=color_jitter,
        auto_augment=policy or None,
        interpolation=interpolation,
    )
    return partial(_through_pillow, steps)


def posterize(image: Image.Image, bits: int, **_others: object) -> Image.Image:
    """Keep the upper `bits` of each channel; 0, the strongest in RandAugment, makes it black.

    Replaces timm's function, which passes 0 on to Pillow; from version 13, Pillow refuses it.
    """
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _through_pillow(
    steps: Callable[[Image.Image], Tensor | np.ndarray], image: np.ndarray
) -> Tensor:
    return torch.as_tensor(steps(Image.fromarray(image)))
