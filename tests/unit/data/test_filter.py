"""Filtering keeps the best-ranked images without near duplicates."""

import numpy as np
import pytest
from PIL import Image

from clipress.data import filter as choose
from clipress.data.filter import embeddings, nearest_to_prompts, table
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Preprocess
from clipress.errors import DataError


def units(rng, *shape):
    x = rng.standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def slowly(images, prompts, count, threshold):
    """Reference: a plain loop in double precision."""
    images, prompts = images.astype(float), prompts.astype(float)
    scores = [max(float(x @ p) for p in prompts) for x in images]
    kept = []
    for index in sorted(range(len(images)), key=lambda i: -scores[i]):
        if threshold is None or all(float(images[index] @ images[other]) < threshold for other in kept):
            kept.append(index)
    return kept[:count]


@pytest.mark.parametrize("threshold", [None, 0.3, 0.8])
@pytest.mark.parametrize("block", [1, 7, 1024])
@pytest.mark.parametrize("directions", [1, 3, 64])
def test_the_selection_matches_a_slow_loop(threshold, block, directions, monkeypatch):
    monkeypatch.setattr(choose, "BLOCK", block)
    monkeypatch.setattr(choose, "DIRECTIONS", directions)
    rng = np.random.default_rng(0)
    images, prompts = units(rng, 60, 6), units(rng, 4, 6)
    chosen = nearest_to_prompts(images, prompts, 12, threshold)
    assert [pick.index for pick in chosen] == slowly(images, prompts, 12, threshold)
    for pick in chosen:
        assert pick.score == pytest.approx(float((images[pick.index] @ prompts.T).max()), abs=1e-6)
        assert pick.prompt == int((images[pick.index] @ prompts.T).argmax())


def test_copies_of_an_image_are_kept_once():
    rng = np.random.default_rng(1)
    images = units(rng, 10, 8)
    copies = np.concatenate([images, images, images])
    chosen = nearest_to_prompts(copies, units(rng, 3, 8), 30, 0.99)
    assert sorted(pick.index for pick in chosen) == list(range(10))


def test_non_finite_embeddings_are_refused():
    images = np.full((3, 4), np.nan, np.float32)
    with pytest.raises(DataError, match="not finite"):
        nearest_to_prompts(images, np.ones((1, 4), np.float32), 2)


def mean_colour(pixels):
    return pixels.mean((2, 3))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_that_cannot_be_read_is_left_out(tmp_path, threads):
    for index, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{index}.png")
    (tmp_path / "1b.png").write_bytes(b"torn")
    source = open_source(SourceSpec(format="images", images=tmp_path))
    plain = Preprocess(size=8, mean=(0, 0, 0), std=(1, 1, 1))
    counted = []
    found, indices = embeddings(source, mean_colour, plain, batch=3, threads=threads, done=counted.append)
    np.testing.assert_allclose(found, np.eye(3), atol=1e-6)
    assert [source.paths[int(i)] for i in indices] == ["0.png", "1.png", "2.png"] and counted == [3, 1]


def test_the_list_is_read_by_the_images_format(tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    rows = nearest_to_prompts(np.eye(3, dtype=np.float32), np.asarray([[0, 0.6, 0.8]], np.float32), 2)
    (tmp_path / "list.tsv").write_text(table(["a.png", "b.png", "c.png"], rows, ["a cat"]))
    assert (tmp_path / "list.tsv").read_text().splitlines()[1] == "c.png\t0.800000\ta cat"
    source = open_source(SourceSpec(format="images", images=tmp_path, annotations=tmp_path / "list.tsv"))
    assert [source.paths[i] for i in range(len(source))] == ["c.png", "b.png"]


def test_near_duplicates_among_many_images_are_found_by_faiss(monkeypatch):
    pytest.importorskip("faiss", reason="pip install 'clipress[index]'")
    rng = np.random.default_rng(0)
    originals, prompts = units(rng, 300, 16), units(rng, 4, 16)
    copies = originals[rng.integers(0, 300, 600)] + 0.01 * units(rng, 600, 16)
    images = np.concatenate([originals, copies / np.linalg.norm(copies, axis=1, keepdims=True)]).astype(np.float32)
    exact = nearest_to_prompts(images, prompts, 900, 0.98)
    monkeypatch.setattr(choose, "EXACT_UP_TO", 100)
    monkeypatch.setattr(choose, "LISTS_SEARCHED", 12)  # of 120
    monkeypatch.setattr(choose, "_bounds", None)  # the exact comparison is not used
    assert nearest_to_prompts(images, prompts, 900, 0.98) == exact
    assert 250 < len(exact) <= 300
