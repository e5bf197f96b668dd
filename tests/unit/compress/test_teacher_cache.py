"""Building teacher caches: they hold the teacher's embeddings, and builds can be killed, shared and repeated."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import SourceAround, clipress, write_recipe
from PIL import Image

from clipress.artifact import save_artifact
from clipress.compress import teacher_cache
from clipress.compress.teacher_cache import build_cache, check_cache, manifest_of, write_shards
from clipress.data.dataset import TrainingSet
from clipress.data.eval_sets import EvalSet
from clipress.data.sampler import Draw
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.data.teacher_cache import TeacherCache, read_manifest
from clipress.data.transforms import Augment, View, normalised, viewed
from clipress.errors import ArtifactError, ClipressError, DataError, RecipeError
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks.clip import encoders

BOTH = Augment(shift=1, crop_scale=(0.5, 1))


@pytest.fixture(scope="module")
def model():
    return new_model(tiny_architecture(layers=1), 0)


@pytest.fixture(scope="module")
def digits():
    return open_source(SourceSpec(format="digits", limit=40))


def say(_):
    pass


def in_small_shards(model, source, home, rank=0, world=1, workers=0):
    """Embed with 8 items per shard; returns the folder."""
    manifest = manifest_of(model, source, BOTH, 2, "hash", "fp16", "auto").model_copy(update={"items_per_shard": 8})
    return write_shards(model, source, manifest, home, say, range(rank, manifest.shards, world), rank, workers, batch=6)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Counted(SourceAround):
    """A source that records which images were read."""

    def __init__(self, source):
        super().__init__(source)
        self.reads = []

    def image(self, index):
        self.reads.append(index)
        return self.source.image(index)


def test_looked_up_embeddings_are_those_of_the_teachers_on_the_same_batch(model, digits, tmp_path):
    """Two sources, two teachers with embeddings of different widths."""
    sources = [digits, open_source(SourceSpec(format="scenes", limit=30))]
    teachers = [model, new_model(tiny_architecture(layers=1, embed_dim=48), 1)]
    caches = [
        [
            build_cache(t, source, BOTH, 3, tmp_path, teacher_hash=str(t.architecture["embed_dim"]), say=say)
            for t in teachers
        ]
        for source in sources
    ]
    data = TrainingSet(sources, model.preprocess, model.tokenize(), BOTH, 0, caches)
    arrays = data.__getitems__([Draw(n % 2, n, epoch) for epoch in range(2) for n in range(30)])
    pixels, ids = torch.from_numpy(normalised(arrays["pixels"], model.preprocess)), torch.from_numpy(arrays["ids"])
    for number, teacher in enumerate(teachers):
        with torch.no_grad():
            raw = {"image": teacher.module.encode_image(pixels), "text": teacher.module.encode_text(ids)}
        for tower, expected in raw.items():
            unit, norm = arrays[f"teacher_{tower}_{number}"], arrays[f"teacher_{tower}_norm_{number}"]
            np.testing.assert_allclose(unit, torch.nn.functional.normalize(expected, dim=-1), atol=5e-4)
            np.testing.assert_allclose(norm, expected.norm(dim=-1), rtol=1e-4)


def test_one_view_without_augmentation_is_the_evaluation_view(model, digits, tmp_path):
    cache = build_cache(model, digits, Augment(), 1, tmp_path, teacher_hash="hash", say=say)
    (pixels,) = EvalSet(digits, None).pixel_batches(model.preprocess)
    np.testing.assert_allclose(cache.images(range(40)), encoders(model, "Test")[0](pixels), atol=5e-4)
    assert cache.manifest.logit_scale == pytest.approx(1 / 0.07)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from clipress.compress.teacher_cache import manifest_of, write_shards
from clipress.data import cache_files
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Augment, normalised
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture

whole = cache_files.write_whole

def write_whole(target, fill):
    def half(aside):
        np.save(aside / "image.npy", np.zeros(3))
        os.kill(os.getpid(), signal.SIGKILL)
    whole(target, half if target.name == "00002" else fill)

cache_files.write_whole = write_whole
clip, source = new_model(tiny_architecture(layers=1), 0), open_source(SourceSpec(format="digits", limit=40))
manifest = manifest_of(clip, source, Augment(shift=1, crop_scale=(0.5, 1)), 2, "hash", "fp16", "auto")
manifest = manifest.model_copy(update={"items_per_shard": 8})
write_shards(clip, source, manifest, Path(sys.argv[1]), lambda _: None, range(manifest.shards), batch=6)
"""


