"""Masks: ADE20K as it is unpacked, the embedded shapes, and the views that training shows."""

import numpy as np
import pytest
from PIL import Image

from clipress.data import scenes
from clipress.data.dataset import TrainingSet
from clipress.data.sampler import Draw
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Augment, Preprocess
from clipress.errors import ClipressError, DataError


def write(folder, masks, split="validation"):
    for number, values in enumerate(masks):
        height, width = values.shape
        for kind, image in (
            ("images", Image.new("RGB", (width, height), "red")),
            ("annotations", Image.fromarray(values)),
        ):
            path = folder / kind / split / f"ADE_{number}.{'jpg' if kind == 'images' else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def opened(folder, **more):
    open_source.cache_clear()
    return open_source(SourceSpec(format="ade20k", images=folder, **{"split": "test", **more}))


def test_unlabelled_pixels_do_not_count_and_classes_begin_at_one(tmp_path):
    values = np.asarray([[0, 1, 150], [13, 0, 2]], np.uint8)
    write(tmp_path, [values])
    source = opened(tmp_path)
    np.testing.assert_array_equal(source.mask(0), [[255, 0, 149], [12, 255, 1]])
    assert source.image(0).size == (3, 2) and len(source.classes.names) == 150
    assert [source.classes.names[place] for place in (0, 12, 149)] == ["wall", "person", "flag"]


def test_the_splits_are_its_folders(tmp_path):
    for split, count in (("training", 3), ("validation", 2)):
        write(tmp_path, [np.ones((2, 2), np.uint8)] * count, split)
    assert [len(opened(tmp_path, split=split)) for split in ("train", "val", "test")] == [3, 2, 2]


def test_other_classes_in_its_layout_are_named_by_a_file(tmp_path):
    write(tmp_path, [np.asarray([[1, 2]], np.uint8)])
    (tmp_path / "names.txt").write_text("sky\nsea\n")
    source = opened(tmp_path, classes=tmp_path / "names.txt")
    assert list(source.classes.names) == ["sky", "sea"] and source.mask(0).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: Image.new("L", (5, 4)).save(path),
            "expected a mask of 3 x 2 pixels, as its image has, found \\(5, 4\\)",
        ),
        (lambda path: Image.new("L", (3, 2), 151).save(path), "expected values up to 150, found 151"),
        (lambda path: path.write_bytes(b"no image"), "is not a readable mask"),
        (lambda path: path.unlink(), "is not a readable mask"),
    ],
    ids=["size", "value", "bytes", "missing"],
)
def test_a_mask_that_does_not_fit_is_named(tmp_path, change, message):
    write(tmp_path, [np.ones((2, 3), np.uint8)])
    path = tmp_path / "annotations" / "validation" / "ADE_0.png"
    source = opened(tmp_path)
    change(path)
    with pytest.raises(DataError, match=message) as failed:
        source.mask(0)
    assert path.name in str(failed.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_fits_its_image_upright_and_no_pixel_is_decoded_for_it(tmp_path, orientation):
    upright, turned = ((2, 3), (3, 2)) if orientation > 4 else ((3, 2), (2, 3))  # (width, height)
    write(tmp_path, [np.ones(upright[::-1], np.uint8)])
    path, exif = tmp_path / "images" / "validation" / "ADE_0.jpg", Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (3, 2)).save(path, exif=exif)
    source = opened(tmp_path)
    assert source.image(0).size == upright and source.mask(0).shape == upright[::-1]
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"\xff\xda")])  # up to its pixels
    with pytest.raises(DataError, match="not a readable image"):
        source.image(0)
    assert source.mask(0).shape == upright[::-1]
    Image.new("L", turned, 1).save(tmp_path / "annotations" / "validation" / "ADE_0.png")
    with pytest.raises(DataError, match=f"expected a mask of {upright[0]} x {upright[1]} pixels"):
        source.mask(0)


def test_a_folder_without_masks_is_refused(tmp_path):
    (tmp_path / "images" / "validation").mkdir(parents=True)
    with pytest.raises(ClipressError, match="annotations"):
        opened(tmp_path)


def test_shapes_are_where_they_were_drawn():
    source = open_source(SourceSpec(format="shapes", split="val", limit=200))
    assert source.has_masks and not source.has_texts and source.classes.names == scenes.MASK_CLASSES
    for index, scene in enumerate(scenes.scenes(0)["val"][:200]):
        pixels, mask = source.image(index).astype(int), source.mask(index)
        assert {scenes.MASK_CLASSES[number] for number in np.unique(mask)} == {
            "background",
            *(one[0] for one in scene.objects),
        }
        background = np.asarray(scenes.BACKGROUNDS[scene.background])
        inside = mask != 0
        # What is labelled has a color of its own; only pixels of an edge mix two of them.
        differs = np.abs(pixels - background).max(-1) > 60
        assert (differs == inside).mean() > 0.9


@pytest.mark.parametrize(
    "augment", [Augment(crop_scale=(0.3, 1.0), shift=3, flip=True), Augment(zoom=(0.5, 2.0), flip=True)]
)
def test_a_mask_is_shown_as_its_image_is(augment):
    """Images whose pixels say their label stay so in every view, whatever is cropped, moved, mirrored or zoomed."""

    class Source:
        name, fingerprint, has_images, has_texts, has_masks, classes = "s", "0", True, False, True, None

        def __len__(self):
            return 4

        def image(self, index):
            return Image.fromarray(np.repeat(self.mask(index)[..., None] * 50, 3, 2))

        def mask(self, index):
            return np.kron(np.random.default_rng(index).integers(0, 5, (4, 5)), np.ones((16, 16))).astype(np.uint8)

        def captions(self, index):
            return ()

        def group(self, index):
            return index

    preprocess = Preprocess(size=32, interpolation="bilinear")
    found = TrainingSet([Source()], preprocess, None, augment, seed=0)
    arrays = found.__getitems__([Draw(0, step % 4, step) for step in range(24)])
    assert arrays["mask"].shape == (24, 32, 32) and arrays["mask"].dtype == np.uint8
    labelled = arrays["mask"] != 255
    near = np.abs(arrays["pixels"][..., 0].astype(int) - arrays["mask"].astype(int) * 50) < 25
    assert near[labelled].mean() > 0.85
    assert labelled.mean() > (0.8 if augment.zoom is None else 0.5)
    outside = arrays["pixels"][~labelled]
    assert (augment.zoom is None) == (len(outside) == 0)
    assert (np.abs(outside - 255 * np.asarray(preprocess.mean)) < 25).sum() >= 0.8 * outside.size  # the mean color


def test_a_window_that_one_class_fills_is_drawn_again():
    class Source:
        name, fingerprint, has_images, has_texts, has_masks, classes = "s", "0", True, False, True, None

        def __len__(self):
            return 1

        def image(self, index):
            return Image.new("RGB", (64, 64))

        def mask(self, index):
            labels = np.zeros((64, 64), np.uint8)
            labels[40:, 40:] = 1  # most windows of twice the size have none of it
            return labels

        def captions(self, index):
            return ()

        def group(self, index):
            return index

    found = TrainingSet([Source()], Preprocess(size=32), None, Augment(zoom=(2.0, 2.0)), seed=0)
    masks = found.__getitems__([Draw(0, 0, step) for step in range(200)])["mask"]
    varied = [0.25 < (mask == 1).mean() < 0.75 for mask in masks]
    assert np.mean(varied) > 0.5  # a single draw: a seventh of them
