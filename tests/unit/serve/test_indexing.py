"""Embedding images into an index: which ones, which are skipped, and how a killed run is resumed."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from helpers import clipress, lock_held
from small_exports import describe, small_image, write_classifier, write_export

pytest.importorskip("faiss", reason="pip install 'clipress[index]'")

from clipress.errors import ArtifactError, DataError, ExportError
from clipress.serve import indexing
from clipress.serve.classify import LoadedModel
from clipress.serve.index import open_index


@pytest.fixture
def export(tmp_path):
    return write_export(tmp_path / "export")


@pytest.fixture
def images(tmp_path):
    """20 images in two folders."""
    folder = tmp_path / "images"
    for number in range(20):
        path = folder / ("a", "b")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small_image(number)[1])
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(indexing, "PART", 8)
    monkeypatch.setattr(indexing, "BATCH", 3)


def indexed(where, export, out, **options):
    return indexing.index_images(str(where), export, out, threads=1, say=lambda _: None, **options)


def keys_of(folder):
    index = open_index(folder)
    return [index.key(row) for row in range(len(index))]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_image_is_found_by_its_embedding(tmp_path, export, images):
    indexed(images, export, tmp_path / "index")
    paths = sorted(str(path) for path in images.rglob("*.png"))
    assert keys_of(tmp_path / "index") == paths
    queries = LoadedModel(export, threads=1).encode_image(paths)
    scores, keys = open_index(tmp_path / "index").search(queries, 1)
    np.testing.assert_allclose(scores, 1, atol=1e-5)
    assert keys == [[path] for path in paths]


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_records_of_shards_need_no_captions(tmp_path, export):
    (tmp_path / "shards").mkdir()
    long = "long" * 60  # Longer than a plain header allows.
    shard(
        tmp_path / "shards" / "0.tar",
        [("a.png", small_image(0)[1]), ("a.txt", b"a cat"), ("d/b.png", small_image(1)[1])],
    )
    shard(tmp_path / "shards" / "1.tar", [(f"{long}.PNG", small_image(2)[1])])
    indexed(tmp_path / "shards", export, tmp_path / "index")
    home = tmp_path / "shards"
    assert keys_of(tmp_path / "index") == [f"{home}/0.tar/a", f"{home}/0.tar/d/b", f"{home}/1.tar/{long}"]
    indexed(f"{home}/{{0..1}}.tar", export, tmp_path / "same")
    assert keys_of(tmp_path / "same") == keys_of(tmp_path / "index")


def test_a_folder_of_shards_and_images_is_ambiguous(tmp_path, export, images):
    shard(images / "0.tar", [("a.png", small_image(0)[1])])
    with pytest.raises(DataError, match="expected images or shards, found both"):
        indexed(images, export, tmp_path / "index")


def test_images_that_cannot_be_read_are_skipped_and_named(tmp_path, export, images, caplog):
    (images / "a" / "05.png").write_bytes(b"no image")
    (images / "b" / "zz.png").write_bytes(small_image(1)[1][:40])
    indexed(images, export, tmp_path / "index")
    keys = keys_of(tmp_path / "index")
    assert len(keys) == 20 and not {str(images / "a" / "05.png"), str(images / "b" / "zz.png")} & set(keys)
    named = (tmp_path / "index" / "skipped.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in named[1:]] == [f"{images}/a/05.png", f"{images}/b/zz.png"]
    assert sum("skipped: " in record.message for record in caplog.records) == 2


def test_a_repeated_name_is_indexed_once(tmp_path, export):
    shard(
        tmp_path / "0.tar", [("a.png", small_image(0)[1]), ("b.png", small_image(1)[1]), ("a.png", small_image(2)[1])]
    )
    indexed(tmp_path / "0.tar", export, tmp_path / "index")
    assert keys_of(tmp_path / "index") == [f"{tmp_path}/0.tar/a", f"{tmp_path}/0.tar/b"]


def test_a_source_that_is_mostly_broken_stops_the_run(tmp_path, export, monkeypatch):
    monkeypatch.setattr(indexing, "FEW", 2)
    for number in range(20):
        (tmp_path / f"{number:02}.png").write_bytes(small_image(number)[1] if number % 2 else b"")
    with pytest.raises(DataError, match=r"4 of 8 records cannot be used .* At most 20%"):
        indexed(tmp_path, export, tmp_path / "index")


def test_a_classifier_cannot_fill_an_index(tmp_path, images):
    with pytest.raises(
        ExportError, match="expected a graph 'image' that gives embeddings, found a model that classifies images"
    ):
        indexed(images, write_classifier(tmp_path / "classifier"), tmp_path / "index")


def test_nothing_to_read_is_an_error(tmp_path, export):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected images .* or shards .*, found none"):
        indexed(tmp_path / "empty", export, tmp_path / "index")
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of its 1 images can be read"):
        indexed(tmp_path / "empty", export, tmp_path / "index")


JOB = """
import os, signal, sys
from pathlib import Path
from clipress.serve import indexing
indexing.PART, indexing.BATCH = 8, 3
where, export, out, batches = sys.argv[1:]
embed, calls = indexing.ImageEncoder.__call__, 0
def counted(self, views):
    global calls
    calls += 1
    if calls > int(batches): os.kill(os.getpid(), signal.SIGKILL)
    return embed(self, views)