def test_a_killed_build_resumes_and_writes_the_same_bytes(model, digits, tmp_path):
    whole = in_small_shards(model, digits, tmp_path / "whole")
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "killed"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = tmp_path / "killed" / whole.name
    assert sorted(path.name for path in left.iterdir() if path.name[0] != ".") == ["00000", "00001", "manifest.json"]
    with pytest.raises(ArtifactError, match="3 of 5 shards are missing, the first is 00002"):
        TeacherCache.open(left)
    counted = Counted(digits)
    in_small_shards(model, counted, tmp_path / "killed")
    assert sorted(counted.reads) == list(range(16, 40))  # only the missing shards
    assert {name: data for name, data in content(left).items() if name[0] != "."} == content(whole)


def test_leftovers_of_killed_builds_are_removed_when_the_cache_is_complete(model, digits, tmp_path):
    folder = build_cache(model, digits, Augment(), 1, tmp_path, teacher_hash="hash", say=say).folder
    (folder / ".manifest.json.1.tmp").write_text("half")
    (folder / ".00000.1.tmp").mkdir()
    (folder / ".00000.1.tmp" / "image.npy").write_text("half")
    build_cache(model, digits, Augment(), 1, tmp_path, teacher_hash="hash", say=say)
    assert not list(folder.glob(".*.tmp"))


def test_only_a_truncated_shard_is_built_again(model, digits, tmp_path):
    folder = in_small_shards(model, digits, tmp_path)
    before, path = content(folder), folder / "00003" / "text.npy"
    path.write_bytes(path.read_bytes()[:-1])
    counted = Counted(digits)
    assert in_small_shards(model, counted, tmp_path) == folder
    assert sorted(counted.reads) == list(range(24, 32)) and content(folder) == before


def test_two_processes_side_by_side_write_what_one_writes(model, digits, tmp_path):
    alone = in_small_shards(model, digits, tmp_path / "alone")
    sources = [Counted(digits), Counted(digits)]
    for rank, source in enumerate(sources):
        together = in_small_shards(model, source, tmp_path / "together", rank=rank, world=2)
    assert content(together) == content(alone)
    assert not set(sources[0].reads) & set(sources[1].reads)
    TeacherCache.open(together, verify=True)


def test_decoding_in_workers_changes_nothing(model, digits, tmp_path):
    here = in_small_shards(model, digits, tmp_path / "here")
    assert content(in_small_shards(model, digits, tmp_path / "there", workers=2)) == content(here)


def test_a_second_build_computes_nothing_and_reports_it(model, digits, tmp_path):
    messages = []
    arguments = {"teacher_hash": "hash", "say": messages.append}
    folder = build_cache(model, digits, BOTH, 2, tmp_path, **arguments).folder
    (folder / ".00000.1.tmp").mkdir()
    counted = Counted(digits)
    build_cache(model, counted, BOTH, 2, tmp_path, **arguments)
    assert not counted.reads and "using the cached embeddings of teacher" in messages[-1]
    assert not (folder / ".00000.1.tmp").exists()


@pytest.mark.parametrize(
    "other",
    [
        {"teacher_hash": "another"},
        {"dtype": "bf16"},
        {"precision": "bf16"},
        {"augment": Augment(shift=2)},
        {"views": 1},
        {"source": SourceSpec(format="digits", limit=39)},
        {"model": tiny_architecture(embed_dim=16)},
    ],
)
def test_everything_that_affects_the_content_changes_the_folder(model, digits, other):
    same = {"model": model, "source": digits, "augment": BOTH, "views": 2, "teacher_hash": "h", "dtype": "fp16"}
    same |= {"precision": "fp32"}
    make = {"source": open_source, "model": lambda architecture: new_model(architecture, 0)}
    other = {key: make.get(key, lambda value: value)(value) for key, value in other.items()}
    assert manifest_of(**same).key == manifest_of(**same).key != manifest_of(**(same | other)).key


