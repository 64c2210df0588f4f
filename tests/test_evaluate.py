"""Predictions and features of test images, their metrics, and the choice of the best epoch."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from test_engine import two_ranks
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn

import training.evaluate
import training.probe
from backbones.convnextv2 import ConvNeXtSize
from backbones.vit import ViTSize
from datasets import PlainImages, build_test_loader, plain
from datasets.folder import ImageFiles, list_images
from datasets.labelled import LabelledImages
from datasets.transforms import Normalise
from engine_finetune import Evaluator
from engine_train import Position, TrainState
from models_convnextv2 import FCMAE, ConvNeXtV2
from models_mae import MaskedAutoencoderViT, ViTClassifier
from training.evaluate import collect, evaluate_model, probabilities
from training.precision import Precision
from training.probe import Features, Probe, knn, linear
from util.distributed import ProcessInfo
from util.errors import Fault

CLASSES = ("a", "b", "c")
COUNT, BAD = 23, (4, 17)
LABELS = np.random.default_rng(1).integers(0, 3, COUNT)
PIXELS = Normalise((0, 0, 0), (1 / 255, 1 / 255, 1 / 255))  # leaves bytes as they are
EXACT = Precision("off", torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    """Images with their number in red, green on the left, blue on the right; two are broken."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for k in range(COUNT):
        pixels = np.full((8, 8, 3), (k, 0, 0), np.uint8)
        pixels[:, :4, 1] = rng.integers(0, 256)
        pixels[:, 4:, 2] = rng.integers(0, 256)
        Image.fromarray(pixels).save(images / f"{k:02d}.png")
    for k in BAD:
        (images / f"{k:02d}.png").write_bytes(b"<html>not found</html>")
    return images


def labelled(folder):
    return LabelledImages(ImageFiles(list_images(folder)), LABELS)


def loader_of(images, process=ProcessInfo()):  # noqa: B008
    return build_test_loader(PlainImages(images.source, plain(8)), 3, process, workers=0)


def a_split(folder, process=ProcessInfo(), common=(0, 1, 2)):  # noqa: B008
    """The folder as a split, without images whose class is not among `common`."""
    images = labelled(folder)
    images = images.take(np.flatnonzero(np.isin(images.labels, common)))
    return training.evaluate.TestSet(images, loader_of(images, process), CLASSES, common)


class Stub(nn.Module):
    """Logits linear in the left and right halves' mean colour, not the same mirrored."""

    def __init__(self, n_classes=3):
        super().__init__()
        torch.manual_seed(2)
        self.head = nn.Linear(6, n_classes)

    def forward(self, x):
        halves = x.unflatten(-1, (2, -1)).mean(dim=(2, 4)).flatten(1)
        return self.head(halves / 100)

    def forward_features(self, x):
        return x.mean(dim=(2, 3))


def numbers(x):
    """(N, 3, H, W) -> (N, 1): each image's number, encoded in its red."""
    return x[:, 0, 0, 0].unsqueeze(1)


READABLE = ~np.isin(np.arange(COUNT), BAD)


def check_shared(folder, process):
    """On two ranks, every image is evaluated once, in order, with the results of one process."""
    with np.load(folder.parent / "alone.npz") as alone:
        seen = []
        loader = loader_of(labelled(folder), process)
        values, readable = collect(
            lambda x: seen.append(len(x)) or numbers(x), loader, PIXELS, EXACT
        )
        assert sum(seen) == len(range(process.rank, COUNT, 2)), "only its own share is computed"
        assert np.array_equal(readable, READABLE)
        assert values[readable].ravel().tolist() == np.flatnonzero(READABLE).tolist()
        evaluation = evaluate_model(Stub(), a_split(folder, process), PIXELS, EXACT, flip=True)
        np.testing.assert_array_equal(evaluation.probabilities, alone["p"])
        assert evaluation.result["accuracy"] == alone["accuracy"]
        assert evaluation.result["unreadable"] == len(BAD)
        train, _ = probe_of(folder, process).features(Stub(), EXACT)
        np.testing.assert_array_equal(train.x, alone["x"])


