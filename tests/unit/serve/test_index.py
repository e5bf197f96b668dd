"""The index against NumPy, and after a kill, with a damaged file, or with another encoder."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss", reason="pip install 'clipress[index]'")

import faiss

from clipress.errors import ArtifactError, DataError
from clipress.serve.index import Encoder, Index, change_index, kind_for, open_index, read_description, write_index

ENCODER = Encoder(lineage="0123456789abcdef", stage="int8", precision="int8", sha256="0" * 64)
DIM = 16


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def vectors(count, seed=0):
    """Return clustered vectors, as embeddings are: 32 centres and some noise."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((32, DIM))
    return unit(centres[rng.integers(32, size=count)] + 0.4 * rng.standard_normal((count, DIM)))


def names(count, start=0):
    return [f"images/{number}.jpg" for number in range(start, start + count)]


def made(folder, rows, keys=None, kind="flat", block=64):
    def blocks():
        return (rows[start : start + block] for start in range(0, len(rows), block))

    write_index(folder, kind, blocks, keys or names(len(rows)), ENCODER)
    return open_index(folder)


def by_numpy(rows, keys, queries, k):
    """Return the keys of the nearest rows in double precision, nearest first."""
    order = np.argsort(-(queries.astype(float) @ rows.astype(float).T), axis=1, kind="stable")[:, :k]
    return [[keys[row] for row in found] for found in order]


def recall(found, wanted):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, wanted, strict=True)])


def test_the_flat_index_matches_numpy(tmp_path):
    rows, queries = vectors(300), vectors(20, seed=1)
    index = made(tmp_path / "index", rows)
    scores, keys = index.search(queries, 7)
    assert keys == by_numpy(rows, names(300), queries, 7)
    np.testing.assert_allclose(scores, -np.sort(-(queries @ rows.T))[:, :7], atol=1e-6)
    assert scores.dtype == np.float32 and (len(index), index.dim, index.lineage) == (300, DIM, ENCODER.lineage)


def filled(empty, rows):
    """Return what faiss writes of an index after adding rows."""
    empty.add(rows)
    return faiss.serialize_index(empty).tobytes()


def test_files_are_those_that_faiss_writes(tmp_path):
    """Though they are written block by block, and the vectors are never in memory at once."""
    rows = vectors(3000)
    flat = made(tmp_path / "flat", rows)
    content = (flat.folder / flat.description.vectors.file).read_bytes()
    assert content == filled(faiss.IndexFlatIP(DIM), rows)
    lists = made(tmp_path / "lists", rows, kind="ivf")
    content = (lists.folder / lists.description.vectors.file).read_bytes()
    empty = faiss.deserialize_index(np.frombuffer(content, np.uint8))
    assert empty.ntotal == 3000
    empty.reset()
    assert content == filled(empty, rows)


def test_lists_may_be_empty(tmp_path):
    rows = np.repeat(vectors(2), 100, axis=0)
    index = made(tmp_path / "index", rows, kind="ivf")
    _, ((found,),) = index.search(rows[:1], 1)
    assert int(found.removeprefix("images/").removesuffix(".jpg")) < 100
    assert len(index.search(rows[:1], 200)[1][0]) == 200


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_kinds_find_nearly_all_of_it(tmp_path, kind):
    rows, queries = vectors(3000), vectors(50, seed=1)
    _, keys = made(tmp_path / "index", rows, kind=kind).search(queries, 10)
    assert recall(keys, by_numpy(rows, names(3000), queries, 10)) > 0.9


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_k_entries_are_found_or_all_if_there_are_fewer(tmp_path, kind):
    rows = vectors(500)
    index = made(tmp_path / "index", rows, kind=kind)
    for k, count in ((400, 400), (10_000, 500)):
        scores, (keys,) = index.search(rows[:1], k)
        assert scores.shape == (1, count) and len(set(keys)) == count and np.isfinite(scores).all()


def test_the_default_is_exact_up_to_a_million():
    assert (kind_for(1), kind_for(1_000_000), kind_for(1_000_001)) == ("flat", "flat", "ivf")


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_vectors_are_mapped_and_not_loaded(tmp_path, kind):
    index = made(tmp_path / "index", vectors(500), kind=kind)
    assert index.description.vectors.file in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_added_entries_are_found_and_removed_ones_are_not(tmp_path, kind):
    folder, rows, more = tmp_path / "index", vectors(400), vectors(100, seed=2)
    made(folder, rows, kind=kind)
    change_index(open_index(folder), blocks=[more[:60], more[60:]], keys=names(100, start=400))
    gone = names(400)[::3]
    change_index(open_index(folder), remove=gone)
    index = open_index(folder)
    every = dict(zip(names(500), np.concatenate([rows, more]), strict=True))
    left = {key: row for key, row in every.items() if key not in gone}
    assert [index.key(row) for row in range(len(index))] == list(left)
    _, keys = index.search(np.stack(list(left.values())), 1)
    assert np.mean([found == key for (found,), key in zip(keys, left, strict=True)]) > (
        0.99 if kind == "flat" else 0.95
    )
    assert index.description.kind == kind


