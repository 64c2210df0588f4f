"""The values of `--aug`, without torch: how each is built, and the defaults that go with it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

NONE: Mapping[str, object] = MappingProxyType({})


class Augmentation(NamedTuple):
    """One augmentation of training images."""

    build: str  # "module:function", which returns a datasets.Augment
    options: Mapping[str, str]  # the function's arguments, and the options that they come from
    defaults: Mapping[str, object] = NONE  # of other options
    crops: bool = False  # whether it crops, so that testing takes the centre, too
    any_interpolation: bool = False  # whether --train_interpolation may be "random"
    jitters_hue: bool = False  # whether --color_jitter is for the hue as well, so 0.5 at most
    erasing: Mapping[str, object] = NONE  # limits of random erasing, see timm's RandomErasing


AUGMENTATIONS = {
    # The original MAE-SFER's `main_rafdb.py`: docs/published.md. Its erasing is torchvision's, with
    # the limits of the paper, where timm's are 1/3 and 10/3.
    "fer": Augmentation(
        "datasets.augment:face_augment",
        {
            "size": "input_size",
            "color_jitter": "color_jitter",
            "interpolation": "train_interpolation",
        },
        defaults={
            "color_jitter": 0.25,
            "train_interpolation": "bilinear",
            "test_interpolation": "bilinear",
            "reprob": 0.5,
            "remode": "const",
        },
        jitters_hue=True,
        erasing={"max_area": 0.25, "max_aspect": 3.3},
    ),
    "randaug": Augmentation(
        "datasets.augment:random_augment",
        {
            "size": "input_size",
            "policy": "aa",
            "color_jitter": "color_jitter",
            "interpolation": "train_interpolation",
            "smallest_crop": "crop_scale",
        },
        crops=True,
        any_interpolation=True,
    ),
    "none": Augmentation(
        "datasets.augment:plain",
        {
            "size": "input_size",
            "crop_pct": "crop_pct",
            "interpolation": "train_interpolation",
        },
    ),
}
