"""Bench measures other tasks than CLIP with their own graphs, metrics and costs."""

import json

import pytest

from clipress.artifact import save_artifact
from clipress.bench.report import comparison, report_page, table
from clipress.bench.results import read_results, write_results
from clipress.bench.run import Subject, bench, graph_names
from clipress.bench.settings import BenchSettings
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.models.load import artifact_from_model
from clipress.tasks import evaluate_model, task_named

SECTION = {"width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32}


@pytest.fixture(scope="module")
def sets():
    return evalsets([SourceSpec(format="digits", split="test", limit=40)])


@pytest.fixture(scope="module")
def classifier(sets, tmp_path_factory):
    """A classifier's artifact folder and the model."""
    model = task_named("classification").student_from({**SECTION, "labels": sets[0].classes.names}, None, 0)
    folder = tmp_path_factory.mktemp("classifier") / "dense"
    save_artifact(artifact_from_model(model, ({"stage": "dense", "hash": "abc"},), {}), folder)
    return folder, model


def test_a_classifier_is_benchmarked_with_its_own_graph_and_metrics(classifier, sets, tmp_path):
    folder, model = classifier
    settings = BenchSettings(backends=("torch",), batch=(1, 2), duration=0, warm_up=0, iterations=7)
    subjects = [Subject("a", folder, tmp_path), Subject("b", folder, tmp_path)]
    results = bench(subjects, sets, settings, tmp_path / "bench", about={"recipe": "digits"})
    for row in results.rows:
        assert (row.task, row.precision, row.block_params_kept) == ("classification", "fp32", 1.0)
        assert [(one.tower, one.batch) for one in row.latency] == [("image", 1), ("image", 2)]
        assert row.params == sum(weights.numel() for weights in model.module.parameters())
        assert row.macs == sum(layer.macs for layer in row.layers) > 0
    top1 = evaluate_model(model, sets)["digits/top1"].values.mean()
    assert results.rows[0].accuracy["digits/top1"] == pytest.approx(100 * top1, abs=1e-3)
    assert graph_names(subjects) == ["image"]
    assert read_results(write_results(results, tmp_path)) == results
    samples = json.loads((tmp_path / "bench" / "samples" / "b.json").read_text())
    assert [(case["tower"], len(case["latency_ms"])) for case in samples["cases"]] == [("image", 7), ("image", 7)]
    shown = table(results)
    assert "top-1" in shown and "i->t" not in shown and "speed-up: against a at batch 2" in shown
    assert "image" in comparison(results) and "digits" in report_page(results)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (1, 0, 2)])
def test_a_classifier_is_judged_beside_a_clip_on_the_graph_that_it_has(classifier, sets, tiny_run, tmp_path, order):
    folder, model = classifier
    sparse = tmp_path / "sparse"
    lineage = ({"stage": "dense", "hash": "abc"}, {"stage": "sparse", "kind": "sparsify", "hash": "def"})
    save_artifact(artifact_from_model(model, lineage, {}), sparse)
    artifacts = {"clip": tiny_run[0] / "teacher", "dense": folder, "sparse": sparse}
    subjects = [Subject(name, artifact, tmp_path) for name, artifact in artifacts.items()]
    settings = BenchSettings(backends=("torch",), batch=(1,), duration=0, warm_up=0, iterations=2)
    results = bench([subjects[i] for i in order], [], settings, tmp_path / "bench", about={})
    (verdict,) = results.verdicts
    assert (verdict.stage, verdict.against) == ("sparse", "dense")
    assert [(one.tower, one.batch) for one in verdict.cases] == [("image", 1)]
