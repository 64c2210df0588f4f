"""An augmentation is declared in one place: a new one, from a single file, trains."""

import pytest
import torch

import main_finetune
from datasets import open_labelled, plain, synthetic_size
from engine_finetune import ClassifierLoss
from finetuned import config
from runs import SMALL_FINETUNE, run_here
from util.errors import BadInput
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
    seen, loss = [], ClassifierLoss.__call__

    def noting(self, model, batch):
        seen.append(batch[0])
        return loss(self, model, batch)

    monkeypatch.setattr(ClassifierLoss, "__call__", noting)
    options = f"{SMALL_FINETUNE} --model vit_tiny_patch16 --data_path synthetic:16:8 --aug grey"
    assert run_here(main_finetune, f"{options} --output_dir {tmp_path}".split()) == 0
    assert {k: config(tmp_path)["options"][k] for k in ("aug", "color_jitter", "reprob")} == {
        "aug": "grey",
        "color_jitter": 0.75,
        "reprob": 0.0,
    }
    plain_images = open_labelled("synthetic:16:8", size=synthetic_size(32)).splits["train"].source
    whole = torch.stack([plain(32)(plain_images.image(i)) for i in range(16)])
    contrast = [float(x.float().std(dim=(2, 3)).mean()) for x in (torch.cat(seen), whole)]
    assert contrast[0] == pytest.approx(0.25 * contrast[1], rel=0.05)


def test_others_are_refused():
    with pytest.raises(BadInput, match="--aug"):
        main_finetune.build_parser().parse(["--aug", "grey"])