@pytest.fixture
def images(tmp_path):
    """Ten images of which the fourth is broken, each with two captions."""
    folder = tmp_path / "images"
    for number in range(10):
        (folder / f"{number}").mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}" / "a.png")
    (folder / "3" / "a.png").write_bytes(b"no image")
    (folder / "classnames.txt").write_text("\n".join(f"thing {n}" for n in range(10)))
    return open_source(SourceSpec(format="folder", images=folder, templates=("a {}", "the {}")))


def test_an_unreadable_image_is_counted_and_the_other_rows_do_not_shift(model, images, tmp_path):
    messages = []
    cache = build_cache(model, images, BOTH, 2, tmp_path, teacher_hash="hash", say=messages.append)
    assert [item for item in range(10) if not cache.ok(item)] == [3] and cache.failed == 1
    assert "1 images could not be read" in messages[-1] and "a.png is not a readable image" in messages[-1]
    check_cache(cache, model, images)
    data = TrainingSet([images], model.preprocess, model.tokenize(), BOTH, 0, [[cache]])
    arrays = data.__getitems__([Draw(0, item, epoch) for item in range(10) for epoch in range(3)])
    expected = encoders(model, "Test")[0](normalised(arrays["pixels"], model.preprocess))
    np.testing.assert_allclose(arrays["teacher_image_0"], expected, atol=5e-4)


def test_an_item_whose_captions_cannot_be_read_has_no_texts_and_is_replaced_in_training(model, digits, tmp_path):
    class Torn(Counted):
        def captions(self, index):
            if index == 3:
                raise DataError("caption 3 is not in UTF-8")
            return self.source.captions(index)

    source = Torn(digits)
    cache = build_cache(model, source, BOTH, 1, tmp_path, teacher_hash="hash", say=say)
    check_cache(cache, model, source, 40)
    data = TrainingSet([source], model.preprocess, model.tokenize(), BOTH, 0, [[cache]])
    arrays = data.__getitems__([Draw(0, item, 0) for item in range(5)])
    assert [bad.reason for bad in arrays["bad"]] == ["caption 3 is not in UTF-8"]
    expected = encoders(model, "Test")[1](arrays["ids"])
    np.testing.assert_allclose(arrays["teacher_text_0"], expected, atol=5e-4)


def test_too_many_unreadable_images_stop_the_build(model, images, tmp_path):
    for number in (1, 2):
        (tmp_path / "images" / str(number) / "a.png").unlink()
    with pytest.raises(DataError, match=r"3 of 10 records cannot be used \(for example, .*At most 20%"):
        build_cache(model, images, BOTH, 2, tmp_path, teacher_hash="hash", say=say)


def test_repeated_texts_are_encoded_once(model, digits, tmp_path):
    cache = build_cache(model, digits, BOTH, 1, tmp_path, teacher_hash="hash", say=say)
    captions = [caption for item in range(len(digits)) for caption in digits.captions(item)]
    shard = cache.shards[0]
    assert shard.texts == len(set(captions)) < shard.captions == len(captions)
    expected = encoders(model, "Test")[1](model.tokenize()(captions))
    np.testing.assert_allclose(cache.texts(range(len(captions))), expected, atol=5e-4)


def test_changed_images_or_another_teacher_are_detected_with_a_few_samples(model, images, tmp_path):
    cache = build_cache(model, images, BOTH, 2, tmp_path, teacher_hash="hash", say=say)
    with pytest.raises(
        ArtifactError, match=r"cosine 1 between the teacher.s output for the pixels of item \d+ .*, found"
    ):
        check_cache(cache, new_model(tiny_architecture(layers=1), 9), images)
    for number in range(10):
        Image.new("RGB", (50, 40)).save(tmp_path / "images" / str(number) / "a.png")
    with pytest.raises(ArtifactError, match="pixels of item"):
        check_cache(cache, model, images)


