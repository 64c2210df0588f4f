"""util.class_order: wrong orders are found, right ones never doubted, and options are correct."""

import itertools
import shlex

import numpy as np
import pytest

from datasets.labels import ORDERS
from util import class_order
from util.class_order import (
    best_order,
    better_order,
    option_text,
    placed_by_elimination,
    scores,
    word_order,
)
from util.metrics import classification_metrics
from util.options.parser import Parser, class_names

AFFECTNET, RAFDB, FERPLUS = ORDERS["affectnet"], ORDERS["rafdb"], ORDERS["ferplus"]
RAFDB_SIZES = (329, 74, 160, 1185, 478, 162, 680)

# Like published ones: the owners' order, the images of each class, % of them by prediction.
PUBLISHED = {
    "RAF-DB": (
        RAFDB,
        RAFDB_SIZES,
        [
            [86, 2, 1, 3, 1, 1, 6],
            [18, 55, 3, 3, 11, 5, 5],
            [2, 1, 54, 7, 12, 8, 16],
            [1, 0, 1, 94, 1, 0, 3],
            [0, 1, 3, 2, 84, 1, 9],
            [2, 2, 9, 4, 3, 77, 3],
            [3, 0, 2, 4, 6, 0, 85],
        ],
    ),
    "RAF-DB, from scratch": (
        RAFDB,
        RAFDB_SIZES,
        [
            [68, 3, 2, 9, 4, 3, 11],
            [30, 24, 3, 8, 19, 8, 8],
            [5, 1, 21, 15, 21, 12, 25],
            [2, 0, 1, 86, 3, 1, 7],
            [3, 1, 4, 9, 60, 3, 20],
            [5, 2, 15, 12, 9, 46, 11],
            [6, 0, 3, 11, 16, 1, 63],
        ],
    ),
    "AffectNet, 7 classes": (
        AFFECTNET[:7],
        (500,) * 7,
        [
            [62, 5, 10, 7, 2, 4, 10],
            [5, 87, 1, 4, 0, 2, 1],
            [12, 2, 64, 3, 6, 6, 7],
            [10, 7, 3, 60, 15, 2, 3],
            [4, 1, 6, 22, 60, 4, 3],
            [6, 4, 8, 3, 5, 60, 14],
            [13, 1, 6, 3, 4, 13, 60],
        ],
    ),
    "AffectNet, 8 classes": (
        AFFECTNET,
        (500,) * 7 + (499,),
        [
            [52, 4, 9, 7, 2, 3, 9, 14],
            [4, 78, 1, 4, 0, 1, 1, 11],
            [11, 1, 62, 3, 6, 6, 7, 4],
            [9, 6, 3, 58, 16, 2, 4, 2],
            [3, 1, 6, 20, 62, 4, 3, 1],
            [5, 3, 9, 3, 5, 56, 15, 4],
            [11, 1, 6, 3, 4, 12, 57, 6],
            [19, 14, 3, 2, 0, 4, 7, 51],
        ],
    ),
    "FERPlus": (
        FERPLUS,
        (1274, 928, 449, 446, 325, 22, 98, 30),
        [
            [91, 2, 2, 4, 1, 0, 0, 0],
            [3, 95, 1, 0, 1, 0, 0, 0],
            [4, 2, 91, 0, 1, 0, 2, 0],
            [20, 1, 1, 73, 3, 0, 2, 0],
            [6, 2, 2, 3, 86, 1, 0, 0],
            [9, 5, 5, 5, 31, 45, 0, 0],
            [6, 2, 31, 11, 4, 0, 46, 0],
            [57, 7, 0, 7, 16, 0, 0, 13],
        ],
    ),
}
# A right order, too, but with data far from the model's training data: 43 % are right.
OTHER_DATA = [
    [78, 6, 8, 4, 0, 1, 3],
    [10, 84, 2, 2, 0, 1, 1],
    [41, 6, 43, 3, 1, 3, 3],
    [38, 14, 5, 36, 4, 1, 2],
    [24, 7, 17, 30, 13, 3, 6],
    [34, 14, 15, 3, 1, 24, 9],
    [46, 4, 11, 5, 2, 9, 23],
]


