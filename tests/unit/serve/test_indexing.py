"""From pictures to an index: what is embedded, what is left out, what a killed run leaves to the next one."""

import io
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from helpers import clipress
from tower import describe, picture, write_export

pytest.importorskip("faiss", reason="pip install 'clipress[serve]'")

from clipress.errors import ArtifactError, DataError
from clipress.serve import indexing
from clipress.serve.classify import LoadedModel
from clipress.serve.index import open_index


@pytest.fixture
def export(tmp_path):
    return write_export(tmp_path / "export")


@pytest.fixture
def pictures(tmp_path):
    """20 pictures in two folders."""
    folder = tmp_path / "pictures"
    for number in range(20):
        path = folder / ("a", "b")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number)[1])
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(indexing, "PART", 8)
    monkeypatch.setattr(indexing, "BATCH", 3)


def indexed(where, export, out, **options):
    return indexing.index_pictures(str(where), export, out, threads=1, say=lambda _: None, **options)


def keys_of(folder):
    index = open_index(folder)
    return [index.key(row) for row in range(len(index))]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_picture_is_found_by_the_classifiers_own_embedding_of_it(tmp_path, export, pictures):
    indexed(pictures, export, tmp_path / "index")
    paths = sorted(str(path) for path in pictures.rglob("*.png"))
    assert keys_of(tmp_path / "index") == paths
    tower = LoadedModel(export, threads=1)
    queries = tower.encode_image(paths)
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
    long = "long" * 60  # beyond what a plain header holds
    shard(tmp_path / "shards" / "0.tar", [("a.png", picture(0)[1]), ("a.txt", b"a cat"), ("d/b.png", picture(1)[1])])
    shard(tmp_path / "shards" / "1.tar", [(f"{long}.PNG", picture(2)[1])])
    indexed(tmp_path / "shards", export, tmp_path / "index")
    home = tmp_path / "shards"
    assert keys_of(tmp_path / "index") == [f"{home}/0.tar/a", f"{home}/0.tar/d/b", f"{home}/1.tar/{long}"]
    indexed(f"{home}/{{0..1}}.tar", export, tmp_path / "same")
    assert keys_of(tmp_path / "same") == keys_of(tmp_path / "index")


def test_a_folder_of_shards_and_pictures_is_ambiguous(tmp_path, export, pictures):
    shard(pictures / "0.tar", [("a.png", picture(0)[1])])
    with pytest.raises(DataError, match="expected images or shards, found both"):
        indexed(pictures, export, tmp_path / "index")