indexing.ImageEncoder.__call__ = counted
indexing.index_images(where, Path(export), Path(out), threads=1)
"""


def test_a_killed_run_is_resumed_and_ends_as_an_uninterrupted_one(tmp_path, export, images, monkeypatch):
    (images / "a" / "05.png").write_bytes(b"no image")
    indexed(images, export, tmp_path / "whole")
    out = tmp_path / "killed"
    job = [sys.executable, "-c", JOB, images, export, out, "4"]
    assert subprocess.run(job, capture_output=True).returncode == -signal.SIGKILL
    assert len(list(out.rglob("*.npz"))) == 1 and not (out / "index.json").exists()  # 3 batches make a part, 1 is lost
    embedded = []
    embed = indexing.ImageEncoder.__call__
    monkeypatch.setattr(
        indexing.ImageEncoder, "__call__", lambda self, views: embedded.append(len(views)) or embed(self, views)
    )
    indexed(images, export, out)
    assert sum(embedded) == 20 - 7  # One of the 8 files in the kept part is not an image.
    assert content(out) == content(tmp_path / "whole")


def stop_after_the_parts(monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    return monkeypatch.setattr(indexing, "write_index", stopped)


def test_a_part_is_made_again_if_it_is_damaged_or_its_images_changed(tmp_path, export, images, monkeypatch):
    out = tmp_path / "index"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after_the_parts(patched)
        indexed(images, export, out)
    parts = sorted(out.rglob("*.npz"))
    assert len(parts) == 3
    parts[0].write_bytes(parts[0].read_bytes()[:-100])
    flipped = bytearray(parts[1].read_bytes())
    flipped[200] ^= 1
    parts[1].write_bytes(flipped)
    last = sorted(images.rglob("*.png"))[-1]
    last.write_bytes(small_image(77)[1] + b" ")
    indexed(images, export, out)
    indexed(images, export, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_a_stopped_rebuild_leaves_the_old_index(tmp_path, export, images, monkeypatch):
    indexed(images / "a", export, tmp_path / "index")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after_the_parts(patched)
        indexed(images, export, tmp_path / "index")
    assert len(open_index(tmp_path / "index")) == 10
    indexed(images, export, tmp_path / "index")
    assert len(open_index(tmp_path / "index")) == 20


def test_new_images_are_added_and_known_ones_replaced(tmp_path, export, images):
    out = tmp_path / "index"
    indexed(images / "a", export, out)
    changed = images / "a" / "00.png"
    changed.write_bytes(small_image(50)[1])
    (images / "a" / "new.png").write_bytes(small_image(51)[1])
    indexed(images / "a", export, out, add=True)
    indexed(images / "b", export, out, add=True)
    assert len(open_index(out)) == 21
    scores, keys = open_index(out).search(LoadedModel(export, threads=1).encode_image([changed]), 1)
    assert keys == [[str(changed)]] and scores[0, 0] == pytest.approx(1, abs=1e-5)


@pytest.fixture
def embedded(monkeypatch):
    """The numbers of images that are embedded at once, in a list that grows."""
    counts, embed = [], indexing.ImageEncoder.__call__
    monkeypatch.setattr(
        indexing.ImageEncoder, "__call__", lambda self, views: counts.append(len(views)) or embed(self, views)
    )
    return counts


def update(images, export, out, embedded):
    """Add images to an index; return how many were embedded, and what was said."""
    embedded.clear()
    said = []
    indexing.index_images(str(images), export, out, threads=1, say=said.append, add=True)
    return sum(embedded), "\n".join(said)


def test_an_update_embeds_what_is_new_or_has_changed(tmp_path, export, images, embedded):
    out, paths = tmp_path / "index", sorted(images.rglob("*.png"))
    indexed(images, export, out)
    before = content(out)
    assert update(images, export, out, embedded)[0] == 0 and content(out) == before
    for number, path in enumerate(paths[3:5]):
        path.write_bytes(small_image(50 + number)[1])
    new = images / "a" / "new.png"
    new.write_bytes(small_image(60)[1])
    count, said = update(images, export, out, embedded)
    assert count == 3 and f"{images}: 2 images changed since they were indexed, and are embedded again" in said
    every = list(map(str, [*paths, new]))
    scores, keys = open_index(out).search(LoadedModel(export, threads=1).encode_image(every), 1)
    assert keys == [[path] for path in every] and len(keys_of(out)) == len(every)
    np.testing.assert_allclose(scores, 1, atol=1e-5)
    assert update(images, export, out, embedded)[0] == 0


@pytest.mark.parametrize(("check", "counts"), [("stat", (20, 0)), ("content", (0, 1))])
def test_an_index_compares_times_or_contents(tmp_path, export, images, embedded, check, counts):
    """All images are touched; then one is replaced by another of its size and time."""
    out, path = tmp_path / "index", images / "a" / "00.png"
    size = max(len(small_image(number)[1]) for number in (0, 50))
    path.write_bytes(small_image(0)[1].ljust(size))
    indexed(images, export, out, check=check)
    for one in images.rglob("*.png"):
        os.utime(one, (2000, 2000))
    assert update(images, export, out, embedded)[0] == counts[0]
    path.write_bytes(small_image(50)[1].ljust(size))
    os.utime(path, (2000, 2000))
    assert update(images, export, out, embedded)[0] == counts[1]


def test_a_shard_that_changed_is_embedded_again(tmp_path, export, embedded):
    home = tmp_path / "shards"
    home.mkdir()
    for number in range(2):
        shard(home / f"{number}.tar", [(f"{name}.png", small_image(number)[1]) for name in "abc"])
    indexed(home, export, tmp_path / "index")
    os.utime(home / "1.tar", (2000, 2000))
    count, said = update(home, export, tmp_path / "index", embedded)
    assert count == 3 and "3 images changed since they were indexed" in said


def test_an_image_that_can_no_longer_be_read_leaves_the_index(tmp_path, export, images, embedded):
    out = tmp_path / "index"
    indexed(images, export, out)
    (images / "a" / "00.png").write_bytes(b"no image")
    said = update(images, export, out, embedded)[1]
    assert str(images / "a" / "00.png") not in keys_of(out) and len(keys_of(out)) == 19
    assert "1 images changed" in said and "1 images that can no longer be read leave the index" in said
    before = content(out)
    update(images, export, out, embedded)
    assert content(out) == before


def test_an_index_that_does_not_say_what_its_files_were_is_updated_as_a_whole(tmp_path, export, images, embedded):
    """As those of earlier versions."""
    out = tmp_path / "index"
    indexed(images, export, out)
    path = out / "index.json"
    known = json.loads(path.read_text())
    (out / known.pop("states")["file"]).unlink()
    del known["check"]
    path.write_text(json.dumps(known))
    assert update(images, export, out, embedded)[0] == 20
    assert update(images, export, out, embedded)[0] == 0


def test_images_by_another_encoder_are_not_added(tmp_path, export, images):
    indexed(images, export, tmp_path / "index")
    describe(export, lineage_hash="another")
    with pytest.raises(ArtifactError, match="Embeddings of two encoders cannot be compared"):
        indexed(images, export, tmp_path / "index", add=True)


def test_a_folder_that_is_not_an_index_is_left_alone(tmp_path, export, images):
    with pytest.raises(ArtifactError, match=r"is not an index\. Nothing was changed"):
        indexed(images, export, images)


def test_the_command_makes_adds_and_removes(tmp_path, export, images):
    out = tmp_path / "index"
    made = clipress("index", images / "a", "--model", export, "--out", out, "--threads", 1)
    assert made.exit_code == 0 and "Index of 10 images, 4 dimensions, flat" in made.output
    added = clipress("index", images / "b", "--model", export, "--out", out, "--add")
    assert added.exit_code == 0 and "Index of 20 images" in added.output
    removed = clipress("index", "--out", out, "--remove", images / "a" / "00.png")
    assert removed.exit_code == 0 and "Removed 1 entries, 19 left" in removed.output


def test_a_second_writer_of_an_index_is_refused_and_readers_are_not(tmp_path, export, images):
    out = tmp_path / "index"
    indexed(images / "a", export, out)
    before = content(out)
    with lock_held(out) as other:
        for arguments in (
            (images / "b", "--model", export),
            (images / "b", "--model", export, "--add"),
            ("--remove", images / "a" / "00.png"),
        ):
            found = clipress("index", *arguments, "--out", out)
            assert found.exit_code == 2 and f"{out} is in use by another clipress process" in found.output
        assert content(out) == before and len(keys_of(out)) == 10
        other.stdin.close()
    assert clipress("index", images / "b", "--model", export, "--out", out, "--add").exit_code == 0
    assert len(keys_of(out)) == 20


def test_a_folder_without_an_index_is_not_written_into(tmp_path):
    found = clipress("index", "--out", tmp_path / "none", "--remove", "key")
    assert found.exit_code == 2 and "is not an index" in found.output and not (tmp_path / "none").exists()


def test_an_index_is_made_where_a_stopped_run_left_only_its_lock(tmp_path, export, images):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / ".lock").touch()
    indexed(images, export, tmp_path / "index")
    assert len(keys_of(tmp_path / "index")) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["IMAGES"], "Set exactly one of --run and --model"),
        (["--model", "x"], "IMAGES is required"),
        (["IMAGES", "--remove", "key"], "--remove takes no other option but --out"),
        (["IMAGES", "--model", "x", "--add", "--kind", "ivf"], "--add keeps those of the index"),
        (["IMAGES", "--model", "x"], "no export.json"),
        (["IMAGES", "--run", "x"], "x is not a run folder: no such folder"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    found = clipress("index", *options, "--out", tmp_path / "index")
    assert found.exit_code == 2 and message in found.output and "Traceback" not in found.output
