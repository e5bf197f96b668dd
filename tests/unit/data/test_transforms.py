"""Image augmentations, and faster implementations with the same pixels."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from clipress.data.transforms import (
    FORMATS,
    Augment,
    Preprocess,
    View,
    drawn_view,
    normalised,
    open_image,
    resized,
    size_from_header,
    viewed,
)
from clipress.errors import DataError


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_image("flower.jpg"))  # 640 x 427


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_torch_resize_is_within_one_level_of_pillow(photo, mode, interpolation):
    preprocess = Preprocess(size=96, resize_mode=mode, interpolation=interpolation)
    exact, fast = (resized(photo, preprocess, library).astype(int) for library in ("pillow", "torch"))
    assert exact.shape == fast.shape == (96, 96, 3) and abs(exact - fast).max() <= 1 and exact.std() > 10


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (224, 0.9), (64, 0.95), (384, 1.0)])
@pytest.mark.parametrize("shape", [(640, 427), (300, 500), (224, 224)])
def test_the_margin_is_cropped_as_timm_does(photo, size, crop_pct, shape):
    from timm.data import create_transform

    image = photo.resize(shape)
    theirs = create_transform(size, interpolation="bicubic", crop_pct=crop_pct, normalize=False)
    wanted = np.asarray(theirs(image)).transpose(1, 2, 0)
    found = resized(image, Preprocess(size=size, crop_pct=crop_pct))
    np.testing.assert_array_equal(found, wanted)


def test_a_cropped_view_is_the_same_with_either_library(photo):
    view, preprocess = View(box=(100, 50, 400, 300), shift=(2, -1)), Preprocess(size=64)
    exact, fast = (viewed(photo, preprocess, view, library).astype(int) for library in ("pillow", "torch"))
    assert abs(exact - fast).max() <= 1


def test_a_crop_equals_torchvisions_for_the_same_box(photo):
    from torchvision.transforms.functional import InterpolationMode, resized_crop

    left, top, right, bottom = 100, 50, 400, 300
    wanted = resized_crop(photo, top, left, bottom - top, right - left, [64, 64], InterpolationMode.BICUBIC)
    found = viewed(photo, Preprocess(size=64), View(box=(left, top, right, bottom)))
    np.testing.assert_array_equal(found, np.asarray(wanted))


def test_a_flipped_view_is_the_mirror_image(photo):
    preprocess = Preprocess(size=32)
    plain, mirrored = (viewed(photo, preprocess, View(shift=(1, 2), flip=flip)) for flip in (False, True))
    np.testing.assert_array_equal(mirrored, np.flip(plain, axis=1))


def test_half_of_the_images_are_flipped_if_enabled():
    def flips(augment):
        return [drawn_view((32, 32), augment, np.random.default_rng(seed)).flip for seed in range(400)]

    assert 160 < sum(flips(Augment(flip=True))) < 240 and not any(flips(Augment(shift=1)))


def test_normalising_per_channel_is_bitwise_equal_to_all_at_once():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    preprocess = Preprocess(size=5)
    mean, std = np.asarray(preprocess.mean, np.float32), np.asarray(preprocess.std, np.float32)
    wanted = np.moveaxis((pixels.astype(np.float32) / np.float32(255) - mean) / std, -1, -3)
    np.testing.assert_array_equal(normalised(pixels, preprocess), wanted)
    np.testing.assert_array_equal(normalised(pixels[0], preprocess), wanted[0])


def test_a_format_that_starts_another_program_is_not_opened():
    script = io.BytesIO()
    Image.new("RGB", (8, 8)).save(script, "EPS")
    with pytest.raises(DataError, match="not a readable image"):
        open_image(script.getvalue())


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_grey_tiff_files_of_8_and_16_bits_have_the_pixels_that_were_written(tmp_path, kind):
    grey = (np.arange(48).reshape(6, 8) * (5 if kind is np.uint8 else 1300)).astype(kind)
    Image.fromarray(grey).save(tmp_path / "grey.tiff")
    wanted = grey if kind is np.uint8 else (grey >> 8).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "grey.tiff")), np.repeat(wanted[..., None], 3, -1))


@pytest.mark.parametrize(("kind", "found"), [(np.int32, "32-bit or signed integer"), (np.float32, "floating-point")])
def test_pixels_of_unknown_range_are_refused_by_name(tmp_path, kind, found):
    Image.fromarray(np.linspace(0, 200, 48).reshape(6, 8).astype(kind)).save(tmp_path / "deep.tiff")
    for read in (open_image, size_from_header):
        with pytest.raises(DataError, match=rf"deep\.tiff: expected pixels of 8 or 16 bits.*found {found}"):
            read(tmp_path / "deep.tiff")


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow was built without AVIF")
def test_an_avif_file_is_read_as_pillow_reads_it(tmp_path):
    Image.fromarray(load_sample_image("flower.jpg")).resize((64, 48)).save(tmp_path / "flower.avif")
    wanted = np.asarray(Image.open(tmp_path / "flower.avif").convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "flower.avif")), wanted)
    assert size_from_header(tmp_path / "flower.avif") == (64, 48)
