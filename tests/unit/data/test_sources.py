"""Batches depend only on the seed and the step; readers return what was written."""

import json

import numpy as np
import open_clip
import pytest
from PIL import Image

from clipress.data.dataset import TrainingSet
from clipress.data.formats.embedded import Arrays
from clipress.data.sampler import Batches, Draw
from clipress.data.sources import FORMATS, open_source
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Augment, Preprocess, fitted, normalised, open_image
from clipress.errors import DataError, RecipeError


def test_every_source_gets_its_share_of_each_batch():
    batches = Batches([100, 40], [3, 1], batch=8, steps=5, seed=0)
    for batch in batches:
        assert [draw.source for draw in batch].count(0) == 6 and len(batch) == 8


def test_a_pass_over_a_source_takes_every_item_once():
    draws = [draw for batch in Batches([12], [1], batch=4, steps=6, seed=1) for draw in batch]
    first, second = draws[:12], draws[12:]
    assert sorted(d.index for d in first) == sorted(d.index for d in second) == list(range(12))
    assert [d.index for d in first] != [d.index for d in second]
    assert {d.epoch for d in first} == {0} and {d.epoch for d in second} == {1}


def test_starting_late_gives_the_same_batches():
    whole = list(Batches([50, 7], [2, 1], batch=6, steps=20, seed=3))
    assert list(Batches([50, 7], [2, 1], batch=6, steps=20, seed=3, start=13)) == whole[13:]


def test_two_processes_together_see_the_batch_of_one_process():
    whole = Batches([50], [1], batch=6, steps=4, seed=3)
    parts = [list(Batches([50], [1], batch=6, steps=4, seed=3, rank=r, world=2)) for r in range(2)]
    for step, batch in enumerate(whole):
        together = [draw for pair in zip(parts[0][step], parts[1][step], strict=True) for draw in pair]
        assert together == batch


def test_items_do_not_depend_on_earlier_draws():
    source = open_source(SourceSpec(format="digits", split="test"))

    def make():
        return TrainingSet([source], Preprocess(size=32), lambda texts: np.ones((len(texts), 4)), Augment(shift=2), 5)

    draws = [Draw(0, i, 0) for i in range(6)]
    together, alone = make().__getitems__(draws), make().__getitems__(draws[4:5])
    np.testing.assert_array_equal(together["pixels"][4], alone["pixels"][0])
    again = make().__getitems__([Draw(0, 4, 1)])
    assert not np.array_equal(alone["pixels"], again["pixels"])  # Another epoch has other augmentations.


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (32, 32), (333, 32), (31, 77)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_pixels_equal_open_clips(size, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    preprocess = Preprocess(size=32, resize_mode=mode)
    reference = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=32, resize_mode=mode, interpolation="bicubic"), is_train=False
    )
    found = normalised(fitted(image, preprocess), preprocess)
    np.testing.assert_allclose(found, reference(image).numpy(), atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"this is text", b"\xff\xd8\xff\xe0 half a JPEG"])
def test_a_file_that_is_not_an_image_is_reported(tmp_path, content):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"image\.jpg is not a readable image"):
        open_image(path)


def test_an_image_with_too_many_pixels_is_refused_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (200, 100)).save(tmp_path / "big.png")
    monkeypatch.setattr("clipress.data.transforms.MAX_PIXELS", 10_000)
    with pytest.raises(DataError, match="200 x 100 pixels"):
        open_image(tmp_path / "big.png")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(folder / "red.jpg")
    Image.new("L", (30, 30), 99).save(folder / "sub" / "grey.png")
    Image.new("RGBA", (30, 40), (0, 0, 255, 128)).save(folder / "blue.webp")
    return folder


