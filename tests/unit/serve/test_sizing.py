"""How many instances and threads a graph gets: the rule, and the settings that override it."""

import json
from pathlib import Path

import pytest

from clipress.errors import ArtifactError
from clipress.runtime.export_folder import Exported
from clipress.serve import sizing as sizing_module
from clipress.serve.settings import ServeSettings
from clipress.serve.sizing import Sizing, helpers, sizing

MB = 1 << 20


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(sizing_module.os, "cpu_count", lambda: 8)


def exported(size=MB):
    file = {"file": "x.onnx", "sha256": "", "bytes": size}
    return Exported(
        folder=Path(),
        schema_version=1,
        stage="int8",
        precision="int8",
        embed_dim=4,
        logit_scale=1,
        preprocess={"size": 2},
        tokenizer={"name": "clip-bpe", "context_length": 3},
        lineage_hash="abc",
        files={"image": file, "text": file},
    )


def results(tmp_path, items_per_s, median_ms=0.2, threads=1, **row):
    """Write a results.json with the throughput of each batch of the graph `image`."""
    latency = [
        {"tower": "image", "batch": batch, "threads": threads, "median_ms": median_ms, "items_per_s": rate}
        for batch, rate in items_per_s.items()
    ]
    about = {"stage": "int8", "backend": "onnxruntime", "lineage": [{"hash": "start"}, {"hash": "abc"}]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": [{**about, "latency": latency, **row}]}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "size, instances, threads", [(0, 8, 1), (64 * MB, 8, 1), (65 * MB, 4, 2), (352 * MB, 1, 6), (4000 * MB, 1, 8)]
)
def test_without_figures_threads_follow_the_files_size(size, instances, threads):
    found = sizing(exported(size), "image", "python", ServeSettings(), None)
    assert found == Sizing(instances, threads, None)


@pytest.mark.parametrize(
    "median_ms, measured_with, instances, threads", [(1.2, 1, 8, 1), (20, 1, 8, 1), (30, 2, 2, 3), (900, 1, 1, 8)]
)
def test_with_figures_an_item_takes_about_twenty_milliseconds(tmp_path, median_ms, measured_with, instances, threads):
    bench = results(tmp_path, {1: 5, 8: 3}, median_ms, measured_with)
    found = sizing(exported(500 * MB), "image", "onnxruntime", ServeSettings(), bench)
    assert (found.instances, found.threads) == (instances, threads)


@pytest.mark.parametrize("median_ms, measured_with, instances", [(0.2, 1, 4), (0.2, 4, 4), (0.3, 4, 8)])
def test_a_very_small_model_leaves_half_of_the_cores_to_the_server(tmp_path, median_ms, measured_with, instances):
    found = sizing(exported(), "image", "python", ServeSettings(), results(tmp_path, {1: 5}, median_ms, measured_with))
    assert (found.instances, found.threads, found.small) == (instances, 1, instances < 8)
    assert helpers(ServeSettings(), found) == instances
    assert helpers(ServeSettings(instances=3), found) == 3


@pytest.mark.parametrize(
    "rates, preferred", [({1: 10, 8: 30, 32: 20}, 8), ({1: 30, 8: 20}, None), ({1: 1, 64: 9}, None), ({}, None)]
)
def test_the_best_batch_of_the_bench_is_preferred(tmp_path, rates, preferred):
    found = sizing(exported(), "image", "python", ServeSettings(), results(tmp_path, rates))
    assert found.preferred_batch == preferred


@pytest.mark.parametrize(
    "row",
    [{"stage": "teacher"}, {"backend": "torch"}, {"lineage": [{"hash": "retrained"}]}],
    ids=lambda row: next(iter(row)),
)
def test_figures_of_another_model_are_not_used(tmp_path, row):
    bench = results(tmp_path, {1: 1, 8: 9}, 900, **row)
    assert sizing(exported(), "image", "python", ServeSettings(), bench) == Sizing(8, 1, None)
    assert sizing(exported(), "text", "python", ServeSettings(), results(tmp_path, {8: 9})) == Sizing(8, 1, None)


def test_numbers_in_the_settings_win(tmp_path):
    bench = results(tmp_path, {1: 1}, 900)
    assert sizing(exported(), "image", "python", ServeSettings(threads=4), bench) == Sizing(2, 4, None)
    assert sizing(exported(), "image", "python", ServeSettings(instances=3, threads=4), bench) == Sizing(3, 4, None)
    assert [helpers(ServeSettings()), helpers(ServeSettings(instances=3))] == [8, 3]


def test_a_gpu_has_one_instance():
    assert sizing(exported(), "image", "tensorrt", ServeSettings(), None).instances == 1


def test_missing_results_are_allowed_and_damaged_ones_are_an_error(tmp_path):
    path = tmp_path / "results.json"
    assert sizing(exported(), "image", "python", ServeSettings(), path) == Sizing(8, 1, None)
    for content in ("", "[]", '{"rows": [{}]}', "{}"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ArtifactError, match="Measure again: clipress bench RUN"):
            sizing(exported(), "image", "python", ServeSettings(), path)
