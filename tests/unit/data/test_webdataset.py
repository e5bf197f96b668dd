"""Shards are grouped into records as in open_clip, with random access."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipress.data.formats import webdataset
from clipress.data.formats.webdataset import expanded, index_of, shard_paths
from clipress.data.sources import num_captions, open_source
from clipress.data.spec import SourceSpec
from clipress.errors import DataError


def encoded(colour, form="PNG", size=(10, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


def tar(path, members, form=tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def pairs(start, count):
    """Return tar members as img2dataset writes them."""
    for i in range(start, start + count):
        key = f"{i // 100:05}{i % 100:04}"
        meta = {"caption": f"image {i}", "url": f"http://x.org/{i}", "key": key, "status": "success"}
        yield f"{key}.jpg", encoded((i * 10, 0, 0), "JPEG")
        yield f"{key}.json", json.dumps(meta).encode()
        yield f"{key}.txt", meta["caption"].encode()


def opened(shards, **more):
    open_source.cache_clear()
    return open_source(SourceSpec(format="webdataset", shards=str(shards), **more))


def test_shards_written_as_img2dataset_does_are_read_in_any_order(tmp_path):
    for shard in range(3):
        tar(tmp_path / f"{shard:05}.tar", pairs(shard * 4, 4))
    source = opened(tmp_path / "{00000..00002}.tar")
    assert len(source) == 12 and source.has_images and source.has_texts
    for index in (11, 0, 5, 4, 3, 0):
        assert source.captions(index) == (f"image {index}",)
        assert abs(source.image(index).getpixel((4, 4))[0] - index * 10) <= 3
        assert source.group(index) == index


def test_captions_are_counted_without_reading_them(tmp_path, monkeypatch):
    path = tar(tmp_path / "s.tar", [*pairs(0, 4), ("gap.png", encoded("red")), ("gap.txt", b" ")])
    monkeypatch.setattr(webdataset, "bytes_at", None)  # nothing is read from the shard
    assert num_captions(SourceSpec(format="webdataset", shards=str(path))) == 5


ODD = [
    ("a.txt", b"the text first"),
    ("a.JPG", encoded("red", "JPEG")),
    ("b.png", encoded("blue")),
    ("b.txt", b"blue"),
    ("only_text.txt", b"no image"),
    ("only_image.jpg", encoded("red", "JPEG")),
    ("c.seg.png", encoded("red")),
    ("c.txt", b"its suffix is seg.png, which is no image"),
    ("__meta__/sheet.png", encoded("red")),
    ("__meta__/sheet.txt", b"not data"),
    ("noending", b"not data"),
    (".hidden.jpg", b"not data"),
    ("in/a.folder/d.webp", encoded("lime", "WEBP")),
    ("in/a.folder/d.txt", "grün".encode()),
    ("e.png", encoded("white")),
    ("e.jpg", encoded("black", "JPEG")),
    ("e.txt", b"jpg comes before png"),
    ("b.jpg", encoded("red", "JPEG")),
    ("b.txt", b"b again, another record"),
    ("f.txt", b""),
    ("f.jpg", encoded("red", "JPEG")),
]


def test_records_match_the_webdataset_library(tmp_path, monkeypatch):
    wds = pytest.importorskip("webdataset")
    monkeypatch.setattr(webdataset, "report_skipped", lambda *_: None)  # Half of these records are odd on purpose.
    path = tar(tmp_path / "odd.tar", ODD)
    with path.open("rb") as stream:
        members = [dict(part, __url__="odd.tar") for part in wds.tariterators.tar_file_iterator(stream)]
    wanted = []
    for sample in wds.tariterators.group_by_keys(
        members
    ):  # open_clip uses filter_no_caption_or_no_image and rename(image="jpg;png;jpeg;webp", text="txt")
        image = next((sample[suffix] for suffix in ("jpg", "png", "jpeg", "webp") if suffix in sample), None)
        if image is not None and sample.get("txt"):
            wanted.append((Image.open(io.BytesIO(image)).convert("RGB").tobytes(), sample["txt"].decode()))
    source = opened(path)
    assert [(source.image(i).tobytes(), source.captions(i)[0]) for i in range(len(source))] == wanted
    assert len(wanted) == 5


def test_a_repeated_suffix_starts_another_record(tmp_path):
    members = [("a.png", encoded("red")), ("a.txt", b"one"), ("a.txt", b"two"), ("a.png", encoded("blue"))]
    source = opened(tar(tmp_path / "s.tar", members))
    assert [source.captions(i)[0] for i in range(2)] == ["one", "two"]
    assert [source.image(i).getpixel((0, 0)) for i in range(2)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names_are_read(tmp_path, form):
    folder = "ordner/" * 12  # 84 letters: ustar splits a longer path.
    long = "x" * (90 if form == tarfile.USTAR_FORMAT else 300)
    name = folder + long + ("" if form == tarfile.USTAR_FORMAT else "ü")
    path = tar(tmp_path / "a.tar", [(f"{name}.png", encoded("blue")), (f"{name}.txt", b"blue")], form)
    source = opened(path)
    assert source.captions(0) == ("blue",) and source.image(0).getpixel((0, 0)) == (0, 0, 255)


def test_labels_are_read_where_classes_are_named(tmp_path):
    members = [
        (f"{i}.{end}", content)
        for i, label in enumerate((b"2", b"0\n", b"2"))
        for end, content in (("png", encoded("red")), ("cls", label))
    ]
    path = tar(tmp_path / "a.tar", members)
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    source = opened(path, classes=names, templates=("a {c}", "one {}"))
    assert [source.group(i) for i in range(3)] == [2, 0, 2]
    assert source.captions(0) == ("a owl", "one owl") and source.classes.names == ("cat", "dog", "owl")
    names.write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"expected more than 2 class names, since that is a label .*; found 2"):
        opened(path, classes=names)
    with pytest.raises(DataError, match=r"expected an image and a caption \(txt\) in every record; 3 of 3 lack one"):
        opened(path)


def test_a_bad_record_is_reported_with_its_shard(tmp_path):
    members = [
        *pairs(0, 2),
        ("bad.jpg", b"\xff\xd8 nothing"),
        ("bad.txt", b"x"),
        ("gap.png", encoded("red")),
        ("gap.txt", b" "),
    ]
    source = opened(tar(tmp_path / "s.tar", members))
    with pytest.raises(DataError, match=r"s\.tar, bad\.jpg: .*not a readable image"):
        source.image(2)
    with pytest.raises(DataError, match=r"s\.tar, gap\.png: empty caption"):
        source.captions(3)


def test_complete_records_of_a_truncated_shard_are_used(tmp_path):
    path = tar(tmp_path / "s.tar", pairs(0, 6))
    with tarfile.open(path) as file:
        cut = file.getmember("000000005.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    source = opened(path)
    assert len(source) == 5 and source.captions(4) == ("image 4",)


def test_other_files_and_compressed_shards_are_reported(tmp_path):
    (tmp_path / "text.tar").write_text("this is no tar" * 100)
    with pytest.raises(DataError, match=r"text\.tar is not a readable tar"):
        opened(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as file:
        file.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match=r"z\.tar is not a readable tar.*[Cc]ompressed"):
        opened(tmp_path / "z.tar")


def test_a_shard_that_is_modified_while_it_is_read_is_reported(tmp_path):
    path = tar(tmp_path / "s.tar", pairs(0, 3))
    source = opened(path)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=r"s\.tar, which was modified after it was indexed"):
        source.image(1)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="shorter than when it was indexed"):
        source.captions(1)


def test_an_index_is_rebuilt_only_when_its_shard_changes(tmp_path, monkeypatch):
    built = []
    build_index = webdataset.build_index
    monkeypatch.setattr(webdataset, "build_index", lambda path, spec: built.append(path) or build_index(path, spec))
    path = tar(tmp_path / "s.tar", pairs(0, 3))
    first, second = index_of(path), index_of(path)
    assert len(built) == 1 and all(np.array_equal(first[key], second[key]) for key in first)
    tar(path, pairs(0, 4))
    assert len(index_of(path)["image"]) == 4 and len(built) == 2


def test_a_damaged_index_is_rebuilt(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPRESS_CACHE", str(tmp_path / "cache"))
    path = tar(tmp_path / "s.tar", pairs(0, 3))
    index_of(path)
    (kept,) = (tmp_path / "cache" / "shards").iterdir()
    for content in (b"", b"no archive", kept.read_bytes()[:100]):
        kept.write_bytes(content)
        assert len(index_of(path)["image"]) == 3


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLIPRESS_CACHE", str(tmp_path / "file"))
    assert len(index_of(tar(tmp_path / "s.tar", pairs(0, 3)))["image"]) == 3


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{00..1}-{x,y}.tar", ["00-x.tar", "00-y.tar", "01-x.tar", "01-y.tar"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, names):
    assert list(expanded(pattern)) == names
    braceexpand = pytest.importorskip("braceexpand")
    assert list(braceexpand.braceexpand(pattern)) == names


def test_several_patterns_and_a_folder_can_be_given(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "b/7.tar", "b/note.txt"):
        tar(tmp_path / name, pairs(0, 1))
    found = shard_paths(f"{tmp_path}/a/{{0..1}}.tar::{tmp_path}/b")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/0.tar", "a/1.tar", "b/7.tar"]


def test_missing_shards_are_counted(tmp_path):
    tar(tmp_path / "0.tar", pairs(0, 1))
    with pytest.raises(DataError, match=r"2 of 3 are missing, such as .*1\.tar"):
        shard_paths(f"{tmp_path}/{{0..2}}.tar")
    with pytest.raises(DataError, match="requires the key 'shards'"):
        open_source(SourceSpec(format="webdataset"))


def test_limit_and_fingerprint(tmp_path):
    path = tar(tmp_path / "s.tar", pairs(0, 5))
    assert len(opened(path, limit=2)) == 2
    first = opened(path).fingerprint
    assert opened(path).fingerprint == first != opened(path, limit=2).fingerprint
    tar(path, [*pairs(0, 5), *pairs(5, 1)])
    assert opened(path).fingerprint != first


def test_workers_do_not_change_the_batches(tmp_path):
    from torch.utils.data import DataLoader

    for shard in range(2):
        tar(tmp_path / f"{shard}.tar", pairs(shard * 4, 4))
    source = opened(tmp_path / "{0..1}.tar")

    class Items:
        def __getitem__(self, index):
            return source.captions(index)[0], np.asarray(source.image(index)).tobytes()

        def __len__(self):
            return len(source)

    read = [list(DataLoader(Items(), batch_size=3, collate_fn=list, num_workers=workers)) for workers in (0, 2)]
    assert read[0] == read[1] and sum(map(len, read[0])) == 8


def with_json(captions, suffix="json", image="jpg"):
    for number, caption in enumerate(captions):
        yield f"{number}.{image}", encoded((number * 10, 0, 0), "JPEG")
        yield f"{number}.{suffix}", json.dumps({"url": "x", **({} if caption is None else {"said": caption})}).encode()


@pytest.mark.parametrize(("suffix", "suffixes"), [("json", ()), ("meta.json", ("meta.json",))])
def test_captions_are_read_from_a_key_of_the_json_files(tmp_path, suffix, suffixes):
    path = tar(tmp_path / "s.tar", with_json(["one", ["two", "zwei"], None, " ", "grün"], suffix))
    source = opened(path, caption_key="said", caption_suffixes=suffixes)
    assert [source.captions(i) for i in range(len(source))] == [("one",), ("two", "zwei"), ("grün",)]
    spec = SourceSpec(format="webdataset", shards=str(path), caption_key="said", caption_suffixes=suffixes)
    assert num_captions(spec) == 4
    with pytest.raises(DataError, match=r"5 of 5 lack one\. Set .*'caption_key'"):
        opened(path, caption_key="caption", caption_suffixes=suffixes)


def test_suffixes_can_be_named(tmp_path):
    path = tar(tmp_path / "s.tar", [("a.Photo", encoded("red")), ("a.text", "größe".encode("latin-1"))])
    with pytest.raises(DataError, match=r"1 of 1 lack one\. Set 'image_suffixes', 'caption_suffixes'"):
        opened(path)
    named = {"image_suffixes": ("photo",), "caption_suffixes": ("text",)}
    with pytest.raises(DataError, match=r"a\.Photo: expected text in utf-8"):
        opened(path, **named).captions(0)
    assert opened(path, **named, encoding="latin-1").captions(0) == ("größe",)


def test_records_without_a_caption_are_left_out_however_many(tmp_path, caplog):
    path = tar(tmp_path / "s.tar", [*pairs(0, 2), *((f"gap{n}.png", encoded("red")) for n in range(8))])
    assert len(opened(path)) == 2 and "left out 8 of 10 records without an image or a caption (txt)" in caplog.text
