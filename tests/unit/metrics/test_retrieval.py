"""Ranks and recalls match an independent implementation on sorted lists, ties included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipress.errors import ArtifactError, DataError
from clipress.metrics import retrieval as module
from clipress.metrics.outcomes import percent, percents, standard_error
from clipress.metrics.retrieval import ranks, retrieval
from clipress.metrics.zeroshot import unit


def slow_rank(query, gallery, is_right, right_first):
    """Sort one list in double precision; correct answers come first or last among equal scores."""
    scores = [float(np.dot(query.astype(float), item.astype(float))) for item in gallery]
    order = sorted(range(len(gallery)), key=lambda g: (-scores[g], is_right[g] != right_first))
    return next(place for place, g in enumerate(order) if is_right[g])


@st.composite
def problems(draw):
    """Draw small integer embeddings: their products are exact, so there are many true ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images, extra, width = draw(st.integers(1, 9)), draw(st.integers(0, 20)), draw(st.integers(1, 4))
    owner = rng.permutation(np.concatenate([np.arange(images), rng.integers(0, images, extra)]))
    images = rng.integers(-2, 3, (images, width)).astype(np.float32)
    texts = (images[owner] + rng.integers(-1, 2, (len(owner), width))).astype(np.float32)
    return images, texts, owner


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([1, 7, 1 << 23]))
def test_ranks_match_sorted_lists_for_any_captions_ties_and_block_size(problem, scores):
    images, texts, owner = problem
    index = np.arange(len(images))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCORES", scores)
        for queries, gallery, right, own in ((images, texts, index, owner), (texts, images, owner, index)):
            found = ranks(queries, gallery, right, own)
            for name, right_first in (("pessimistic", False), ("optimistic", True)):
                wanted = [slow_rank(q, gallery, own == r, right_first) for q, r in zip(queries, right, strict=True)]
                assert getattr(found, name).tolist() == wanted
            assert found.tied == sum(found.pessimistic > found.optimistic)


def slow_recall(queries, gallery, right, own, k):
    return 100 * np.mean([slow_rank(q, gallery, own == r, False) < k for q, r in zip(queries, right, strict=True)])


def test_recalls_match_sorted_lists_and_count_every_caption():
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((12, 4))).astype(np.float32)
    owner = np.concatenate([np.arange(12), rng.integers(0, 12, 20)])
    texts = unit(images[owner] + rng.standard_normal((32, 4))).astype(np.float32)
    found, index = percents(retrieval(images, texts, owner)), np.arange(12)
    for k in (1, 5, 10):
        assert found[f"text_r{k}"] == pytest.approx(slow_recall(images, texts, index, owner, k))
        assert found[f"image_r{k}"] == pytest.approx(slow_recall(texts, images, owner, index, k))
    assert found["mean_r1"] == pytest.approx((found["text_r1"] + found["image_r1"]) / 2)
    assert found["rsum"] == pytest.approx(sum(found[f"{way}_r{k}"] for way in ("text", "image") for k in (1, 5, 10)))


def test_any_caption_of_an_image_counts_as_a_hit():
    images = np.eye(3, dtype=np.float32)
    # The first caption of each image belongs to another one.
    texts = np.concatenate([np.roll(images, 1, axis=0), images])
    owner = np.concatenate([np.arange(3), np.arange(3)])
    found = retrieval(images, texts + 0.5 * np.repeat([[0], [1]], 3, axis=0).astype(np.float32), owner)
    assert found["text_r1"].values.tolist() == [True] * 3
    assert found["image_r1"].values.tolist() == [False] * 3 + [True] * 3


def test_a_collapsed_model_scores_zero_and_every_query_is_a_tie():
    same = np.ones((10, 3), np.float32)
    found = retrieval(same, same, np.arange(10), (1, 5))
    assert set(percents(found).values()) == {0.0}
    assert {outcomes.tied for outcomes in found.values()} == {10}


@pytest.mark.parametrize("width", [3, 64, 129])
def test_equal_captions_of_different_images_tie_at_any_position(width):
    rng = np.random.default_rng(width)
    images = unit(rng.standard_normal((41, width), dtype=np.float32))
    texts = images.copy()
    texts[40] = texts[23] = texts[0]  # A matrix product may round these columns differently.
    found = retrieval(images, texts, np.arange(41))
    missed = np.flatnonzero(~found["text_r1"].values)
    assert 0 in missed and found["text_r1"].tied >= 1
    order = np.r_[40, 1:40, 0]  # The same problem with two positions swapped.
    again = retrieval(images[order], texts[order], np.arange(41))
    assert again["text_r1"].values.tolist() == found["text_r1"].values[order].tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["image", "text"])
def test_non_finite_embeddings_are_an_error(bad, side):
    parts = {name: np.random.default_rng(0).standard_normal((5, 3)) for name in ("image", "text")}
    parts[side][2, 1] = bad
    with pytest.raises(ArtifactError, match=f"1 of 5 {side} embeddings are not finite"):
        retrieval(parts["image"], parts["text"], np.arange(5))


def test_an_image_without_a_caption_and_a_caption_without_an_image_are_errors():
    three = np.eye(3, dtype=np.float32)
    with pytest.raises(DataError, match="1 of 3 queries have no matching item; the first is query 1"):
        retrieval(three, three[:2], np.array([0, 2]))
    with pytest.raises(DataError, match="expected owners 0 to 2, found 0 to 3"):
        retrieval(three, three, np.array([0, 1, 3]))


def test_half_precision_embeddings_are_scored_in_single_precision():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((50, 16)).astype(np.float16)
    texts = (images + rng.standard_normal((50, 16))).astype(np.float16)
    half, single = (
        retrieval(i, t, np.arange(50)) for i, t in ((images, texts), (images.astype("f"), texts.astype("f")))
    )
    assert percents(half) == percents(single)


def test_captions_of_one_image_count_once_in_the_standard_error():
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((200, 4))).astype(np.float32)
    owner = np.repeat(np.arange(200), 5)
    alike = (images + 0.2 * rng.standard_normal((200, 4)).astype(np.float32))[owner]  # Five captions share one outcome.
    found = retrieval(images, alike, owner)["image_r1"]
    p = percent(found) / 100
    assert 0.1 < p < 0.9
    # The error is that of 200 items, not of 1000.
    assert standard_error(found) == pytest.approx(100 * (p * (1 - p) / 200) ** 0.5)