def published(name):
    """-> classes, sizes (K,), probabilities (K, K)."""
    classes, sizes, percent = PUBLISHED[name]
    return classes, np.array(sizes), np.array(percent) / 100


def counts(sizes, p):
    return np.rint(np.array(sizes)[:, None] * np.array(p)).astype(int)


def even_sizes(k, n):
    return np.bincount(np.arange(n) % k)


def rafdb_sizes(k, n):
    """`n` images distributed like RAF-DB's; an eighth class is as rare as Fear."""
    return np.rint(n * np.array((*RAFDB_SIZES, 74)[:k]) / sum(RAFDB_SIZES)).astype(int)


def spread(k, accuracy):
    """(K, K) probabilities whose errors are spread evenly over the other classes."""
    return np.where(np.eye(k, dtype=bool), accuracy, (1 - accuracy) / (k - 1))


def confused(name, accuracy):
    """Probabilities of a published matrix, moved to an accuracy.

    For a higher accuracy they are moved towards certainty, for a lower one towards outputs that do
    not depend on the image.
    """
    _, sizes, p = published(name)
    share = sizes / sizes.sum()
    far = np.eye(len(p)) if accuracy > share @ p.diagonal() else np.tile(share @ p, (len(p), 1))
    near, end = share @ p.diagonal(), share @ far.diagonal()
    return p + (far - p) * (accuracy - near) / (end - near)


def drawn(rng, sizes, p):
    return np.stack([rng.multinomial(n, row) for n, row in zip(sizes, p, strict=True)])


def reordered(matrix, order):
    """The matrix of the same model with the output of class t at place order[t]."""
    moved = np.empty_like(matrix)
    moved[:, order] = matrix
    return moved


def shuffle(rng, k):
    while True:
        order = rng.permutation(k)
        if (order != np.arange(k)).any():
            return order.tolist()


def swap(k, a, b):
    order = list(range(k))
    order[a], order[b] = b, a
    return order


def named_order(right, named):
    """The order if outputs for the classes `right` are called `named`, one after the other."""
    return [right.index(name) for name in named]


# The best order


def test_the_best_order_is_the_best_of_all_permutations():
    rng, every = np.random.default_rng(0), list(itertools.permutations(range(5)))
    for _ in range(100):
        matrix = rng.integers(0, rng.integers(2, 30), (5, 5))
        fits = [(sum(matrix[range(5), o]), sum(i == k for i, k in enumerate(o))) for o in every]
        best = best_order(matrix)
        assert (matrix[range(5), best].sum(), (best == np.arange(5)).sum()) == max(fits)


# Right orders


@pytest.mark.parametrize("k", [7, 8])
def test_right_orders_are_never_doubted(k):
    rng = np.random.default_rng(k)
    names = [name for name in PUBLISHED if len(PUBLISHED[name][0]) == k]
    for _ in range(1000):
        accuracy, n = rng.uniform(0.4, 0.95), rng.choice([15, 40, 100, 300, 1000, 3000])
        p = spread(k, accuracy) if rng.random() < 0.5 else confused(rng.choice(names), accuracy)
        sizes = (even_sizes if rng.random() < 0.5 else rafdb_sizes)(k, n)
        assert better_order(drawn(rng, sizes, p)) is None


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("n", [None, 15, 100, 300, 1000])
def test_matrices_like_published_ones_are_never_doubted(name, n):
    _, sizes, p = published(name)
    assert better_order(counts(sizes, p)) is None
    rng = np.random.default_rng(0)
    if n:
        sizes = rng.multinomial(n, sizes / sizes.sum())
    assert all(better_order(drawn(rng, sizes, p)) is None for _ in range(20))


