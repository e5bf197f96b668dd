"""Metrics against independent implementations on the same embeddings, ties included."""

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from clipress.errors import ArtifactError
from clipress.metrics.evaluate import evaluate
from clipress.metrics.retrieval import recalls
from clipress.metrics.zeroshot import class_embeddings, topk_accuracy, unit


def slow_recalls(images, texts, owner, k):
    """Walk sorted lists, one query at a time; a wrong answer goes before a right one of the same score."""
    to_text = to_image = 0
    for i, image in enumerate(images):
        order = sorted(range(len(texts)), key=lambda t: (-float(image @ texts[t]), owner[t] == i))
        to_text += any(owner[t] == i for t in order[:k])
    for t, text in enumerate(texts):
        order = sorted(range(len(images)), key=lambda i: (-float(images[i] @ text), owner[t] == i))
        to_image += owner[t] in order[:k]
    return 100 * to_text / len(images), 100 * to_image / len(texts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_recall_equals_walking_sorted_lists(seed, ties):
    rng = np.random.default_rng(seed)
    images = (
        rng.integers(-1, 2, (12, 4)).astype(np.float32)
        if ties
        else unit(rng.standard_normal((12, 4)).astype(np.float32))
    )
    owner = np.concatenate([np.arange(12), rng.integers(0, 12, 20)])
    noise = rng.integers(-1, 2, (32, 4)) if ties else rng.standard_normal((32, 4))
    texts = (images[owner] + noise).astype(np.float32)
    found = recalls(images, texts, owner)
    for k in (1, 5, 10):
        assert (found[f"text_r{k}"], found[f"image_r{k}"]) == pytest.approx(slow_recalls(images, texts, owner, k))


def test_a_collapsed_model_scores_nothing():
    same = np.ones((10, 3), np.float32)
    assert set(recalls(same, same, np.arange(10), (1, 5)).values()) == {0.0}
    assert topk_accuracy(same, np.ones((4, 3), np.float32), np.zeros(10, int), (1,)) == {"top1": 0.0}


def test_top_k_equals_scikit_learn():
    rng = np.random.default_rng(0)
    images, classes = rng.standard_normal((200, 8)).astype("f"), rng.standard_normal((7, 8)).astype("f")
    labels = rng.integers(0, 7, 200)
    found = topk_accuracy(images, classes, labels)
    for k in (1, 5):
        wanted = top_k_accuracy_score(labels, images @ classes.T, k=k, labels=range(7))
        assert found[f"top{k}"] == pytest.approx(100 * wanted)


def test_templates_are_averaged_on_the_sphere():
    prompts = np.array([[[3.0, 0.0], [0.0, 0.1]], [[-1.0, 0.0], [-5.0, 0.0]]])
    np.testing.assert_allclose(class_embeddings(prompts), [[2**-0.5, 2**-0.5], [-1, 0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_an_error_never_a_hit(bad):
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((5, 3)), rng.standard_normal((5, 3))
    images[2, 1] = bad
    with pytest.raises(ArtifactError, match="1 of 5 image embeddings are not finite"):
        recalls(images, texts, np.arange(5))
    with pytest.raises(ArtifactError, match="not finite"):
        topk_accuracy(images, texts, np.arange(5))


def test_evaluation_uses_every_caption_and_every_template():
    from clipress.data.evalsets import evalsets
    from clipress.data.pairs import SourceSpec
    from clipress.data.transforms import Preprocess

    sets = evalsets(
        [SourceSpec(format="scenes", split="test", limit=6), SourceSpec(format="digits", split="test", limit=9)]
    )
    seen = []

    def tokenize(texts):
        seen.extend(texts)
        return np.asarray([[sum(map(ord, text)) % 97, len(text)] for text in texts])

    found = evaluate(
        lambda p: p.reshape(len(p), -1)[:, :2], lambda ids: ids.astype("f"), sets, Preprocess(size=32), tokenize
    )
    assert len(seen) == 6 * 5 + 10 * 5
    assert set(found) == {f"scenes/{w}_r{k}" for w in ("text", "image") for k in (1, 5, 10)} | {
        "digits/top1",
        "digits/top5",
    }
