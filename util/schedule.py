"""The learning rate as a pure function of how far training is."""

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
    """The linear scaling rule: `base` is the rate for 256 images a step."""
    return base * global_batch / 256