def test_data_unlike_the_training_data_does_not_raise_doubt():
    rng = np.random.default_rng(1)
    for n in (100, 700, 3500, 100_000):
        sizes = even_sizes(7, n)
        assert better_order(counts(sizes, np.array(OTHER_DATA) / 100)) is None
        for _ in range(20):
            assert better_order(drawn(rng, sizes, np.array(OTHER_DATA) / 100)) is None


@pytest.mark.parametrize("sizes", [even_sizes, rafdb_sizes])
def test_the_order_of_guessing_models_is_not_doubted(sizes):
    rng = np.random.default_rng(2)
    for n, concentration in itertools.product([15, 100, 300, 3000], [0.05, 0.3, 1, 1000]):
        for _ in range(30):
            p = np.tile(rng.dirichlet([concentration] * 7), (7, 1))
            assert better_order(drawn(rng, sizes(7, n), p)) is None


@pytest.mark.parametrize("live", [1, 2, 3])
def test_the_order_of_collapsed_models_is_not_doubted(live):
    """Collapsed models use few outputs, and the others never or hardly ever."""
    rng = np.random.default_rng(live)
    for sizes, rest in itertools.product([even_sizes, rafdb_sizes], [1e-6, 1e-4, 0.01]):
        for _ in range(50):
            p = confused("RAF-DB, from scratch", rng.uniform(0.5, 0.9)) + 1e-9
            p[:, rng.permutation(7)[live:]] *= rest
            p /= p.sum(axis=1, keepdims=True)
            assert better_order(drawn(rng, sizes(7, rng.choice([100, 300, 3000])), p)) is None


def test_classes_without_images_do_not_raise_doubt():
    rng = np.random.default_rng(3)
    for absent in range(1, 8):
        for _ in range(20):
            sizes = rafdb_sizes(7, rng.choice([100, 300, 3000]))
            sizes[rng.permutation(7)[:absent]] = 0
            assert better_order(drawn(rng, sizes, confused("RAF-DB", 0.6))) is None


def test_the_order_of_tiny_matrices_is_not_doubted():
    rng = np.random.default_rng(4)
    for n in range(15):
        for p in (spread(7, 0.4), spread(7, 1 / 7)):
            for _ in range(10):
                assert better_order(drawn(rng, rng.multinomial(n, [1 / 7] * 7), p)) is None
    assert better_order([[3]]) is None
    assert better_order([[0, 0], [0, 0]]) is None
    assert better_order([[0, 2], [2, 0]]) is None


# For each condition of a cycle, a matrix whose order is not doubted only because of it


def rafdb_but(rows):
    """RAF-DB's matrix with rows changed, {class: {prediction: %}}."""
    _, sizes, p = published("RAF-DB")
    for name, row in rows.items():
        p[RAFDB.index(name)] = [row.get(other, 0) / 100 for other in RAFDB]
    return counts(sizes, p)


def few_images():
    """The first two classes have twelve images."""
    matrix = np.diag([20] * 7)
    matrix[:2, :2] = [[1, 6], [5, 0]]
    return matrix


def weak_classes():
    return rafdb_but(
        {
            "Disgust": {"Disgust": 12, "Anger": 34, "Sad": 30, "Neutral": 24},
            "Anger": {"Anger": 15, "Disgust": 33, "Sad": 12, "Neutral": 40},
        }
    )


def collapsed():
    """Nearly all images are called Fear, and some of Fear are called Happy."""
    others = {name: {"Fear": 80, name: 20} for name in RAFDB if name not in ("Fear", "Happy")}
    return rafdb_but(
        {**others, "Happy": {"Fear": 90, "Happy": 10}, "Fear": {"Fear": 50, "Happy": 40, "Sad": 10}}
    )


def small_class():
    """Neutral is mostly called Contempt; five images do not show what Contempt is called."""
    matrix = np.diag([15, 60, 60, 60, 60, 60, 60, 3])
    matrix[0, 7], matrix[7, 0] = 60, 2
    return matrix


