"""Classification metrics match scikit-learn, and zero-shot metrics of the same scores."""

import numpy as np
import pytest
from scipy.special import softmax as reference_softmax
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from clipress.errors import ArtifactError, DataError
from clipress.metrics.classify import score_logits, softmax
from clipress.metrics.outcomes import percents
from clipress.metrics.zeroshot import classification, unit


def problem(classes=7, items=200):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, items)
    logits = rng.standard_normal((items, classes)).astype(np.float32)
    logits[np.arange(items), labels] += 1
    return logits, labels


def test_top_k_and_mean_per_class_recall_equal_scikit_learn():
    logits, labels = problem()
    found = percents(score_logits(logits, labels))
    for k in (1, 5):
        assert found[f"top{k}"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=k, labels=range(7)))
    assert found["mean_per_class_recall"] == pytest.approx(100 * balanced_accuracy_score(labels, logits.argmax(1)))


def test_logits_and_embeddings_of_the_same_scores_have_the_same_metrics():
    rng = np.random.default_rng(1)
    classes = unit(rng.standard_normal((12, 16))).astype(np.float32)
    labels = rng.integers(0, 12, 100)
    images = unit(classes[labels] + 0.5 * rng.standard_normal((100, 16))).astype(np.float32)
    from_logits = score_logits(30 * images @ classes.T, labels, seen={0, 1, 2})
    assert percents(from_logits) == percents(classification(images, classes, labels, seen={0, 1, 2}))
    assert "harmonic_top1" in from_logits


def test_a_tie_with_a_wrong_class_is_a_miss_and_is_counted():
    found = score_logits(np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), np.array([0, 1]))
    assert found["top1"].values.tolist() == [False, True] and found["top1"].tied == 1


def test_top_k_beyond_the_number_of_classes_is_left_out():
    assert set(score_logits(*problem(classes=4))) == {"top1", "mean_per_class_recall"}


@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_label_out_of_range_is_an_error(wrong):
    logits, labels = problem()
    labels[3] = wrong
    with pytest.raises(DataError, match="labels: expected 0 to 6, found"):
        score_logits(logits, labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_logits_are_an_error(bad):
    logits, labels = problem()
    logits[2, 1] = bad
    with pytest.raises(ArtifactError, match="1 of 200 logit rows are not finite"):
        score_logits(logits, labels)


def test_softmax_equals_scipys_and_does_not_overflow():
    logits = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32) * 1e4
    found = softmax(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference_softmax(logits, axis=-1), atol=1e-6)
