"""A classifier goes through every stage to an export, a table and a prediction, as a CLIP does."""

import json

import numpy as np
import pytest
from helpers import clipress
from small_run import STAGES, recipe_of, run_of

import clipress as api
from clipress.artifact import read_header
from clipress.compress.sparsify import is_two_of_four
from clipress.data.digits import CLASSES
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.tasks import model_from_artifact

STUDENT = {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32, "labels": [*CLASSES]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run, result = run_of(recipe_of("classification", "digits", STUDENT, 40), tmp_path_factory.mktemp("classifier"))
    (command,) = (line for line in result.output.splitlines() if line.startswith("Try it: "))
    assert "--labels" not in command
    return run


def test_half_of_the_block_parameters_are_left(run):
    dense, pruned = (read_header(run / stage)["counts"]["block_params"] for stage in ("teacher", "pruned"))
    assert 0.4 <= pruned / dense <= 0.5


def test_two_of_four_weights_are_zero_after_training(run):
    header = read_header(run / "sparse")
    weights = dict(model_from_artifact(run / "sparse").module.named_parameters())
    assert header["sparsity"]["weights"] and all(
        is_two_of_four(weights[name]) for name in header["sparsity"]["weights"]
    )


def test_every_artifact_is_a_row_with_its_accuracy(run):
    rows = json.loads((run / "bench" / "results.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == STAGES
    assert all({"digits/top1", "digits/top5"} <= row["accuracy"].keys() for row in rows)
    assert {timing["tower"] for row in rows for timing in row["latency"]} == {"image"}


def test_the_export_predicts_what_the_artifact_computes_in_torch(run):
    source = open_source(SourceSpec(format="digits", split="test", limit=12))
    images = [source.image(i) for i in range(12)]
    model = api.load(run / "recovered")
    from clipress.data.transforms import fitted, normalised
    from clipress.metrics.classify import softmax
    from clipress.tasks import runs_of

    artifact = model_from_artifact(run / "recovered")
    pixels = normalised(np.stack([fitted(image, artifact.preprocess) for image in images]), artifact.preprocess)
    wanted = softmax(runs_of(artifact)["image"]({"pixel_values": pixels})["logits"])
    assert model.labels == CLASSES
    np.testing.assert_allclose(model.classify(images), wanted, atol=1e-5)


def test_predict_needs_no_labels_and_takes_some_of_them(run, tmp_path):
    images = clipress("data", "images", tmp_path, "--format", "digits", "--count", 1)
    assert images.exit_code == 0
    found = clipress("predict", run, tmp_path / "digits-000.png", "--json")
    shares = json.loads(found.output.splitlines()[-1])["probabilities"]
    assert tuple(shares) == CLASSES and sum(shares.values()) == pytest.approx(1, abs=1e-4)
    found = clipress("predict", run, tmp_path / "digits-000.png", "--labels", "zero,nine", "--json")
    assert set(json.loads(found.output.splitlines()[-1])["probabilities"]) == {"zero", "nine"}
    found = clipress("predict", run, tmp_path / "digits-000.png", "--labels", "zebra")
    assert found.exit_code == 2 and "expected some of the classifier's own 10 labels" in found.output
