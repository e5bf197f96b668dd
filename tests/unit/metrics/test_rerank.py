"""Re-ranking equals sorting every query's list twice, once by cosine and its head by the match score."""

import numpy as np
import pytest

from clipress.errors import ArtifactError, DataError
from clipress.metrics.outcomes import percent, percents
from clipress.metrics.rerank import reranked
from clipress.metrics.retrieval import retrieval
from clipress.metrics.zeroshot import unit


@pytest.fixture(scope="module")
def pairs():
    """Return images, texts, owner, and the match logits of all pairs, of which the right ones are mostly higher."""
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((20, 6))).astype(np.float32)
    owner = np.concatenate([np.arange(20), rng.integers(0, 20, 30)])
    texts = unit(images[owner] + rng.standard_normal((50, 6))).astype(np.float32)
    return images, texts, owner, rng.standard_normal((20, 50)) + 2.0 * (owner == np.arange(20)[:, None])


def slow(images, texts, owner, logits, k, ks=(1, 5, 10)):
    """Return R@K of both directions by sorting lists."""
    cosines, found = (images @ texts.T).astype(float), {}
    matches = owner == np.arange(len(images))[:, None]
    ways = {"text": (cosines, logits, matches), "image": (cosines.T, logits.T, matches.T)}
    for way, (scores, logit, right) in ways.items():
        places = []
        for query in range(len(scores)):
            order = sorted(range(scores.shape[1]), key=lambda item: -scores[query, item])
            head = sorted(order[:k], key=lambda item: -(scores[query, item] + logit[query, item]))
            places.append(next(place for place, item in enumerate(head + order[k:]) if right[query, item]))
        found |= {f"{way}_r{top}": 100 * np.mean(np.asarray(places) < top) for top in ks}
    return found


@pytest.mark.parametrize("k", [1, 3, 8, 20, 50, 1000])
def test_the_nearest_are_scored_again_and_the_others_stay_behind(pairs, k):
    images, texts, owner, logits = pairs
    found = percents(reranked(images, texts, owner, lambda image, text: logits[image, text], k))
    wanted = slow(images, texts, owner, logits, k)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert found["r_mean"] == pytest.approx(np.mean(list(wanted.values())))
    assert found["rsum"] == pytest.approx(sum(wanted.values()))
    assert found["mean_r1"] == pytest.approx((wanted["text_r1"] + wanted["image_r1"]) / 2)


def test_with_the_whole_gallery_it_is_full_re_ranking(pairs):
    images, texts, owner, logits = pairs
    found = percents(reranked(images, texts, owner, lambda image, text: logits[image, text], 50))
    scores, matches = images @ texts.T + logits, owner == np.arange(20)[:, None]
    best = np.where(matches, scores, -np.inf).max(1)
    assert found["text_r5"] == pytest.approx(100 * np.mean((scores > best[:, None]).sum(1) < 5))


def test_a_match_that_says_nothing_leaves_retrieval_as_it_is(pairs):
    images, texts, owner, _ = pairs
    plain, found = retrieval(images, texts, owner), reranked(images, texts, owner, lambda image, _: 0.0 * image, 5)
    for name, outcomes in plain.items():
        np.testing.assert_array_equal(found[name].values, outcomes.values)
        assert percent(found[name]) == percent(outcomes)


def test_only_the_nearest_pairs_are_scored(pairs):
    images, texts, owner, logits = pairs
    scored = []

    def match(image, text):
        scored.append((image, text))
        return logits[image, text]

    reranked(images, texts, owner, match, 4)
    assert len(scored) == 20 + 50 and all(len(image) == len(text) == 4 for image, text in scored)
    assert all(len(set(image)) == 1 for image, _ in scored[:20]) and all(len(set(text)) == 1 for _, text in scored[20:])


def test_a_match_that_scores_less_than_minus_a_hundred_still_comes_first(pairs):
    images, texts, owner, logits = pairs
    found = percents(reranked(images, texts, owner, lambda image, text: logits[image, text] - 1000, 3))
    wanted = slow(images, texts, owner, logits, 3)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


def test_no_items_and_broken_scores_are_refused(pairs):
    images, texts, owner, logits = pairs
    with pytest.raises(DataError, match="expected at least 1 item per query, found 0"):
        reranked(images, texts, owner, lambda image, text: logits[image, text], 0)
    with pytest.raises(ArtifactError, match="match logits are not finite"):
        reranked(images, texts, owner, lambda image, text: np.full(len(image), np.nan), 2)