@pytest.mark.parametrize(
    ("constant", "unlimited", "matrix"),
    [
        ("LEVEL", 1, few_images),
        ("RECALL", 0, weak_classes),
        ("CHANCE", 0, collapsed),
        ("ODDS", 0, small_class),
    ],
)
def test_every_condition_is_needed_so_as_not_to_doubt_a_right_order(
    constant, unlimited, matrix, monkeypatch
):
    assert better_order(matrix()) is None
    monkeypatch.setattr(class_order, constant, unlimited)
    assert better_order(matrix()) is not None


def test_one_large_class_alone_does_not_make_an_order_wrong():
    """Neutral is called Contempt, and images of Contempt get neither name."""
    matrix = np.diag([0, 60, 60, 60, 60, 60, 60, 0])
    matrix[0, 7], matrix[7, 1] = 1000, 8
    cycle = class_order._cycle(matrix, [0, 7], np.array([7, 0]))
    assert better_order(matrix) is None
    assert cycle._replace(speaking=2).is_certain()


# Wrong orders


@pytest.mark.parametrize("sizes", [even_sizes, rafdb_sizes])
@pytest.mark.parametrize("k", [7, 8])
def test_shuffled_orders_are_found_exactly(k, sizes):
    rng, found, total = np.random.default_rng(k), 0, 300
    for _ in range(total):
        order, p = shuffle(rng, k), spread(k, rng.uniform(0.6, 0.95))
        found += better_order(reordered(drawn(rng, sizes(k, 300), p), order)) == order
    assert found >= 0.99 * total


@pytest.mark.parametrize("name", ["AffectNet, 7 classes", "AffectNet, 8 classes"])
def test_shuffled_orders_of_confused_classes_are_found_exactly(name):
    rng, found, total = np.random.default_rng(5), 0, 300
    classes, _, _ = published(name)
    for _ in range(total):
        order, p = shuffle(rng, len(classes)), confused(name, rng.uniform(0.6, 0.95))
        matrix = drawn(rng, even_sizes(len(classes), 300), p)
        found += better_order(reordered(matrix, order)) == order
    assert found >= 0.99 * total


@pytest.mark.parametrize("k", [7, 8])
def test_two_swapped_classes_are_found_in_300_images(k):
    rng, found, total = np.random.default_rng(k), 0, 300
    for _ in range(total):
        order, p = swap(k, *rng.permutation(k)[:2]), spread(k, rng.uniform(0.6, 0.95))
        found += better_order(reordered(drawn(rng, even_sizes(k, 300), p), order)) == order
    assert found >= 0.99 * total


