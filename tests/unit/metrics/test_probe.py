"""The linear probe learns linear classes, chooses C without test items and is deterministic."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from clipress.errors import ArtifactError, DataError
from clipress.metrics.outcomes import percent
from clipress.metrics.probe import CS, chosen_c, linear_probe


def features(items, seed=0, noise=0.35):
    rng = np.random.default_rng(seed)
    labels = np.arange(items) % 4
    return (np.eye(4)[labels] + noise * rng.standard_normal((items, 4))).astype(np.float32), labels


def test_linearly_separable_classes_are_classified_perfectly():
    train, test = features(80, noise=0.05), features(40, seed=1, noise=0.05)
    found = linear_probe(*train, *test)
    assert percent(found["lp_top1"]) == percent(found["lp_mean_per_class_recall"]) == 100


def test_the_probe_equals_scikit_learn_on_unit_features_with_a_listed_penalty():
    (train, labels), (test, wanted) = features(120), features(60, seed=1)
    found = linear_probe(train, labels, test, wanted)["lp_top1"]

    def on_sphere(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    c = chosen_c(on_sphere(train), labels)
    assert c in CS
    theirs = LogisticRegression(C=c, max_iter=1000).fit(on_sphere(train), labels).predict(on_sphere(test)) == wanted
    np.testing.assert_array_equal(found.values, theirs)
    assert 0.5 < theirs.mean() < 1
    np.testing.assert_array_equal(linear_probe(3 * train, labels, 5 * test, wanted)["lp_top1"].values, theirs)


def test_c_is_the_smallest_value_with_the_best_validation_accuracy():
    data = load_digits()
    pixels = data.data[:300] / np.linalg.norm(data.data[:300], axis=1, keepdims=True)
    labels, met, held_out = data.target[:300], [], []
    for place, label in enumerate(labels):
        held_out += [place] if met.count(label) % 5 == 1 else []
        met.append(label)
    kept = np.setdiff1d(np.arange(300), held_out)
    right = {}
    for c in CS:
        model = LogisticRegression(C=c, max_iter=1000).fit(pixels[kept], labels[kept])
        right[c] = model.score(pixels[held_out], labels[held_out])
    best = min(c for c in CS if right[c] == max(right.values()))
    assert chosen_c(pixels, labels) == best
    assert min(CS) < best < max(CS)


def test_an_image_of_a_class_missing_from_training_is_a_miss():
    train, labels = features(40, noise=0.05)
    found = linear_probe(train[labels < 3], labels[labels < 3], train[:8], labels[:8])
    assert found["lp_top1"].values.tolist() == [True, True, True, False] * 2
    assert percent(found["lp_mean_per_class_recall"]) == 75


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_too_little_training_data_is_an_error(labels):
    with pytest.raises(DataError, match="expected two classes, and two images in one of them"):
        linear_probe(np.eye(4), np.array(labels), np.eye(4), np.array(labels))


def test_non_finite_features_are_an_error():
    train, labels = features(20)
    broken = train.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ArtifactError, match="training image embeddings are not finite"):
        linear_probe(broken, labels, train, labels)
