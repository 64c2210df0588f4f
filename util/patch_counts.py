"""Numbers of masked and predicted patches; without torch, since option parsing needs them, too."""

from util.errors import BadInput


def visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Number of visible patches; without the epsilon, 100 at ratio 0.8 would give 19, not 20."""
    keep = int(num_patches * (1 - mask_ratio) + 1e-6)
    if not 0 < keep < num_patches:
        raise BadInput(
            f"--mask_ratio {mask_ratio} leaves {keep} of {num_patches} patches visible; "
            "at least one must be visible and one masked"
        )
    return keep


def predicted_patches(masked: int, predict_ratio: float) -> int:
    """Number of masked patches that the decoder predicts, at least one; see `visible_patches`."""
    return max(1, int(masked * predict_ratio + 1e-6))
