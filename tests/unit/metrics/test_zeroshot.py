"""Zero-shot metrics match scikit-learn on the same scores."""

from statistics import harmonic_mean

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

from clipress.errors import ArtifactError, DataError
from clipress.metrics.outcomes import percents
from clipress.metrics.zeroshot import class_embeddings, classification, embed_labels, unit


def problem(classes=7, items=200, width=8, used=None):
    rng = np.random.default_rng(0)
    columns = unit(rng.standard_normal((classes, width))).astype(np.float32)
    labels = rng.choice(used if used is not None else classes, items)
    images = unit(columns[labels] + 0.6 * rng.standard_normal((items, width))).astype(np.float32)
    return images, columns, labels


def test_top_k_and_mean_per_class_recall_equal_scikit_learn():
    images, classes, labels = problem()
    found, scores = percents(classification(images, classes, labels)), images @ classes.T
    for k in (1, 5):
        assert found[f"top{k}"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=k, labels=range(7)))
    assert found["mean_per_class_recall"] == pytest.approx(100 * balanced_accuracy_score(labels, scores.argmax(1)))
    assert found["mean_per_class_recall"] != pytest.approx(found["top1"])


def test_classes_without_images_do_not_count_in_the_mean():
    images, classes, labels = problem(classes=30, used=[2, 10, 29])
    found, guessed = percents(classification(images, classes, labels)), (images @ classes.T).argmax(1)
    assert not np.isin(guessed, [2, 10, 29]).all()  # All 30 classes are candidates.
    recalls = [np.mean(guessed[labels == label] == label) for label in (2, 10, 29)]
    assert found["mean_per_class_recall"] == pytest.approx(100 * np.mean(recalls))
    assert found["top1"] == pytest.approx(100 * np.mean(guessed == labels))


def test_an_unknown_label_is_an_error():
    images, classes, labels = problem()
    for wrong in (7, -1):
        labels[3] = wrong
        with pytest.raises(DataError, match="expected 0 to 6, found"):
            classification(images, classes, labels)


def test_top_k_beyond_the_number_of_classes_is_left_out():
    images, classes, labels = problem(classes=4)
    assert set(classification(images, classes, labels)) == {"top1", "mean_per_class_recall"}


def test_seen_and_unseen_classes_are_scored_among_all_classes():
    images, classes, labels = problem(classes=10)
    seen, guessed = np.isin(labels, [0, 1, 2]), (images @ classes.T).argmax(1)
    found = percents(classification(images, classes, labels, seen={0, 1, 2}))
    wanted = [100 * accuracy_score(labels[part], guessed[part]) for part in (seen, ~seen)]
    assert [found["seen_top1"], found["unseen_top1"]] == pytest.approx(wanted)
    assert found["harmonic_top1"] == pytest.approx(harmonic_mean(wanted))
    assert wanted[0] != pytest.approx(wanted[1])


def test_a_model_that_misses_every_unseen_class_has_a_harmonic_mean_of_zero():
    classes, labels = np.eye(3, dtype=np.float32), np.array([0, 1, 2])
    found = percents(classification(classes[[0, 1, 0]], classes, labels, seen={0, 1}))
    assert (found["seen_top1"], found["unseen_top1"], found["harmonic_top1"]) == (100.0, 0.0, 0.0)


def test_without_images_of_unseen_classes_there_is_no_harmonic_mean():
    images, classes, labels = problem(used=[0, 1])
    found = classification(images, classes, labels, seen={0, 1})
    assert "seen_top1" in found and not {"unseen_top1", "harmonic_top1"} & set(found)


@pytest.mark.parametrize(("classes", "width"), [(7, 5), (30, 64), (101, 129)])
def test_classes_with_the_same_name_tie_and_the_ties_are_counted(classes, width):
    images, columns, labels = problem(classes, 300, width)
    columns[-1] = columns[1]  # ImageNet has two such pairs: missile and sunglasses.
    found, twins = classification(images, columns, labels, ks=(1, 2)), np.isin(labels, [1, classes - 1])
    assert twins.any() and not found["top1"].values[twins].any()
    assert found["top1"].tied == twins.sum()
    np.testing.assert_array_equal(
        found["top2"].values[twins], (images @ columns.T).argmax(1)[twins] % (classes - 2) == 1
    )


def test_templates_are_averaged_on_the_sphere():
    prompts = np.array([[[3.0, 0.0], [0.0, 0.1]], [[-1.0, 0.0], [-5.0, 0.0]]])
    np.testing.assert_allclose(class_embeddings(prompts), [[2**-0.5, 2**-0.5], [-1, 0]])


def test_labels_are_embedded_in_every_template_and_averaged():
    table = {"a cat": [3.0, 0.0], "cat!": [0.0, 0.1], "a {x}": [-1.0, 0.0], "{x}!": [-5.0, 0.0]}
    found = embed_labels(
        lambda prompts: np.array([table[prompt] for prompt in prompts]), ["cat", "{x}"], ["a {}", "{}!"]
    )
    np.testing.assert_allclose(found, [[2**-0.5, 2**-0.5], [-1, 0]], atol=1e-6)
    with pytest.raises(ArtifactError, match="1 of 2 text embeddings are not finite"):
        embed_labels(lambda _: np.array([[np.nan, 0], [1, 0]]), ["cat"], ["a {}", "{}!"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_embeddings_are_an_error(bad):
    for side, what in enumerate(("image", "class")):
        parts = list(problem())
        parts[side] = parts[side].copy()
        parts[side][2, 1] = bad
        with pytest.raises(ArtifactError, match=f"1 of .* {what} embeddings are not finite"):
            classification(*parts)