def noise(number):
    return np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def save(path, number, time=1000):
    """Save an image as if at a time in seconds; all have one size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(number)).save(path, compress_level=0)
    os.utime(path, (time, time))


@pytest.fixture
def twelve(tmp_path, monkeypatch):
    """Twelve images in shards of six: a function that returns their cache, what was read for it and what was said."""
    described = teacher_cache.manifest_of
    small = {"items_per_shard": 6}
    monkeypatch.setattr(teacher_cache, "manifest_of", lambda *given: described(*given).model_copy(update=small))
    for number in range(12):
        save(tmp_path / "twelve" / f"{number:02}.png", number)

    def build(model, check="stat", folder="twelve"):
        counted, said = Counted(open_source(SourceSpec(format="images", images=tmp_path / folder))), []
        arguments = {"teacher_hash": "hash", "say": said.append, "check": check}
        cache = build_cache(model, counted, Augment(), 1, tmp_path / "home", **arguments)
        return cache, sorted(counted.reads), said[0]

    return build


def of_now(model, folder):
    """Embed the images of a folder without a cache."""
    pixels = [viewed(Image.open(path).convert("RGB"), model.preprocess, View()) for path in sorted(folder.iterdir())]
    return encoders(model, "Test")[0](normalised(np.stack(pixels), model.preprocess))


@pytest.mark.parametrize(
    ("check", "time", "noticed"), [("stat", 2000, True), ("content", 1000, True), ("stat", 1000, False)]
)
def test_the_shard_of_a_replaced_image_is_embedded_again(model, twelve, tmp_path, check, time, noticed):
    """By the time of its file, or by its content."""
    twelve(model, check)
    save(tmp_path / "twelve" / "05.png", 77, time)
    cache, read, said = twelve(model, check)
    assert read == ([0, 1, 2, 3, 4, 5] if noticed else [])
    assert ("images: 1 of 12 images changed since teacher hash embedded them, the first is item 5" in said) == noticed
    is_right = np.abs(cache.images(range(12)) - of_now(model, tmp_path / "twelve")).max(1) < 5e-4
    assert is_right.tolist() == [item != 5 or noticed for item in range(12)]
    cache, read, said = twelve(model, check)
    assert not read and "using the cached embeddings" in said
    TeacherCache.open(cache.folder, verify=True)


@pytest.mark.parametrize(("check", "read"), [("stat", list(range(12))), ("content", [])])
def test_a_touched_image_is_embedded_again_unless_contents_are_compared(model, twelve, tmp_path, check, read):
    twelve(model, check)
    for path in (tmp_path / "twelve").iterdir():
        os.utime(path, (2000, 2000))
    assert twelve(model, check)[1] == read


@pytest.mark.parametrize(("check", "count"), [("stat", 12), ("content", 0)])
def test_a_copy_of_the_images_without_their_times_has_the_same_cache(model, twelve, tmp_path, check, count):
    first, _, _ = twelve(model, check)
    shutil.copytree(tmp_path / "twelve", tmp_path / "copy", copy_function=shutil.copyfile)
    second, read, _ = twelve(model, check, "copy")
    assert second.folder == first.folder and len(read) == count
    np.testing.assert_array_equal(second.images(range(12)), first.images(range(12)))


def test_an_image_that_could_be_read_only_later_is_embedded_then(model, twelve, tmp_path):
    (tmp_path / "twelve" / "09.png").write_bytes(b"no image")
    assert not twelve(model)[0].ok(9)
    save(tmp_path / "twelve" / "09.png", 9)
    cache, read, _ = twelve(model)
    assert cache.ok(9) and read == [6, 7, 8, 9, 10, 11]


def test_embeddings_that_are_not_finite_are_reported_and_not_saved(digits, tmp_path):
    broken = new_model(tiny_architecture(layers=1), 0)
    broken.module.visual.proj.data.fill_(float("nan"))
    with pytest.raises(
        ClipressError, match="digits: expected finite embeddings from teacher hash, found some that are not finite"
    ):
        build_cache(broken, digits, Augment(), 1, tmp_path, teacher_hash="hash", say=say)
    assert not list(tmp_path.glob("*/0*"))


def test_many_views_of_images_that_are_not_augmented_are_rejected(model, digits, tmp_path):
    with pytest.raises(RecipeError, match=r"3 views of digits, found an empty 'data\.augment'"):
        build_cache(model, digits, Augment(), 3, tmp_path, teacher_hash="hash", say=say)


@pytest.fixture
def with_artifact(recipe, model, tmp_path):
    """The tiny recipe, with an artifact as the teacher."""
    artifact = artifact_from_model(model, ({"stage": "start", "hash": "0123"},), {})
    recipe["teacher"] = {"artifact": str(save_artifact(artifact, tmp_path / "teacher"))}
    recipe["data"]["train"] = [{"format": "digits", "limit": 12}, {"format": "scenes", "limit": 12}]
    return recipe


def test_the_command_embeds_every_training_source_once(with_artifact, tmp_path):
    with_artifact["teacher"]["cache"] = {"views": 2, "dtype": "bf16", "check": "content"}
    path, home = write_recipe(with_artifact, tmp_path), tmp_path / "home"
    first = clipress("embed", path, "--out", home)
    assert first.exit_code == 0, first.output
    caches = [TeacherCache.open(folder, verify=True) for folder in home.iterdir()]
    assert {cache.manifest.source for cache in caches} == {"digits", "scenes"}
    manifests = [cache.manifest for cache in caches]
    assert {(m.views, m.dtype, m.check, m.teacher) for m in manifests} == {(2, "bf16", "content", "0123")}
    assert clipress("embed", path, "--out", home).output.count("using the cached embeddings of teacher") == 2
    again = clipress("embed", path, "--out", home, "--views", 3, "--dtype", "fp16")
    assert "3 view(s)" in again.output and len(list(home.iterdir())) == 4


def test_the_command_uses_the_teachers_it_is_given_and_the_users_cache(with_artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPRESS_CACHE", str(tmp_path / "cache"))
    other = new_model(tiny_architecture(layers=1, embed_dim=16), 3)
    save_artifact(artifact_from_model(other, ({"stage": "start", "hash": "4567"},), {}), tmp_path / "other")
    path = write_recipe(with_artifact, tmp_path)
    done = clipress("embed", path, "--teacher", tmp_path / "teacher", "--teacher", tmp_path / "other")
    assert done.exit_code == 0, done.output
    folders = (tmp_path / "cache" / "teacher-embeddings").iterdir()
    dims = sorted((cache.manifest.teacher, cache.manifest.dim) for cache in map(TeacherCache.open, folders))
    assert dims == [("0123", 32), ("0123", 32), ("4567", 16), ("4567", 16)]


def test_a_recipe_without_a_teacher_is_reported(recipe, tmp_path):
    recipe["student"] = recipe.pop("teacher")["recipe"]["student"]
    done = clipress("embed", write_recipe(recipe, tmp_path))
    assert done.exit_code == 2 and "has no 'teacher' to embed with" in done.output


def test_a_teacher_is_known_by_the_hash_that_a_run_gives_it(recipe, tmp_path):
    """Otherwise a run would not find the command's cache."""
    from clipress.artifact import read_header
    from clipress.compress.pipeline import compress
    from clipress.recipe import Recipe
    from clipress.workflow.compress import EmbedOptions, embed
    from clipress.workflow.plan import plan_from

    recipe["teacher"]["recipe"]["stages"][0]["distill"]["steps"] = 1
    recipe |= {"stages": []}
    recipe["data"] = {"train": recipe["data"]["train"]}
    read = Recipe(**recipe)
    (folder,) = compress(plan_from(read), tmp_path / "run", say)
    made = embed(read, EmbedOptions(tmp_path / "caches"), say)
    assert {read_manifest(cache).teacher for cache in made} == {read_header(folder)["lineage"][-1]["hash"]}