def probe_of(folder, process=ProcessInfo()):  # noqa: B008
    images = labelled(folder)
    return Probe(images, images, CLASSES, plain(8), PIXELS, process, workers=0)


def test_two_processes_evaluate_every_image_once_with_the_results_of_one(folder):
    evaluation = evaluate_model(Stub(), a_split(folder), PIXELS, EXACT, flip=True)
    train, _ = probe_of(folder).features(Stub(), EXACT)
    accuracy = evaluation.result["accuracy"]
    np.savez(folder.parent / "alone.npz", p=evaluation.probabilities, accuracy=accuracy, x=train.x)
    two_ranks(partial(check_shared, folder), folder.parent)


def test_the_callback_is_called_before_each_batch(folder):
    calls = []
    collect(numbers, loader_of(labelled(folder)), PIXELS, EXACT, lambda: calls.append(1))
    assert len(calls) == 8


def stub_answers(folder, flip=False, indices=None):
    """(n, 3): the stub's probabilities of readable images, one by one."""
    model, rows = Stub(), []
    for k in np.flatnonzero(READABLE) if indices is None else indices:
        pixels = torch.from_numpy(np.array(Image.open(folder / f"{k:02d}.png")))
        x = pixels.permute(2, 0, 1).float()[None]
        logits = [model(x), model(torch.flip(x, [3]))] if flip else [model(x)]
        rows.append(sum(torch.exp(y) / torch.exp(y).sum() for y in logits) / len(logits))
    return torch.cat(rows).detach().numpy()


@pytest.mark.parametrize("flip", [False, True])
def test_metrics_equal_scikit_learns_over_the_readable_images(folder, flip):
    model = Stub().train()
    evaluation = evaluate_model(model, a_split(folder), PIXELS, EXACT, flip)
    assert model.training
    p, truth = stub_answers(folder, flip), LABELS[READABLE]
    np.testing.assert_allclose(evaluation.probabilities[READABLE], p, rtol=1e-5)
    result, guess = evaluation.result, p.argmax(axis=1)
    assert (result["n"], result["unreadable"]) == (COUNT - len(BAD), len(BAD))
    assert result["accuracy"] == pytest.approx(100 * metrics.accuracy_score(truth, guess))
    assert result["uar"] == pytest.approx(100 * metrics.balanced_accuracy_score(truth, guess))
    f1 = metrics.f1_score(truth, guess, average="macro")
    assert result["macro_f1"] == pytest.approx(100 * f1)
    assert result["log_loss"] == pytest.approx(metrics.log_loss(truth, p), rel=1e-5)
    assert result["confusion_matrix"] == metrics.confusion_matrix(truth, guess).tolist()


def test_with_flipping_mirrored_images_have_equal_predictions():
    x = torch.rand(5, 3, 8, 8) * 255
    function = probabilities(Stub(), flip=True)
    torch.testing.assert_close(function(x), function(x.flip(-1)))
    assert not torch.allclose(function(x), probabilities(Stub(), flip=False)(x))


def test_classes_that_the_test_set_lacks_are_ignored(folder):
    evaluation = evaluate_model(Stub(), a_split(folder, common=(0, 2)), PIXELS, EXACT)
    own = np.flatnonzero(READABLE & (LABELS != 1))
    p = stub_answers(folder, indices=own)[:, [0, 2]]
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(evaluation.probabilities[evaluation.readable], p, rtol=1e-5)
    assert evaluation.result["classes"] == ["a", "c"]
    right = np.array([0, -1, 1])[LABELS[own]] == p.argmax(axis=1)
    assert evaluation.result["accuracy"] == pytest.approx(100 * right.mean())


def test_confidence_in_a_class_that_the_test_set_lacks_gives_a_finite_loss(folder):
    model = Stub()
    model.head.bias.data[1] = 1e4  # the others' probabilities are 0 in float32
    result = evaluate_model(model, a_split(folder, common=(0, 2)), PIXELS, EXACT).result
    assert result["log_loss"] == pytest.approx(np.log(2))


def test_non_finite_outputs_are_a_fault_and_not_unreadable_images(folder):
    model = Stub()
    model.head.weight.data[:] = float("nan")
    with pytest.raises(Fault, match="not finite for 21 of 21 images"):
        evaluate_model(model, a_split(folder), PIXELS, EXACT)