# Pairs whose swap is not noticed, as the model recognises one or both too rarely.
UNCLEAR = {
    "RAF-DB, from scratch": [("Fear", "Disgust"), ("Fear", "Anger"), ("Disgust", "Anger")],
    "FERPlus": [("Neutral", "Contempt"), ("Disgust", "Contempt"), ("Fear", "Contempt")],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_swap_and_rotation_of_a_whole_test_set_is_found(name):
    classes, sizes, p = published(name)
    k, overlooked = len(p), []
    for a, b in itertools.combinations(range(k), 2):
        found = better_order(reordered(counts(sizes, p), swap(k, a, b)))
        if found is None:
            overlooked.append((classes[a], classes[b]))
        else:
            assert found == swap(k, a, b)
    for places in range(1, k):
        order = np.roll(range(k), places).tolist()
        assert better_order(reordered(counts(sizes, p), order)) == order
    assert overlooked == UNCLEAR.get(name, [])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_known_order_is_distinguished_from_every_other(name):
    classes, sizes, p = published(name)
    known = {tuple(o) for o in (*ORDERS.values(), sorted(AFFECTNET), sorted(RAFDB), AFFECTNET[:7])}
    others = [named for named in known if set(named) == set(classes) and named != classes]
    assert len(others) >= 2
    for named in others:
        order = named_order(classes, named)
        assert better_order(reordered(counts(sizes, p), order)) == order


def test_an_order_of_many_classes_is_found():
    matrix, order = np.diag([20] * 300), shuffle(np.random.default_rng(6), 300)
    assert better_order(matrix) is None
    assert better_order(reordered(matrix, order)) == order


def test_classes_that_are_too_rare_keep_their_outputs():
    matrix = np.diag([50, 50, 50, 2, 2])
    matrix[3:, 3:] = [[1, 1], [1, 1]]
    order = [1, 2, 0, 3, 4]
    assert better_order(reordered(matrix, order)) == order


def test_rare_classes_are_moved_once_the_order_is_known_to_be_wrong():
    matrix, both = np.diag([50, 50, 50, 4, 4]), [1, 2, 0, 4, 3]
    assert better_order(reordered(matrix, [0, 1, 2, 4, 3])) is None
    assert better_order(reordered(matrix, both)) == both


def test_a_class_that_the_data_lacks_gets_the_remaining_output():
    _, sizes, p = published("AffectNet, 8 classes")
    matrix = counts((*sizes[:7], 0), p)
    order = named_order(AFFECTNET, tuple(sorted(AFFECTNET)))
    moved = reordered(matrix, order)
    assert better_order(matrix) is None
    assert better_order(moved) == order
    assert placed_by_elimination(moved.tolist(), order) == [7]
    assert placed_by_elimination(matrix.tolist(), list(range(8))) == []


# Scores and options


def test_scores_equal_the_metrics():
    _, sizes, p = published("FERPlus")
    matrix = counts((*sizes[:7], 0), p)
    order = shuffle(np.random.default_rng(7), 8)
    moved = reordered(matrix, order)
    for present, given in ((moved, None), (matrix, order)):
        labels, predictions = (
            np.repeat(axis.ravel(), present.ravel()) for axis in np.indices((8, 8))
        )
        result = classification_metrics(np.eye(8)[predictions], labels, FERPLUS)
        assert scores(moved.tolist(), given) == pytest.approx((result["accuracy"], result["uar"]))


def test_outputs_get_new_names_and_labels_the_reverse():
    # In a head (a, b, c, d, e), a is really c, c is d and d is a; the data has no b and no e.
    said = word_order("abcde", order=[2, 0, 1], common=[0, 2, 3])
    assert said.classes == "--classes=c,b,d,a,e"
    assert said.shows == {"a": "d", "c": "a", "d": "c"}


def test_renamed_outputs_are_right():
    rng = np.random.default_rng(8)
    classes, sizes, p = published("AffectNet, 8 classes")
    order = shuffle(rng, 8)
    moved = reordered(counts(sizes, p), order)
    renamed = word_order(classes, better_order(moved)).classes.removeprefix("--classes=").split(",")
    columns = [renamed.index(name) for name in classes]
    assert (moved[:, columns] == counts(sizes, p)).all()
    shows = word_order(classes, better_order(moved)).shows
    rows = [classes.index(next(name for name in classes if shows[name] == c)) for c in classes]
    assert (moved[rows].argmax(axis=1) == np.arange(8)).all()


@pytest.mark.parametrize(
    "names",
    ["ab", ["Happy", "so la la"], ["-x", "b"], ["@x", "'"], ["ä", "$(x) `y`"], ["a=b", "#"]],
)
def test_option_texts_are_parsed_back_to_their_names(names):
    parser = Parser("")
    parser.add_argument("--classes", type=class_names)
    text = option_text("--classes", names)
    assert parser.parse(shlex.split(text)).classes == tuple(names)


@pytest.mark.parametrize("name", ["a, b", "", " a", "a\n", "\x1b[31mred", "\udce9", "a\0"])
def test_names_that_an_option_cannot_express_give_no_text(name):
    assert option_text("--classes", ["Happy", name]) is None
    said = word_order(["Happy", name], [1, 0])
    assert said.classes is None
    assert said.shows == {"Happy": name, name: "Happy"}
