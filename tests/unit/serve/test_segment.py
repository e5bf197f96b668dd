"""Segmentation from exported files: the class of every pixel, and overlays of it."""

import io

import numpy as np
import pytest
from PIL import Image
from small_exports import LABELS, PIXEL_WEIGHT, SIZE, normalised_by_hand, write_classifier, write_segmenter

from clipress.errors import ArtifactError, DataError, ExportError
from clipress.serve.classify import LoadedModel
from clipress.serve.segment import ROW, color_of, drawn_mask, shares_of


@pytest.fixture
def segmenter(tmp_path):
    return LoadedModel(write_segmenter(tmp_path / "segmenter"), threads=1)


def image_of(height, width):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_image_of_the_model_s_size_has_the_classes_of_its_pixels(segmenter):
    pixels = image_of(SIZE, SIZE)
    expected = (normalised_by_hand(pixels).reshape(3, -1).T @ PIXEL_WEIGHT.T).argmax(1).reshape(SIZE, SIZE)
    (mask,) = segmenter.segment(pixels)
    np.testing.assert_array_equal(mask, expected)
    assert segmenter.segments and segmenter.labels == LABELS


def test_masks_have_the_sizes_of_their_images(segmenter):
    shapes = [(5, 9), (SIZE, SIZE), (30, 3)]
    masks = segmenter.segment([image_of(*shape) for shape in shapes])
    assert [mask.shape for mask in masks] == shapes


def test_a_file_and_its_pixels_have_one_mask(segmenter):
    pixels, file = image_of(6, 8), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    np.testing.assert_array_equal(segmenter.segment(file.getvalue())[0], segmenter.segment(pixels)[0])


def test_what_cannot_be_segmented_is_refused(segmenter, tmp_path):
    with pytest.raises(DataError, match="not a readable image"):
        segmenter.segment(b"no image")
    with pytest.raises(ExportError, match="expected a Segmenter, found a model that classifies images"):
        LoadedModel(write_classifier(tmp_path / "classifier")).segment(image_of(2, 2))
    with pytest.raises(
        ExportError, match="expected a graph 'image' that gives embeddings, found a model that finds its labels"
    ):
        segmenter.encode_image(image_of(2, 2))
    with pytest.raises(
        ExportError, match="expected a graph 'image' that gives embeddings, found a model that finds its labels"
    ):
        segmenter.classify(image_of(2, 2), ["cat"])


def test_scores_that_are_not_finite_are_refused(segmenter):
    class Broken:
        def run(self, names, inputs):
            return [np.full((len(inputs["pixel_values"]), 4, 2, 2), np.nan, np.float32)]

    segmenter.sessions = {"image": Broken()}
    with pytest.raises(ArtifactError, match="1 of 1 image scores are not finite"):
        segmenter.segment(image_of(2, 2))


def test_an_overlay_has_the_colors_of_its_classes_and_a_legend_of_those_alone():
    mask = np.zeros((40, 60), int)
    mask[:, 30:] = 2
    page = np.asarray(drawn_mask(Image.new("RGB", (60, 40), "white"), mask, LABELS))
    assert shares_of(mask, LABELS) == {"cat": 0.5, "red fox": 0.5}
    for column, number in ((5, 0), (50, 2)):
        np.testing.assert_allclose(page[20, column], 0.6 * np.asarray(color_of(number)) + 0.4 * 255, atol=1)
    legend = {tuple(int(value) for value in pixel) for pixel in page[40:].reshape(-1, 3)}
    assert {color_of(0), color_of(2)} <= legend and not {color_of(1), color_of(3)} & legend
    assert page.shape[0] == 40 + 4 + 2 * ROW


def test_neighbouring_classes_have_colors_that_differ():
    colors = np.asarray([color_of(number) for number in range(150)], int)
    assert len({tuple(color) for color in colors.tolist()}) == 150
    assert np.abs(np.diff(colors, axis=0)).sum(1).min() > 100