def test_a_repeated_key_has_the_new_vector(tmp_path):
    folder, rows = tmp_path / "index", vectors(50)
    made(folder, rows)
    change_index(open_index(folder), blocks=[-rows[:1]], keys=["images/0.jpg"])
    index = open_index(folder)
    assert len(index) == 50
    scores, (found,) = index.search(-rows[:1], 1)
    assert found == ["images/0.jpg"] and scores[0, 0] == pytest.approx(1)


def test_keys_may_be_any_file_name(tmp_path):
    keys = ["two\nlines", 'quo"te\\', "größe\u2028", os.fsdecode(b"not\xffutf8")]
    index = made(tmp_path / "index", vectors(4), keys)
    assert [index.key(row) for row in range(4)] == keys


def test_removing_an_unknown_key_changes_nothing(tmp_path):
    made(tmp_path / "index", vectors(20))
    with pytest.raises(DataError, match=r"no entry 'images/21.jpg'. Did you mean"):
        change_index(open_index(tmp_path / "index"), remove=["images/3.jpg", "images/21.jpg"])
    assert len(open_index(tmp_path / "index")) == 20


def test_the_last_entries_are_not_removed(tmp_path):
    made(tmp_path / "index", vectors(3))
    with pytest.raises(DataError, match="nothing would be left"):
        change_index(open_index(tmp_path / "index"), remove=names(3))


@pytest.mark.parametrize("queries", [np.zeros((1, DIM + 1)), np.zeros(DIM), np.full((1, DIM), np.nan)])
def test_malformed_queries_are_refused(tmp_path, queries):
    with pytest.raises(DataError, match="expected"):
        made(tmp_path / "index", vectors(20)).search(queries, 1)


def test_queries_of_another_encoder_are_refused(tmp_path):
    made(tmp_path / "index", vectors(20))
    assert isinstance(open_index(tmp_path / "index", ENCODER.lineage), Index)
    with pytest.raises(ArtifactError, match=r"encoder 0123456789abcdef.*found other"):
        open_index(tmp_path / "index", "other")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("which", ["vectors", "keys"])
@pytest.mark.parametrize(
    ("harm", "message"), [(truncate, "bytes; index.json says"), (flip, "sha256"), (os.unlink, "no .* in it")]
)
def test_a_damaged_file_is_refused(tmp_path, which, harm, message):
    index = made(tmp_path / "index", vectors(20))
    path = tmp_path / "index" / getattr(index.description, which).file
    del index
    harm(path)
    with pytest.raises(ArtifactError, match=message):
        open_index(tmp_path / "index")


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"schema_version": 2}'])
def test_a_damaged_description_is_refused(tmp_path, content):
    made(tmp_path / "index", vectors(20))
    (tmp_path / "index" / "index.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"index\.json.*Make the index again"):
        open_index(tmp_path / "index")


def test_a_description_that_names_files_elsewhere_is_refused(tmp_path):
    made(tmp_path / "index", vectors(20))
    path = tmp_path / "index" / "index.json"
    described = json.loads(path.read_text())
    described["keys"]["file"] = "../keys.jsonl"
    path.write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match=r"index\.json, keys\.file: .*Make the index again"):
        open_index(tmp_path / "index")


def test_a_folder_without_an_index_says_how_to_make_one(tmp_path):
    with pytest.raises(ArtifactError, match="clipress index IMAGES"):
        open_index(tmp_path)


class Killed(BaseException):
    """An exception that no handler catches."""


@pytest.mark.parametrize("call", ["replace", "fsync", "unlink", "open"])
def test_a_kill_at_any_moment_leaves_the_old_index_or_the_new_one(tmp_path, monkeypatch, call):
    """Stop the n-th such call of a change, for every n until the change succeeds."""
    folder, rows, extra = tmp_path / "index", vectors(30), vectors(1, seed=5)
    whole = getattr(os, call)
    for stop_at in range(1, 50):
        made(folder, rows)
        calls = 0

        def counted(*arguments, stop_at=stop_at, **options):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Killed
            return whole(*arguments, **options)

        try:
            with monkeypatch.context() as patched:
                patched.setattr(os, call, counted)
                change_index(open_index(folder), blocks=[extra], keys=["new"])
        except Killed:
            found = len(open_index(folder))
            assert found in (30, 31)
            open_index(folder).search(extra, 3)
        else:
            assert len(open_index(folder)) == 31
            break
    assert stop_at > 1  # At least one call was stopped.


def test_files_left_by_a_kill_are_removed_by_the_next_change(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    made(folder, vectors(30))

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("clipress.serve.index.write_text_whole", killed)
        change_index(open_index(folder), remove=["images/1.jpg"])
    assert len(list(folder.iterdir())) == 7
    change_index(open_index(folder), remove=["images/1.jpg"])
    named = {file.file for file in read_description(folder).files}
    assert len(named) == 3 and {path.name for path in folder.iterdir()} == {"index.json", *named}


def test_replacing_an_index_does_not_affect_an_open_one(tmp_path):
    folder, rows = tmp_path / "index", vectors(200)
    index = made(folder, rows)
    before = index.search(rows[:5], 3)[1]
    made(folder, vectors(100, seed=7))
    assert index.search(rows[:5], 3)[1] == before
    assert len(open_index(folder)) == 100
