"""inference.examples: test images with their predictions, right and wrong, and attention maps."""

import numpy as np
import pytest
import torch
from torch import nn

import inference.examples
import training.evaluate
from benchmarks.timm_models import create, explained
from datasets import PlainImages, build_test_loader, plain
from datasets.decode import UnreadableImage
from datasets.labelled import LabelledImages
from datasets.transforms import Normalise
from inference.examples import EACH, example_figure
from inference.explanation import attention_map
from training.evaluate import judge
from util.distributed import ProcessInfo

CLASSES, COMMON = [f"class {k}" for k in range(10)], [1, 2, 3, 5, 8, 9]


class Shades:
    """Image i has the shade i everywhere; every seventh one cannot be read."""

    digest = ""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def image(self, i):
        if i % 7 == 6:
            raise UnreadableImage("no such file")
        return np.full((16, 16, 3), i, np.uint8)

    def name(self, i):
        return f"{i}.png"


def evaluated(right, count=120, seed=0):
    """A test set in random order of classes, and predictions of which the share `right` is."""
    rng = np.random.default_rng(seed)
    images = LabelledImages(Shades(count), rng.choice(COMMON, count))
    loader = build_test_loader(PlainImages(images.source, plain(16)), 8, ProcessInfo(), 0)
    p = rng.random((count, len(CLASSES)))
    p[np.arange(count), rng.choice(COMMON, count)] += 1
    sure = rng.permutation(count)[: round(right * count)]
    p[sure, images.labels[sure]] += 5
    readable = np.arange(count) % 7 != 6
    test = training.evaluate.TestSet(images, loader, CLASSES, COMMON)
    return judge(p / p.sum(1, keepdims=True), readable, test), test


@pytest.fixture
def shown(monkeypatch):
    """A function: evaluation, test set -> what the figure would show, image by image."""

    def show(evaluation, test, model=None):
        seen = {}

        def grid(images, overlays, verdicts, **more):
            seen.update(images=images, overlays=overlays, verdicts=verdicts, **more)
            return images[0]

        monkeypatch.setattr(inference.examples, "attention_grid", grid)
        example_figure(evaluation, test, Normalise(), model)
        return seen

    return show


def test_every_image_is_shown_with_its_own_class_prediction_and_probability(shown):
    evaluation, test = evaluated(0.5)
    seen = shown(evaluation, test)
    assert len(seen["images"]) == len(seen["verdicts"]) == 2 * EACH
    for image, verdict in zip(seen["images"], seen["verdicts"], strict=True):
        i = int(image[0, 0, 0])  # the image's shade
        assert (image == i).all()
        assert verdict.true == CLASSES[test.images.labels[i]]
        assert verdict.predicted == CLASSES[COMMON[evaluation.probabilities[i].argmax()]]
        assert verdict.probability == pytest.approx(evaluation.probabilities[i].max())
    assert len({image.tobytes() for image in seen["images"]}) == 2 * EACH


def test_right_predictions_come_before_wrong_ones_and_classes_take_turns(shown):
    seen = shown(*evaluated(0.5))
    kinds = [[v.true for v in part] for part in (seen["verdicts"][:EACH], seen["verdicts"][EACH:])]
    assert [v.true == v.predicted for v in seen["verdicts"]] == [True] * EACH + [False] * EACH
    assert kinds == [[CLASSES[k] for k in COMMON]] * 2
    assert shown(*evaluated(0.5))["verdicts"] == seen["verdicts"]


@pytest.mark.parametrize(("right", "expected"), [(1, "6 right and 0 wrong"), (0, "right and 6")])
def test_the_heading_has_the_numbers_of_all_images_and_of_those_shown(shown, right, expected):
    evaluation, test = evaluated(right)
    seen = shown(evaluation, test)
    assert expected in seen["note"]
    count = round(evaluation.result["accuracy"] * evaluation.result["n"] / 100)
    assert seen["title"] == f"{count:,} of {evaluation.result['n']:,} images classified correctly"


def test_the_map_explains_the_predicted_class_among_the_classes_of_the_model(shown, monkeypatch):
    evaluation, test = evaluated(0.5)
    asked = []

    def spy(model, x, target):
        asked.append(int(target))
        assert x.shape == (1, 3, 16, 16)
        return torch.zeros(1, 16, 16)

    monkeypatch.setattr(inference.examples, "attention_map", spy)
    model = nn.Identity()
    model.explained_by = "Grad-CAM"
    seen = shown(evaluation, test, model)
    assert [CLASSES[k] for k in asked] == [verdict.predicted for verdict in seen["verdicts"]]
    assert seen["overlays"].shape == seen["images"].shape
    assert "Grad-CAM: what speaks for the predicted class" in seen["note"]
    assert "Grad-CAM" not in shown(evaluation, test, nn.Identity())["note"]


def test_figures_with_and_without_maps_are_drawn():
    evaluation, test = evaluated(0.5)
    alone = example_figure(evaluation, test, Normalise(), None)
    model = explained(create("resnet18", 16, len(CLASSES)), 16)
    pairs = example_figure(evaluation, test, Normalise(), model)
    assert alone.dtype == pairs.dtype == np.uint8
    assert abs(alone.shape[1] - pairs.shape[1]) < 50  # twice as many in a row
    assert alone.shape[0] < 0.7 * pairs.shape[0]


def test_timm_classifiers_are_explained_by_the_gradient_of_their_own_logits():
    torch.manual_seed(0)
    model = create("resnet18", 64, 5).eval()
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([3, 1])
    cells = model.forward_features(x).detach().requires_grad_()
    logits = model.forward_head(cells)
    torch.testing.assert_close(logits, model(x))
    logits.gather(1, target[:, None]).sum().backward()
    heat = (cells.grad.mean(dim=(2, 3), keepdim=True) * cells).sum(dim=1).relu()
    heat = nn.functional.interpolate(heat[:, None], 64, mode="bilinear")[:, 0]
    expected = heat / heat.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(attention_map(explained(model, 64), x, target), expected)
    assert explained(create("vit_tiny_patch16_224", 64, 5), 64) is None
