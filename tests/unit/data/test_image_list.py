"""Images of every mode are decoded correctly, and undecodable files raise a DataError."""

import io
import random
import zlib

import numpy as np
import pytest
from PIL import Image

from clipress.data.transforms import open_image
from clipress.errors import DataError

RAMP = np.linspace(0, 65_535, 20 * 24).astype(np.uint16).reshape(20, 24)


def encoded(image, form, **settings):
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def read(image, form, **settings):
    return np.asarray(open_image(encoded(image, form, **settings)))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_levels(form):
    found = read(Image.fromarray(RAMP), form)
    np.testing.assert_array_equal(found, np.repeat((RAMP // 256).astype(np.uint8)[..., None], 3, axis=-1))


def test_cmyk_keeps_its_colours():
    found = read(Image.new("RGB", (16, 16), (200, 60, 20)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(found.astype(int) - (200, 60, 20)).max() <= 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_other_modes_are_converted_by_pillow(mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 7, 4), dtype=np.uint8)).convert("RGB").convert(mode)
    found = read(image, "PNG")
    assert found.shape == (9, 7, 3)
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
)
def test_exif_orientation_is_applied(orientation, turned):
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read(Image.fromarray(pixels), "PNG", exif=exif), turned(pixels))


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation_is_used(form):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    found = read(first, form, save_all=True, append_images=[second])
    assert found.reshape(-1, 3).mean(0)[0] > 240 > 20 > found.reshape(-1, 3).mean(0)[2]


def test_the_format_is_detected_from_the_content(tmp_path):
    (tmp_path / "really.jpg").write_bytes(encoded(Image.new("RGB", (5, 4), "red"), "PNG"))
    assert open_image(tmp_path / "really.jpg").size == (5, 4)


def test_a_decompression_bomb_is_refused(tmp_path):
    small = encoded(Image.new("1", (8, 8)), "PNG")
    size = (40_000).to_bytes(4, "big")  # The header claims 1.6 billion pixels.
    header = b"IHDR" + size + size + small[24:29]
    bomb = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
    with pytest.raises(DataError):
        open_image(bomb)


@pytest.mark.parametrize(
    ("form", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGB"), ("WEBP", "RGB")]
)
def test_damaged_bytes_give_an_image_or_a_data_error(form, mode):
    rng = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(pixels).convert(mode), form)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.5 else whole)
        for _ in range(rng.randrange(4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert open_image(bytes(damaged)).mode == "RGB"
        except DataError:
            refused += 1
    assert refused > 10