def test_conceptual_captions_files_keep_quotes_and_na(tmp_path, images):
    table = tmp_path / "cc.csv"
    rows = [
        '"quoted" start\tred.jpg',
        "NA\tsub/grey.png",
        'an "inner" one\tblue.webp',
        "gone\tnowhere.jpg",
        "too\tmany\tcells",
    ]
    table.write_text("title\tfilepath\n" + "\n".join(rows * 1) + "\n" + "\n".join(rows[:3] * 3) + "\n")
    source = open_source(SourceSpec(format="csv", annotations=table, images=images))
    assert [source.captions(i)[0] for i in range(3)] == ['"quoted" start', "NA", 'an "inner" one']
    assert [len(source.captions(i)) for i in range(len(source))] == [4, 4, 4] and source.skipped == 2
    assert source.image(1).mode == "RGB"


def test_karpathy_rows_of_one_image_are_gathered(tmp_path, images):
    rows = [
        {"image": "red.jpg", "caption": "a red one", "image_id": "x_1"},
        {"image": "blue.webp", "caption": ["blue", "also blue"]},
        {"image": "red.jpg", "caption": "still red", "image_id": "x_1"},
    ]
    path = tmp_path / "coco_karpathy_train.json"
    path.write_text(json.dumps(rows))
    source = open_source(SourceSpec(format="karpathy", annotations=path, images=images))
    assert [tuple(source.captions(i)) for i in range(2)] == [("a red one", "still red"), ("blue", "also blue")]
    assert source.group(0) != source.group(1)


def test_paths_that_leave_the_images_folder_are_not_followed(tmp_path, images):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    rows = [{"image": "red.jpg", "caption": "ok"}] * 1 + [{"image": "../secret.png", "caption": "not ok"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"1 of 2 records cannot be used.*is outside"):
        open_source(SourceSpec(format="karpathy", annotations=path, images=images))


def test_numeric_class_folders_are_labels_not_strings(tmp_path):
    for name in ("0", "2", "10"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    (tmp_path / "classnames.txt").write_text("\n".join(f"thing {i}" for i in range(11)))
    source = open_source(SourceSpec(format="folder", images=tmp_path))
    labels = {source.paths[i].split("/")[0]: source.group(i) for i in range(len(source))}
    assert labels == {"0": 0, "2": 2, "10": 10}
    assert source.captions(0)[0].startswith("a photo of a thing")


def test_a_format_that_is_registered_elsewhere_can_be_opened():
    def read(spec):
        return Arrays(
            "blank", "0", np.zeros((spec.limit, 4, 4, 3), np.uint8), (("a",),) * spec.limit, np.arange(spec.limit)
        )

    with FORMATS.registered("blank", read):
        assert len(open_source(SourceSpec(format="blank", limit=3))) == 3


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"format": "sceens"}, RecipeError, "unknown data format 'sceens'. Did you mean 'scenes'"),
        ({"format": "csv"}, DataError, "requires the key 'annotations'"),
        ({"format": "csv", "annotations": "nowhere.csv"}, DataError, "no such file: nowhere.csv"),
        ({"format": "folder", "images": "nowhere"}, DataError, "no such folder: nowhere"),
    ],
)
def test_a_source_that_cannot_be_opened_is_reported(spec, error, message):
    with pytest.raises(error, match=message):
        open_source(SourceSpec(**spec))


def test_texts_alone_are_refused_with_the_reason(tmp_path):
    (tmp_path / "captions.tsv").write_text("a dog\na cat\n")
    texts = open_source(SourceSpec(format="captions", annotations=tmp_path / "captions.tsv"))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    images = open_source(SourceSpec(format="images", images=tmp_path / "images"))
    size, some = Preprocess(size=8), lambda found: np.ones((len(found), 4))
    with pytest.raises(DataError, match="some sources have images only and others texts only"):
        TrainingSet([images, texts], size, some, Augment(), 0)
    for sources, number in (([texts], 0), ([images, texts], 1)):
        with pytest.raises(DataError, match=rf"data\.train\.{number}: expected images, .* this model does not read"):
            TrainingSet(sources, size, None, Augment(), 0)
