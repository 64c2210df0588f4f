"""An augmentation is declared in one place: a new one, from a single file, trains."""

import pytest
import torch

import main_finetune
from datasets import plain
from engine_finetune import ClassifierLoss
from finetuned import config
from runs import SMALL_FINETUNE, run_here
from util.options.augmentations import AUGMENTATIONS, Augmentation

GREY = Augmentation(
    "test_new_augmentation:grey",
    {"size": "input_size", "strength": "color_jitter"},
    defaults={"color_jitter": 0.75, "reprob": 0.0},
)


def grey(size, strength):
    """As bright as the image on average, so far as `strength` goes."""
    view = plain(size)

    def augment(image):
        x = view(image).float()
        return (x + strength * (x.mean(dim=(1, 2), keepdim=True) - x)).byte()

    return augment


def test_it_is_an_option_with_defaults_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "grey", GREY)
    seen = []
    loss = ClassifierLoss.__call__
    monkeypatch.setattr(
        ClassifierLoss,
        "__call__",
        lambda self, model, batch: seen.append(batch[0]) or loss(self, model, batch),
    )
    options = f"{SMALL_FINETUNE} --model vit_tiny_patch16 --data_path synthetic:16:8 --aug grey"
    assert run_here(main_finetune, f"{options} --output_dir {tmp_path}".split()) == 0
    assert {k: config(tmp_path)["options"][k] for k in ("aug", "color_jitter", "reprob")} == {
        "aug": "grey",
        "color_jitter": 0.75,
        "reprob": 0.0,
    }
    pixels = torch.cat(seen).float()
    assert pixels.std(dim=(2, 3)).mean() < 30  # synthetic faces have about 60


def test_others_are_refused():
    from util.errors import BadInput

    with pytest.raises(BadInput, match="--aug"):
        main_finetune.build_parser().parse(["--aug", "grey"])
