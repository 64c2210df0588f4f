"""A trained classifier on pictures: `engine_predict` and `main_predict.py`."""

import numpy as np
import pytest
import torch
from odd_images import noise
from skimage.data import lfw_subset

from engine_predict import Predictor
from models_saved import open_classifier

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["vit", "convnext"])
def predictor(request, finetune):
    return Predictor(open_classifier(finetune(request.param) / "checkpoint-best.pth"), CPU)


def faces(count=7):
    """Real ones, grey, of 25 × 25 pixels."""
    return [np.repeat(np.uint8(255 * x)[..., None], 3, axis=2) for x in lfw_subset()[:count]]


def test_a_face_is_predicted_alike_alone_and_among_others(predictor):
    images = [*faces(), noise(40, 70, 3)]
    together = predictor(images)
    for k, image in enumerate(images):
        alone = predictor([image])
        assert abs(alone.probabilities[0] - together.probabilities[k]).max() < 1e-5
        assert abs(alone.features[0] - together.features[k]).max() < 1e-5


def test_probabilities_are_those_of_the_model_on_its_features(predictor):
    p, features = predictor(faces())
    assert p.shape == (7, 7)
    assert p.dtype == features.dtype == np.float32
    assert p.sum(axis=1) == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        again = predictor._model.head(torch.from_numpy(features)).softmax(dim=-1)
    assert abs(again.numpy() - p).max() < 1e-6
    assert features.std(axis=0).max() > 0


def test_no_faces_have_no_predictions(predictor):
    p, features = predictor([])
    assert p.shape == (0, 7)
    assert features.shape == (0, predictor(faces(1)).features.shape[1])
