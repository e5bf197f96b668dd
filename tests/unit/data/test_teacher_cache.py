"""Teacher caches: rows and views are read as written, and damage is reported."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from clipress.data.cache_files import (
    CacheSettings,
    Manifest,
    Rows,
    row_from_view,
    view_from_row,
    write_manifest,
    write_shard,
)
from clipress.data.dataset import TrainingSet
from clipress.data.sampler import Draw
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.data.teacher_cache import TeacherCache
from clipress.data.transforms import Augment, Preprocess, View, drawn_view, fitted, size_of, viewed
from clipress.errors import ArtifactError, ClipressError, DataError, RecipeError
from clipress.recipe import checked

SIZE = Preprocess(size=32)


def augmented_in_one_go(image, preprocess, augment, rng):
    """Reference: draw and apply the augmentation at once."""
    if augment.crop_scale is not None:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        box = boxed(image.size, augment.crop_scale, rng)
        pixels = np.asarray(image.crop(box).resize((preprocess.size,) * 2, Image.Resampling.BICUBIC), np.uint8)
    else:
        pixels = fitted(image, preprocess)
    if augment.shift:
        reach = augment.shift
        down, right = rng.integers(0, 2 * reach + 1, size=2)
        padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        pixels = padded[down : down + preprocess.size, right : right + preprocess.size]
    return pixels


def boxed(size, scale, rng):
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return left, top, left + short, top + short


AUGMENTS = [Augment(), Augment(shift=3), Augment(crop_scale=(0.3, 1)), Augment(shift=2, crop_scale=(0.9, 1))]


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize(
    "size", [(32, 32), (41, 57), (200, 20)]
)  # (height, width); the last is too elongated for any crop.
@pytest.mark.parametrize("form", [np.asarray, Image.fromarray])
def test_a_drawn_view_gives_the_pixels_of_the_reference(augment, size, form):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for seed in range(20):
        old, new = np.random.default_rng(seed), np.random.default_rng(seed)
        wanted = augmented_in_one_go(image, SIZE, augment, old)
        drawn = drawn_view(size_of(form(image)), augment, new)
        np.testing.assert_array_equal(viewed(form(image), SIZE, drawn), wanted)
        assert old.bit_generator.state == new.bit_generator.state
        view = drawn_view(size[::-1], augment, np.random.default_rng(seed))
        again = view_from_row(np.asarray(row_from_view(view), np.int32))
        np.testing.assert_array_equal(viewed(form(image), SIZE, again), wanted)


def make(home, dtype="fp16", items=11, views=2, dim=8, per_shard=4, source=None, failed=(), **other):
    """Write a cache of random embeddings; return its folder and the embeddings in double precision."""
    known = {"teacher": "t", "logit_scale": 14.3, "preprocess": SIZE, "tokenizer": {"name": "clip-bpe"}}
    known |= {"augment": Augment(shift=2), "fingerprint": "f", "source": "s", "precision": "fp32", "made_with": {}}
    if source is not None:
        known |= {"source": source.name, "fingerprint": source.fingerprint}
        items = len(source)
    known |= {"items": items, "views": views, "dim": dim, "dtype": dtype, "items_per_shard": per_shard} | other
    manifest = Manifest(**known)
    rng = np.random.default_rng(7)
    folder = write_manifest(home, manifest)
    image, text, seen = [], [], []
    for shard in range(manifest.shards):
        part = manifest.items_of(shard)
        each = [len(source.captions(i)) if source else 1 + i % 3 for i in part]
        captions = rng.integers(0, 5, sum(each))  # Several captions share a text.
        shape = (len(part), manifest.views)
        views_of = [View((1, 2, 20, 22) if (i + k) % 2 else None, (i % 3, -k)) for i in part for k in range(shape[1])]
        raw = (5 * rng.standard_normal((n, dim)).astype(np.float32) for n in (shape[0] * shape[1], 5))
        ok = np.asarray([i not in failed for i in part])
        offsets = np.cumsum([0, *each])
        views_of_rows = np.asarray(list(map(row_from_view, views_of)), np.int32)
        rows = Rows(*raw, captions, offsets, views_of_rows, ok, np.zeros((len(part), 2), np.int64))
        write_shard(folder, shard, manifest, rows)
        image.append(rows.image * np.repeat(ok, manifest.views)[:, None])
        text.append(rows.text[captions])
        seen += views_of
    put = SimpleNamespace(image=np.concatenate(image), text=np.concatenate(text), views=seen)
    return folder, put


def unit(raw):
    raw = raw.astype(np.float64)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_rows_are_read_as_written_to_the_precision_of_the_dtype(tmp_path, dtype, stored):
    folder, put = make(tmp_path, dtype)
    cache = TeacherCache.open(folder, verify=True)
    rows = np.random.default_rng(0).integers(0, len(put.image), 40)
    captions = np.random.default_rng(1).integers(0, len(put.text), 40)
    for found, norms, raw in (
        (cache.images(rows), cache.image_norms(rows), put.image[rows]),
        (cache.texts(captions), cache.text_norms(captions), put.text[captions]),
    ):
        assert found.dtype == norms.dtype == np.float32
        rounded = torch.from_numpy(unit(raw)).float().to(stored).double().numpy()
        ulp = torch.finfo(stored).eps
        np.testing.assert_allclose(found, rounded, rtol=ulp)  # float32 may round by one unit in the last place.
        assert np.mean(found == rounded) > 0.99
        np.testing.assert_allclose(found * norms[:, None], raw, rtol=ulp, atol=1e-6)


def test_items_find_their_rows_across_shards(tmp_path):
    folder, put = make(tmp_path, items=11, views=2)
    cache = TeacherCache.open(folder)
    first = np.cumsum([0] + [1 + i % 3 for i in range(11)])
    for item in range(11):
        assert [cache.image_row(item, k) for k in (0, 1)] == [2 * item, 2 * item + 1]
        assert cache.text_row(item, 0) == first[item]
        assert [cache.view(item, k) for k in (0, 1)] == put.views[2 * item : 2 * item + 2]


def test_an_image_that_could_not_be_read_keeps_its_row(tmp_path):
    folder, put = make(tmp_path, failed={5})
    cache = TeacherCache.open(folder)
    assert [cache.ok(item) for item in range(11)] == [item != 5 for item in range(11)] and cache.failed == 1
    assert not cache.images([10, 11]).any() and not cache.image_norms([10, 11]).any()
    np.testing.assert_allclose(cache.images([9, 12]), unit(put.image[[9, 12]]), atol=1e-3)


def test_another_process_reads_the_same_rows(tmp_path):
    cache = TeacherCache.open(make(tmp_path)[0])
    cache.images([1])
    sent = pickle.dumps(cache)
    assert len(sent) < 4000  # Arrays are not pickled.
    np.testing.assert_array_equal(pickle.loads(sent).texts([3, 7]), cache.texts([3, 7]))


@pytest.mark.parametrize("verify", [False, True])
def test_no_file_stays_mapped_after_the_checks_of_opening(tmp_path, verify):
    folder, _ = make(tmp_path)
    cache = TeacherCache.open(folder, verify)
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    cache.images([1])
    assert str(folder) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("rows", [[-1], [22], [0, 99]])
def test_rows_out_of_range_are_refused(tmp_path, rows):
    with pytest.raises(IndexError, match="expected 0 to 21, found"):
        TeacherCache.open(make(tmp_path)[0]).images(rows)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 0.0])
def test_invalid_embeddings_are_not_stored(tmp_path, poison):
    manifest = TeacherCache.open(make(tmp_path)[0]).manifest
    rows = Rows(
        np.ones((8, 8), np.float32), np.ones((1, 8), np.float32), np.zeros(4, int), np.arange(5), np.zeros((8, 7)),
        np.ones(4, bool), np.zeros((4, 2), int),
    )  # fmt: skip
    rows.image[3] = poison
    with pytest.raises(ClipressError, match="not finite, or zero"):
        write_shard(tmp_path / "new", 0, manifest, rows)
    assert not (tmp_path / "new").exists()


def changed_array(name, change):
    def damage(folder):
        path = folder / "00001" / f"{name}.npy"
        array = np.load(path)
        change(array)
        np.save(path, array)

    return damage


def changed_manifest(**keys):
    def damage(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return damage


def truncated(folder):
    path = folder / "00001" / "image.npy"
    path.write_bytes(path.read_bytes()[:-5])


def removed(folder):
    (folder / "00002").rename(folder / "elsewhere")


DAMAGE = {
    r"1 of 3 shards are missing, the first is 00002.*clipress embed": removed,
    r"shard 00001: image\.npy: expected \d+ bytes, found \d+\. Remove .*00001": truncated,
    r"image\.npy: expected norm 1 in row 3, found nan": changed_array("image", lambda a: a[3].fill(np.nan)),
    r"image\.npy: expected norm 1 in row 2, found 1\.\d+": changed_array(
        "image", lambda a: np.multiply(a[2], 1.1, a[2])
    ),
    r"text\.npy: expected norm 1 in row 4, found 0": changed_array("text", lambda a: a[4].fill(0)),
    r"describes cache \w+, but its folder is \w+: one of them was changed": changed_manifest(teacher="another"),
    r"schema_version 7; this version of clipress reads 2": changed_manifest(schema_version=7),
    r"is damaged: views: ": changed_manifest(views="many"),
    r"unreadable shard\.json": lambda folder: (folder / "00001" / "shard.json").write_text("{"),
    r"not readable JSON": lambda folder: (folder / "manifest.json").write_text("[1"),
    r"it has no manifest\.json": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_reported_when_a_cache_is_opened(tmp_path, message):
    folder, _ = make(tmp_path)
    TeacherCache.open(folder)
    DAMAGE[message](folder)
    with pytest.raises(ArtifactError, match=message):
        TeacherCache.open(folder)


def test_checksums_find_damage_that_norms_do_not_show(tmp_path):
    folder, _ = make(tmp_path)
    changed_array("image", lambda array: np.negative(array, array))(folder)
    TeacherCache.open(folder)
    with pytest.raises(ArtifactError, match=r"image\.npy: expected a sha256 that starts with"):
        TeacherCache.open(folder, verify=True)


@pytest.fixture
def digits():
    return open_source(SourceSpec(format="digits", limit=30))


def training_set(source, caches, augment=Augment(shift=2), size=32):  # noqa: B008 (frozen)
    return TrainingSet([source], Preprocess(size=size), lambda t: np.ones((len(t), 4)), augment, 5, [caches])


def test_cached_rows_depend_only_on_seed_epoch_and_index(tmp_path, digits):
    cache = TeacherCache.open(make(tmp_path, source=digits, failed={3, 4})[0])
    draws = [Draw(0, index, epoch) for epoch in range(3) for index in range(8)]
    together = training_set(digits, [cache]).__getitems__(draws)
    alone = [training_set(digits, [cache]).__getitems__([draw]) for draw in reversed(draws)][::-1]
    assert set(together) > {"teacher_image_0", "teacher_text_0", "teacher_image_norm_0", "teacher_text_norm_0"}
    for name, array in together.items():
        np.testing.assert_array_equal(array, np.concatenate([one[name] for one in alone]))
    assert len(np.unique(together["teacher_image_0"], axis=0)) > 8  # Other epochs see other views.


def test_another_item_replaces_an_image_that_could_not_be_read(tmp_path, digits):
    cache = TeacherCache.open(make(tmp_path, source=digits, failed={3, 4})[0])
    found = training_set(digits, [cache]).__getitems__([Draw(0, 3, epoch) for epoch in range(20)])
    np.testing.assert_allclose(np.linalg.norm(found["teacher_image_0"], axis=1), 1, atol=1e-2)
    shown = {image.tobytes() for image in found["pixels"]}
    assert len(shown) > 5  # The replacement varies.


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"fingerprint": "another"}, "expected content of the source .*, found another"),
        ({"augment": Augment()}, r"expected augmentation shift=2.*, found shift=0"),
    ],
)
def test_a_cache_of_other_data_is_refused(tmp_path, digits, other, message):
    cache = TeacherCache.open(make(tmp_path, source=digits, **other)[0])
    with pytest.raises(DataError, match=message):
        training_set(digits, [cache])


def test_teachers_with_different_views_are_refused(tmp_path, digits):
    first, second, third = (
        TeacherCache.open(make(tmp_path, source=digits, **other)[0])
        for other in ({}, {"teacher": "u"}, {"teacher": "v", "views": 3})
    )
    training_set(digits, [first, second])
    with pytest.raises(
        DataError, match=f"do not fit digits: expected views {first.views_hash}, found {third.views_hash}"
    ):
        training_set(digits, [first, third])


def test_a_shift_in_pixels_requires_one_image_size(tmp_path, digits):
    cache = TeacherCache.open(make(tmp_path, source=digits)[0])
    with pytest.raises(DataError, match=r"'augment\.shift' is in pixels"):
        training_set(digits, [cache], size=48)


def test_a_source_without_any_readable_image_is_refused(tmp_path, digits):
    cache = TeacherCache.open(make(tmp_path, source=digits, failed=set(range(30)))[0])
    with pytest.raises(DataError, match="no image of digits could be read"):
        training_set(digits, [cache])


def test_settings_are_checked():
    assert checked(CacheSettings, {}, "teacher.cache") == CacheSettings(views=1, dtype="fp16")
    with pytest.raises(RecipeError, match=r"teacher\.cache\.views"):
        checked(CacheSettings, {"views": 0}, "teacher.cache")