def test_half_precision_outputs_are_averaged_in_fp32(folder):
    half = Precision("bf16", torch.device("cpu"))
    rough = evaluate_model(Stub(), a_split(folder), PIXELS, half, flip=True).probabilities
    exact = evaluate_model(Stub(), a_split(folder), PIXELS, EXACT, flip=True).probabilities
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough.sum(axis=1), 1, rtol=1e-6)
    assert 0 < np.abs(rough - exact)[READABLE].max() < 0.03


# Which epoch is best


def a_state(ema=True):
    model = Stub()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = ModelEmaV3(model, 0.5) if ema else None
    return TrainState(model, optimizer, EXACT.scaler, ema=average)


def test_the_best_epoch_is_the_first_with_the_highest_accuracy():
    position = Position()
    for accuracy in (0.0, 50.0, 40.0, 50.0):
        position.note(accuracy)
        position.next_epoch()
    assert (position.best, position.best_epoch) == (50.0, 1)


@pytest.mark.parametrize("by_ema", [False, True])
def test_the_best_epoch_is_selected_by_the_given_split_and_weights(folder, by_ema):
    state = a_state()
    for p in state.ema.module.parameters():
        p.data.mul_(-1)
    images = labelled(folder)
    part = images.take(np.arange(9))
    splits = {
        "test": a_split(folder),
        "val": training.evaluate.TestSet(part, loader_of(part), CLASSES, (0, 1, 2)),
    }
    evaluator = Evaluator(splits, "val", by_ema, PIXELS, EXACT, flip=False)
    scores = evaluator.measure(state)
    endings = ["", "_ema"] if by_ema else [""]
    assert set(scores) == {
        f"{split}_{score}{ending}"
        for split in splits
        for score in ("loss", "acc1", "uar", "f1")
        for ending in endings
    }
    model = state.ema.module if by_ema else state.model
    chosen = evaluate_model(model, splits["val"], PIXELS, EXACT).result["accuracy"]
    assert state.position.best == chosen == scores[f"val_acc1{endings[-1]}"]
    assert len({scores[name] for name in scores if "_loss" in name}) == len(scores) // 4


def test_state_ema_and_best_epoch_are_restored_from_a_checkpoint(tmp_path):
    state, again = a_state(), a_state()
    for k in range(3):
        state.optimizer.zero_grad()
        state.model(torch.full((2, 3, 8, 8), 50.0 * k)).square().sum().backward()
        state.optimizer.step()
        state.ema.update(state.model)
    state.position.note(61.5)
    state.position.next_epoch()
    state.position.note(60.0)
    state.position.step, state.position.skipped_in_row = 7, 2
    torch.save(state.state_dict(), tmp_path / "c.pth")
    again.load_state_dict(torch.load(tmp_path / "c.pth", weights_only=True))
    assert again.position == state.position
    assert (again.position.best, again.position.best_epoch) == (61.5, 0)
    for ours, theirs in ((state.model, again.model), (state.ema.module, again.ema.module)):
        assert torch.equal(ours.head.weight, theirs.head.weight)
    assert not torch.equal(again.model.head.weight, again.ema.module.head.weight)


# Probes


