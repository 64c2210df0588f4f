"""How many patches are masked and predicted, without torch: option parsing asks, too."""

from util.errors import BadInput


def kept_patches(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay visible; the epsilon keeps 100 patches at 0.8 from losing one."""
    keep = int(num_patches * (1 - mask_ratio) + 1e-6)
    if not 0 < keep < num_patches:
        raise BadInput(
            f"--mask_ratio {mask_ratio} keeps {keep} of {num_patches} patches; "
            "some must be kept and some removed"
        )
    return keep


def predicted_patches(masked: int, predict_ratio: float) -> int:
    """How many of the masked patches the decoder predicts, at least one; see `kept_patches`."""
    return max(1, int(masked * predict_ratio + 1e-6))
