"""From a decoded image to the model's input; random numbers come from a generator passed in."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Box = tuple[int, int, int, int]  # left, top, width, height


def random_crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """RandomResizedCrop's box (Szegedy et al. 2015): random share of the area, log-uniform ratio.

    `scale` bounds the share, `ratio` is width / height. If ten boxes do not fit, returns the
    largest central one with an allowed ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    draws = rng.random(22).tolist()  # in one call, as a call costs more than the numbers
    for u, v in zip(draws[:10], draws[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u)
        shape = math.exp(low + (high - low) * v)
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return int((width - w + 1) * draws[21]), int((height - h + 1) * draws[20]), w, h
    shape = min(max(width / height, ratio[0]), ratio[1])
    h = min(height, max(1, round(width / shape)))
    w = min(width, max(1, round(height * shape)))
    return (width - w) // 2, (height - h) // 2, w, h


def crop_and_resize(
    image: np.ndarray, box: Box, size: int, flip: bool = False, interpolation: str = "bicubic"
) -> Tensor:
    """(H, W, 3) uint8 -> (3, size, size) uint8: cropped, resized with antialiasing, maybe flipped.

    Channels are last in memory. Equals Pillow's resampling except for rounding. `interpolation` is
    bicubic or bilinear.
    """
    left, top, w, h = box
    # A copy, as torch is slow on views. It recognises channels-last by all strides, even that of a
    # batch of one.
    crop = np.array(image[None, top : top + h, left : left + w], order="C")
    x = torch.from_numpy(crop).permute(0, 3, 1, 2)
    x = F.interpolate(x, (size, size), mode=interpolation, antialias=True)[0]
    return x.flip(2) if flip else x


def centre_crop(
    image: np.ndarray, size: int, crop_pct: float, interpolation: str = "bicubic"
) -> Tensor:
    """(H, W, 3) uint8 -> (3, size, size) uint8: the central square of `crop_pct` of the short side.

    Amounts to resizing the short side to size / crop_pct and cropping, but resamples only once.
    """
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * crop_pct))
    box = ((width - side) // 2, (height - side) // 2, side, side)
    return crop_and_resize(image, box, size, interpolation=interpolation)


class Normalise(nn.Module):
    """uint8 (N, 3, H, W) -> float with mean 0 and standard deviation 1, on the images' device."""

    def __init__(
        self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        """`mean` and `std` of the three channels, for pixels in 0–1."""
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, imgs: Tensor) -> Tensor:
        """Pixels -> model input."""
        x = imgs.to(torch.float32, copy=True)
        return x.sub_(self.mean).div_(self.std)  # in place, because memory traffic takes the time

    def pixels(self, x: Tensor) -> Tensor:
        """Model input or output -> uint8 pixels, clipped."""
        return (x * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)