@pytest.mark.parametrize("side", ["image", "text"])
def test_images_or_texts_alone_are_embedded_and_looked_up(model, tmp_path, side):
    spec = {
        "image": {"format": "images", "images": tmp_path},
        "text": {"format": "captions", "annotations": tmp_path / "c.tsv"},
    }
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "c.tsv").write_text("".join(f"image number {n}\thttp://x/{n}\n" for n in range(10)))
    source = open_source(SourceSpec(**spec[side]))
    cache = build_cache(model, source, Augment(shift=1), 2, tmp_path / "home", teacher_hash="t", say=say)
    check_cache(cache, model, source)
    found = TrainingSet([source], model.preprocess, model.tokenize(), Augment(shift=1), 0, [[cache]])
    arrays = found.__getitems__([Draw(0, index, 0) for index in range(10)])
    other = {"image": "text", "text": "image"}[side]
    assert f"teacher_{other}_0" not in arrays and {"image": "ids", "text": "pixels"}[side] not in arrays
    with torch.no_grad():
        raw = (
            model.module.encode_image(torch.from_numpy(normalised(arrays["pixels"], model.preprocess)))
            if side == "image"
            else model.module.encode_text(torch.from_numpy(arrays["ids"]))
        ).numpy()
    np.testing.assert_allclose(arrays[f"teacher_{side}_0"] * arrays[f"teacher_{side}_norm_0"][:, None], raw, atol=2e-3)