def test_pictures_that_cannot_be_read_are_left_out_and_named(tmp_path, export, pictures, caplog):
    (pictures / "a" / "05.png").write_bytes(b"no picture")
    (pictures / "b" / "zz.png").write_bytes(picture(1)[1][:40])
    indexed(pictures, export, tmp_path / "index")
    keys = keys_of(tmp_path / "index")
    assert len(keys) == 20 and not {str(pictures / "a" / "05.png"), str(pictures / "b" / "zz.png")} & set(keys)
    named = (tmp_path / "index" / "skipped.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in named[1:]] == [f"{pictures}/a/05.png", f"{pictures}/b/zz.png"]
    assert sum("left out" in record.message for record in caplog.records) == 2


def test_a_name_that_comes_twice_is_taken_once(tmp_path, export):
    shard(tmp_path / "0.tar", [("a.png", picture(0)[1]), ("b.png", picture(1)[1]), ("a.png", picture(2)[1])])
    indexed(tmp_path / "0.tar", export, tmp_path / "index")
    assert keys_of(tmp_path / "index") == [f"{tmp_path}/0.tar/a", f"{tmp_path}/0.tar/b"]


def test_a_source_that_is_mostly_broken_stops_the_run(tmp_path, export, monkeypatch):
    monkeypatch.setattr(indexing, "FEW", 2)
    for number in range(20):
        (tmp_path / f"{number:02}.png").write_bytes(picture(number)[1] if number % 2 else b"")
    with pytest.raises(DataError, match=r"4 of 8 records cannot be used .* At most 20%"):
        indexed(tmp_path, export, tmp_path / "index")


def test_nothing_to_read_is_an_error(tmp_path, export):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected images .* or shards .*, found none"):
        indexed(tmp_path / "empty", export, tmp_path / "index")
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of its 1 pictures can be read"):
        indexed(tmp_path / "empty", export, tmp_path / "index")


JOB = """
import os, signal, sys
from pathlib import Path
from clipress.serve import indexing
indexing.PART, indexing.BATCH = 8, 3
where, export, out, batches = sys.argv[1:]
embed, calls = indexing.ImageTower.__call__, 0
def counted(self, views):
    global calls
    calls += 1
    if calls > int(batches): os.kill(os.getpid(), signal.SIGKILL)
    return embed(self, views)
indexing.ImageTower.__call__ = counted
indexing.index_pictures(where, Path(export), Path(out), threads=1)
"""


def test_a_killed_run_goes_on_where_it_was_and_ends_as_one_that_was_not(tmp_path, export, pictures, monkeypatch):
    (pictures / "a" / "05.png").write_bytes(b"no picture")
    indexed(pictures, export, tmp_path / "whole")
    out = tmp_path / "killed"
    job = [sys.executable, "-c", JOB, pictures, export, out, "4"]
    assert subprocess.run(job, capture_output=True).returncode == -signal.SIGKILL
    assert len(list(out.rglob("*.npz"))) == 1 and not (out / "index.json").exists()  # 3 batches are a part, 1 is lost
    embedded = []
    embed = indexing.ImageTower.__call__
    monkeypatch.setattr(
        indexing.ImageTower, "__call__", lambda self, views: embedded.append(len(views)) or embed(self, views)
    )
    indexed(pictures, export, out)
    assert sum(embedded) == 20 - 7  # one of the 8 in the kept part is no picture
    assert content(out) == content(tmp_path / "whole")


def stop_after_the_parts(monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    return monkeypatch.setattr(indexing, "write_index", stopped)


def test_a_part_whose_pictures_changed_or_that_is_damaged_is_made_anew(tmp_path, export, pictures, monkeypatch):
    out = tmp_path / "index"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after_the_parts(patched)
        indexed(pictures, export, out)
    parts = sorted(out.rglob("*.npz"))
    assert len(parts) == 3
    parts[0].write_bytes(parts[0].read_bytes()[:-100])
    flipped = bytearray(parts[1].read_bytes())
    flipped[200] ^= 1
    parts[1].write_bytes(flipped)
    last = sorted(pictures.rglob("*.png"))[-1]
    last.write_bytes(picture(77)[1] + b" ")
    indexed(pictures, export, out)
    indexed(pictures, export, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_a_stopped_rebuild_leaves_the_old_index(tmp_path, export, pictures, monkeypatch):
    indexed(pictures / "a", export, tmp_path / "index")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after_the_parts(patched)
        indexed(pictures, export, tmp_path / "index")
    assert len(open_index(tmp_path / "index")) == 10
    indexed(pictures, export, tmp_path / "index")
    assert len(open_index(tmp_path / "index")) == 20


def test_pictures_are_added_and_those_that_were_there_replaced(tmp_path, export, pictures):
    out = tmp_path / "index"
    indexed(pictures / "a", export, out)
    changed = pictures / "a" / "00.png"
    changed.write_bytes(picture(50)[1])
    (pictures / "a" / "new.png").write_bytes(picture(51)[1])
    indexed(pictures / "a", export, out, add=True)
    indexed(pictures / "b", export, out, add=True)
    assert len(open_index(out)) == 21
    tower = LoadedModel(export, threads=1)
    scores, keys = open_index(out).search(tower.encode_image([changed]), 1)
    assert keys == [[str(changed)]] and scores[0, 0] == pytest.approx(1, abs=1e-5)


def test_pictures_by_another_encoder_are_not_added(tmp_path, export, pictures):
    indexed(pictures, export, tmp_path / "index")
    describe(export, lineage_hash="another")
    with pytest.raises(ArtifactError, match="Embeddings of two encoders cannot be compared"):
        indexed(pictures, export, tmp_path / "index", add=True)


def test_a_folder_that_is_no_index_is_left_alone(tmp_path, export, pictures):
    with pytest.raises(ArtifactError, match=r"is no index\. Nothing was changed"):
        indexed(pictures, export, pictures)


def test_the_command_makes_adds_and_removes(tmp_path, export, pictures):
    out = tmp_path / "index"
    made = clipress("index", pictures / "a", "--model", export, "--out", out, "--threads", 1)
    assert made.exit_code == 0 and "Index of 10 images, 4 dimensions, flat" in made.output
    added = clipress("index", pictures / "b", "--model", export, "--out", out, "--add")
    assert added.exit_code == 0 and "Index of 20 images" in added.output
    removed = clipress("index", "--out", out, "--remove", pictures / "a" / "00.png")
    assert removed.exit_code == 0 and "Removed 1 entries, 19 left" in removed.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["IMAGES"], "Set exactly one of --run and --model"),
        (["--model", "x"], "IMAGES is required"),
        (["IMAGES", "--remove", "key"], "--remove takes no other option but --out"),
        (["IMAGES", "--model", "x", "--add", "--kind", "ivf"], "--add keeps the kind"),
        (["IMAGES", "--model", "x"], "no export.json"),
        (["IMAGES", "--run", "x"], "x is not a run folder: no such folder"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    found = clipress("index", *options, "--out", tmp_path / "index")
    assert found.exit_code == 2 and told in found.output and "Traceback" not in found.output
