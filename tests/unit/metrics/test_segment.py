"""Mean IoU equals scikit-learn's on all pixels together, and its errors are those of images drawn again."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score

from clipress.metrics.outcomes import paired_difference, percent, read_outcomes, standard_error, write_outcomes
from clipress.metrics.segment import IGNORED, confusion, score_masks

CLASSES = 7


def masks(images, seed=0, agree=0.6):
    """Return labels and predictions; the last class occurs nowhere, the one before is predicted only."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES - 2, (images, 9, 11)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = IGNORED
    predicted = np.where(rng.random(labels.shape) < agree, labels, rng.integers(0, CLASSES - 1, labels.shape))
    predicted[predicted == IGNORED] = 0
    return labels, predicted


def scored(labels, predicted):
    return score_masks(confusion(one, other, CLASSES) for one, other in zip(labels, predicted, strict=True))


def test_it_is_scikit_learn_s_over_all_pixels():
    labels, predicted = masks(12)
    counted = labels != IGNORED
    present = np.unique([*labels[counted], *predicted[counted]])
    found = scored(labels, predicted)
    wanted = jaccard_score(labels[counted], predicted[counted], labels=present, average="macro")
    assert len(present) == CLASSES - 1 and percent(found["miou"]) == pytest.approx(100 * wanted)
    assert percent(found["pixel_accuracy"]) == pytest.approx(100 * accuracy_score(labels[counted], predicted[counted]))


def test_a_confusion_counts_every_pixel_once():
    labels = np.array([[0, 1, IGNORED], [1, 1, 2]], np.uint8)
    predicted = np.array([[0, 0, 2], [1, 2, 2]])
    assert confusion(labels, predicted, 3).tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 1]]


def test_its_standard_error_is_that_of_images_drawn_again():
    labels, predicted = masks(150)
    rng, counts = np.random.default_rng(1), [confusion(*pair, CLASSES) for pair in zip(labels, predicted, strict=True)]
    found = score_masks(counts)
    for name in ("miou", "pixel_accuracy"):
        drawn = [percent(score_masks([counts[place] for place in rng.integers(0, 150, 150)])[name]) for _ in range(400)]
        assert standard_error(found[name]) == pytest.approx(np.std(drawn), rel=0.15)


def test_two_models_are_compared_on_the_same_images(tmp_path):
    labels, good = masks(60, agree=0.8)
    bad = np.where(np.random.default_rng(2).random(good.shape) < 0.2, 1, good)
    first, second = scored(labels, good), scored(labels, bad)
    write_outcomes(first, tmp_path / "first.npz")
    difference = paired_difference(read_outcomes(tmp_path / "first.npz")["miou"], second["miou"])
    assert difference.value == pytest.approx(percent(first["miou"]) - percent(second["miou"]))
    assert 0 < difference.low < difference.value < difference.high
