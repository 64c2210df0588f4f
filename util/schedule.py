"""Learning rate and resolution as pure functions of the progress of training."""

import math
from collections.abc import Sequence


def lr_at(epoch: float, peak: float, floor: float, warmup: float, epochs: float) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `floor` at the end.

    `epoch` and `warmup` are fractional epochs from the start, as in MAE (appendix A.1). A warm-up
    longer than the run is cut off at its end.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    progress = min(1.0, (epoch - warmup) / max(epochs - warmup, 1e-9))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def step_lr_at(
    epoch: float, peak: float, warmup: float, falls: Sequence[float], factor: float
) -> float:
    """Linear warm-up to `peak`, which is multiplied by `factor` at each of the epochs `falls`."""
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * factor ** sum(epoch >= fall for fall in falls)


def scaled_lr(base: float, global_batch: int) -> float:
    """The linear scaling rule: `base` is the rate for 256 images per step."""
    return base * global_batch / 256


def resolution_at(epoch: int, low: int, high: int, patch: int, epochs: int) -> int:
    """The side length in pixels of the images in `epoch`: from `low` in steps of `patch` to `high`.

    Progressive resizing; for masked autoencoders see DailyMAE (Wu et al. 2024). Each resolution
    below `high` gets an equal share of the first two thirds of the epochs. In the last third, the
    cosine schedule has brought the learning rate below a third of its peak, and the weights settle
    at the resolution for which they are made. All sizes are multiples of `patch`.
    """
    rising = 2 * epochs // 3
    if epoch >= rising:
        return high
    return low + patch * (epoch * ((high - low) // patch) // rising)
