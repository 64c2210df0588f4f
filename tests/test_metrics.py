"""util.metrics: metrics against scikit-learn, intervals against slow, obvious references."""

import csv
import json
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from util.errors import Fault
from util.metrics import classification_metrics, summary_lines
from util.predictions import write_predictions

NAMES = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt")


def softmax(logits):
    shares = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
    return shares / shares.sum(axis=1, keepdims=True)


def random_case(seed, n=400, k=7, skill=2.0):
    """Labels of imbalanced classes, and probabilities that predict them with `skill`."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=rng.dirichlet(np.full(k, 2.0)))
    return softmax(rng.normal(size=(n, k)) + skill * np.eye(k)[labels]), labels


def certain(predictions, k):
    """Probabilities 1 for the predicted classes."""
    return np.eye(k)[predictions]


CASES = {
    "random": random_case(0),
    "two classes": random_case(1, k=2),
    "twenty classes": random_case(2, k=20),
    "worse than chance": random_case(3, skill=-1.0),
    "one image": random_case(4, n=1),
    "one class predicted": (certain(np.zeros(30, int), 3), np.arange(30) % 3),
    "one class present": (random_case(5, k=3)[0], np.full(400, 2)),
    "predicted but absent": (certain([0, 1, 2, 2], 4), np.array([0, 1, 1, 1])),
    "certain and right": (certain([0, 1, 2], 3), np.array([0, 1, 2])),
    "certain and wrong": (certain([1, 2, 0], 3), np.array([0, 1, 2])),
}


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("case", CASES)
def test_metrics_equal_scikit_learns(case):
    probabilities, labels = CASES[case]
    k, predicted = probabilities.shape[1], probabilities.argmax(axis=1)
    result = classification_metrics(probabilities, labels, [str(i) for i in range(k)])
    shares = probabilities.astype(float) / probabilities.astype(float).sum(axis=1, keepdims=True)
    assert result["accuracy"] == pytest.approx(100 * sk.accuracy_score(labels, predicted))
    assert result["uar"] == pytest.approx(100 * sk.balanced_accuracy_score(labels, predicted))
    assert result["macro_f1"] == pytest.approx(
        100 * sk.f1_score(labels, predicted, average="macro", zero_division=0)
    )
    assert result["log_loss"] == pytest.approx(sk.log_loss(labels, shares, labels=range(k)))
    matrix = sk.confusion_matrix(labels, predicted, labels=range(k))
    assert result["confusion_matrix"] == matrix.tolist()
    assert list(result["support"].values()) == np.bincount(labels, minlength=k).tolist()


@pytest.mark.parametrize("case", CASES)
def test_results_can_be_saved_as_json_and_summarised_without_warnings(case):
    probabilities, labels = CASES[case]
    names = [f"class {i}" for i in range(probabilities.shape[1])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = classification_metrics(probabilities, labels, names)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert len(summary_lines(result)) in (2 + len(names), 4 + 2 * len(names))


def test_metrics_of_absent_classes_are_none_and_left_out_of_means():
    # Class 0: right once and never predicted wrongly; 1: never predicted; 2: absent but predicted;
    # 3: neither present nor predicted.
    result = classification_metrics(certain([0, 2], 4), np.array([0, 1]), list("abcd"))
    assert result["recall"] == {"a": 100, "b": 0, "c": None, "d": None}
    assert result["precision"] == {"a": 100, "b": None, "c": 0, "d": None}
    assert result["f1"] == {"a": 100, "b": 0, "c": 0, "d": None}
    assert result["support"] == {"a": 1, "b": 1, "c": 0, "d": 0}
    assert result["uar"] == 50
    assert result["macro_f1"] == pytest.approx(100 / 3)


def slow_bootstrap(labels, predicted, rounds=3000):
    """Percentiles of accuracy and UAR over images sampled one by one with replacement."""
    rng, values = np.random.default_rng(9), []
    for _ in range(rounds):
        drawn = rng.integers(0, len(labels), len(labels))
        truth, right = labels[drawn], (predicted == labels)[drawn]
        recalls = [right[truth == c].mean() for c in np.unique(truth)]
        values.append((right.mean(), np.mean(recalls)))
    return 100 * np.percentile(values, (2.5, 97.5), axis=0).T


@pytest.mark.parametrize(("seed", "k", "n"), [(0, 7, 300), (1, 2, 500), (2, 8, 60)])
def test_intervals_equal_those_of_resampling_images(seed, k, n):
    probabilities, labels = random_case(seed, n, k, skill=1.5)
    result = classification_metrics(probabilities, labels, NAMES[:k])
    expected = slow_bootstrap(labels, probabilities.argmax(axis=1))
    for key, (low, high) in zip(("accuracy_ci", "uar_ci"), expected, strict=True):
        # Both are random estimates: their ends vary by a few hundredths of the width.
        np.testing.assert_allclose(result[key], (low, high), atol=0.08 * (high - low))


def test_accuracy_interval_has_the_width_of_the_binomial():
    probabilities, labels = random_case(6, n=3000)
    result = classification_metrics(probabilities, labels, NAMES[:7])
    p = result["accuracy"] / 100
    low, high = result["accuracy_ci"]
    assert high - low == pytest.approx(2 * 196 * np.sqrt(p * (1 - p) / 3000), rel=0.1)
    assert low < result["accuracy"] < high


def test_intervals_depend_on_the_seed_alone():
    case = (*random_case(7), NAMES[:7])
    np.random.seed(0)
    first = classification_metrics(*case)
    np.random.seed(1)
    assert classification_metrics(*case) == first
    other = classification_metrics(*case, seed=1)
    assert other["uar_ci"] != first["uar_ci"]
    assert other["uar"] == first["uar"]


def slow_calibration_error(probabilities, labels):
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    total = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            accuracy = (predicted == labels)[inside].mean()
            total += inside.mean() * abs(accuracy - confidence[inside].mean())
    return total


@pytest.mark.parametrize("case", CASES)
def test_calibration_error_equals_its_definition(case):
    probabilities, labels = CASES[case]
    result = classification_metrics(
        probabilities, labels, [str(i) for i in range(probabilities.shape[1])]
    )
    expected = 100 * slow_calibration_error(probabilities.astype(float), labels)
    assert result["ece"] == pytest.approx(expected)


def test_non_finite_probabilities_are_refused():
    probabilities, labels = random_case(8, n=5, k=3)
    probabilities[3, 1] = np.nan
    with pytest.raises(Fault, match="1 of 5 images"):
        classification_metrics(probabilities, labels, NAMES[:3])


@pytest.mark.parametrize(
    ("rows", "labels", "k"),
    [(0, [], 3), (2, [0, 1, 2], 3), (3, [0, 1, 3], 3), (3, [0, -100, 1], 3), (3, [0, 1, 2], 4)],
)
def test_arrays_that_do_not_fit_are_refused(rows, labels, k):
    with pytest.raises(ValueError, match=r"for .*classes"):
        classification_metrics(np.full((rows, 3), 1 / 3), np.array(labels, int), NAMES[:k])


def test_summary_has_the_numbers_that_papers_print():
    labels = np.repeat([0, 1, 2], (1000, 500, 2))
    predictions = np.concatenate([np.zeros(900, int), np.ones(600, int), [0, 0]])
    lines = summary_lines(
        classification_metrics(certain(predictions, 3), labels, ["Happy", "Sad", "Fear"])
    )
    for text in ("accuracy 93.21 % (", "UAR 63.33 % (", "macro-F1 61.85 %", "1,502 images", "95 %"):
        assert text in lines[0]
    assert [line.split() for line in lines[1:5]] == [
        ["class", "recall", "precision", "n"],
        ["Happy", "90.00", "99.78", "1,000"],
        ["Sad", "100.00", "83.33", "500"],
        ["Fear", "0.00", "–", "2"],
    ]
    assert [line.split() for line in lines[6:]] == [
        ["Happy", "Sad", "Fear"],
        ["Happy", "900", "100", "0"],
        ["Sad", "0", "500", "0"],
        ["Fear", "2", "0", "0"],
    ]
    for table in (lines[1:5], lines[6:]):
        assert len({len(line) for line in table}) == 1


def test_summary_shows_no_control_characters_of_a_class_name():
    lines = summary_lines(
        classification_metrics(certain([0, 1], 2), np.array([0, 1]), ["a\x1b[31m\n", "\udce9"])
    )
    assert all(line.isprintable() for line in lines)


def test_predictions_contain_every_image_with_any_name(tmp_path):
    probabilities, labels = random_case(9, n=4, k=3)
    names = ["a\rb.jpg", 'with "quotes", commas.jpg', "line\nbreak.jpg", "caf\udce9 é.jpg"]
    path, classes = tmp_path / "predictions.csv", ["Happy", "Sad, or so", "Fear"]
    write_predictions(path, names, labels, probabilities, classes)
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "label", "prediction", "p_Happy", "p_Sad, or so", "p_Fear"]
    assert [row[0] for row in rows] == names
    assert [row[1] for row in rows] == [classes[i] for i in labels]
    assert [row[2] for row in rows] == [classes[i] for i in probabilities.argmax(axis=1)]
    np.testing.assert_allclose(np.array([row[3:] for row in rows], float), probabilities, atol=6e-7)
    assert all(len(value) == 8 for row in rows for value in row[3:])


def test_a_failed_write_keeps_the_old_predictions(tmp_path):
    probabilities, labels = random_case(9, n=4, k=3)
    path = tmp_path / "predictions.csv"
    path.write_text("old")
    with pytest.raises(ValueError, match="zip"):
        write_predictions(path, ["too few"], labels, probabilities, NAMES[:3])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.csv"]


def test_images_are_counted_in_integers_even_if_none_is_right():
    p = np.array([[0.1, 0.9, 0], [0.8, 0.2, 0], [0.3, 0.7, 0]])
    result = json.loads(json.dumps(classification_metrics(p, np.array([0, 1, 2]), ["a", "b", "c"])))
    assert result["accuracy"] == 0
    assert result["support"] == {"a": 1, "b": 1, "c": 1}
    assert all(type(count) is int for count in result["support"].values())