def clusters(n, spread, seed, classes=(0, 1, 2), dim=5):
    """Points around a centre for each class."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n)
    centres = 3 * np.random.default_rng(9).standard_normal((3, dim))
    x = centres[labels] + spread * rng.standard_normal((n, dim))
    return Features(x.astype(np.float32), labels, np.ones(n, bool))


def knn_by_hand(train, queries, classes, k=20, temperature=0.07):
    p = np.zeros((len(queries), classes))
    for row, q in zip(p, queries, strict=True):
        similarity = [float(q @ x / np.linalg.norm(q) / np.linalg.norm(x)) for x in train.x]
        for i in sorted(range(len(train.x)), key=lambda i: -similarity[i])[:k]:
            row[train.labels[i]] += np.exp(similarity[i] / temperature)
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("n", [60, 11])
def test_neighbours_vote_by_their_similarity(n):
    train, test = clusters(n, 4.0, 0), clusters(30, 4.0, 1)
    np.testing.assert_allclose(
        knn(train, test.x, 3), knn_by_hand(train, test.x, 3), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("classify", [knn, linear])
def test_separable_features_are_classified_and_noise_is_not(classify):
    for spread, low, high in ((0.3, 0.98, 1.0), (1e4, 0.2, 0.5)):
        train, test = clusters(300, spread, 0), clusters(300, spread, 1)
        accuracy = np.mean(classify(train, test.x, 3).argmax(axis=1) == test.labels)
        assert low <= accuracy <= high


@pytest.mark.parametrize("classify", [knn, linear])
def test_absent_classes_are_never_predicted_and_unreadable_images_ignored(classify):
    train, test = clusters(60, 1.0, 0, classes=(0, 2)), clusters(30, 1.0, 1)
    p = classify(train, test.x, 3)
    assert p.shape == (30, 3)
    assert (p[:, 1] == 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1)
    junk = Features(
        np.concatenate([train.x, test.x]),
        np.concatenate([train.labels, np.ones(30, int)]),
        np.arange(90) < 60,
    )
    np.testing.assert_allclose(classify(junk, test.x, 3), p)


def test_a_probe_measures_a_frozen_model_and_restores_its_mode(folder):
    model = Stub().train()
    scores = probe_of(folder).measure(model, EXACT, lambda: None)
    names = {f"probe_{c}_{s}" for c in ("knn", "linear") for s in ("acc1", "uar")}
    assert set(scores) == {*names, "probe_unreadable"}
    assert scores["probe_unreadable"] == 2 * np.sum(~READABLE)  # in training and test images
    assert model.training
    train, test = probe_of(folder).features(model, EXACT)
    assert np.array_equal(train.readable, READABLE)
    guess = knn_by_hand(
        Features(train.x[READABLE], train.labels[READABLE], None), test.x[READABLE], 3
    ).argmax(axis=1)
    assert scores["probe_knn_acc1"] == pytest.approx(100 * np.mean(guess == LABELS[READABLE]))


def test_a_large_training_set_is_subsampled_class_by_class(folder, monkeypatch):
    monkeypatch.setattr(training.probe, "MOST_IMAGES", 12)
    train, test = probe_of(folder).sets
    assert train.counts(3).tolist() == [round(12 / COUNT * n) for n in np.bincount(LABELS)]
    assert len(test) == COUNT


# Features of pre-training models


def randomise(model):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def encoder_weights(model, classifier, prefix=""):
    """A classifier with a pre-training model's encoder."""
    state = {k.removeprefix(prefix): v for k, v in model.state_dict().items()}
    own = classifier.state_dict()
    classifier.load_state_dict({k: state.get(k, v) for k, v in own.items()})
    return classifier.eval()


@torch.no_grad()
def test_features_of_a_masked_autoencoder_are_its_classifiers_patch_tokens():
    size = ViTSize(48, 2, 3, 8)
    model = randomise(MaskedAutoencoderViT(size, 32, decoder_embed_dim=32, decoder_num_heads=2))
    classifier = encoder_weights(model, ViTClassifier(size, 3, 32, global_pool="token"))
    x = torch.rand(2, 3, 32, 32)
    tokens = VisionTransformer.forward_features(classifier, x)
    torch.testing.assert_close(model.forward_features(x), tokens[:, 1:].mean(dim=1))
    torch.testing.assert_close(classifier.forward_features(x), tokens[:, 0])


@torch.no_grad()
def test_features_of_an_fcmae_are_its_classifiers_before_the_last_norm():
    size = ConvNeXtSize((1, 1, 2, 1), (8, 16, 24, 32))
    model = randomise(FCMAE(size, 64, decoder_embed_dim=16))
    classifier = encoder_weights(model, ConvNeXtV2(size, 3), "encoder.")
    x = torch.rand(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 32)
    torch.testing.assert_close(classifier.norm(features), classifier.forward_features(x))
    whole = copy.deepcopy(classifier)
    whole.norm = nn.Identity()
    torch.testing.assert_close(features, whole.forward_features(x))
