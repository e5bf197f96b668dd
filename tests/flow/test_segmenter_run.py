"""A Segmenter goes through every stage to an export, a table, a Triton repository and overlays of its masks."""

import json

import numpy as np
import pytest
from helpers import clipress
from PIL import Image
from small_run import STAGES, recipe_of, run_of

import clipress as api
from clipress.artifact import read_header
from clipress.data.scenes import MASK_CLASSES
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.metrics.windows import segmented
from clipress.serve.segment import shares_of
from clipress.tasks import model_from_artifact, runs_of

STUDENT = {
    "width": 32, "layers": 2, "heads": 2, "patch_size": 4, "image_size": 32, "decoder_layers": 1,
    "labels": [*MASK_CLASSES],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(recipe_of("segmentation", "shapes", STUDENT, 12), tmp_path_factory.mktemp("segmenter"))[0]


@pytest.fixture(scope="module")
def images():
    source = open_source(SourceSpec(format="shapes", split="test", limit=3))
    return [source.image(number) for number in range(3)]


def test_both_towers_are_cut_and_measured(run):
    dense, pruned = (read_header(run / stage) for stage in ("teacher", "pruned"))
    assert 0.4 <= pruned["counts"]["block_params"] / dense["counts"]["block_params"] <= 0.5
    rows = json.loads((run / "bench" / "results.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == STAGES
    assert all({"shapes/miou", "shapes/pixel_accuracy"} <= row["accuracy"].keys() for row in rows)


def test_the_export_finds_what_the_artifact_finds_in_torch(run, images):
    artifact = model_from_artifact(run / "recovered")
    run_image = runs_of(artifact)["image"]
    for image, mask in zip(images, api.load(run / "recovered").segment(images), strict=True):
        wanted = segmented(
            Image.fromarray(image), lambda pixels: run_image({"pixel_values": pixels})["scores"], artifact.preprocess
        )
        assert (mask == wanted).mean() > 0.999


def test_predict_writes_an_overlay_of_every_image(run, images, tmp_path):
    paths = [tmp_path / "first" / "a.png", tmp_path / "other" / "a.png", tmp_path / "wide.png"]
    for path, image in zip(paths, [*images[:2], np.concatenate(images, 1)], strict=True):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    found = clipress("predict", run, *paths, "--stage", "int8", "--out", tmp_path / "masks", "--json")
    assert found.exit_code == 0, found.output
    lines = [json.loads(line) for line in found.output.splitlines() if line.startswith("{")]
    assert [line["overlay"] for line in lines] == [
        str(tmp_path / "masks" / name) for name in ("a.png", "a-2.png", "wide.png")
    ]
    masks = api.load(run / "int8").segment([np.asarray(Image.open(path)) for path in paths])
    for line, mask in zip(lines, masks, strict=True):
        assert line["shares"] == pytest.approx(shares_of(mask, MASK_CLASSES), abs=1e-5)
        with Image.open(line["overlay"]) as overlay:
            assert overlay.height > mask.shape[0] and overlay.width >= mask.shape[1]
    plain = clipress("predict", run, paths[0], "--out", tmp_path / "masks")
    assert "-> " in plain.output and "a.png" in plain.output


def test_labels_are_the_segmenter_s_own(run, tmp_path):
    found = clipress("predict", run, tmp_path / "x.png", "--labels", "circle,square")
    assert found.exit_code == 2 and "A Segmenter has its own labels" in found.output
