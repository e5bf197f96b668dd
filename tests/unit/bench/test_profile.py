"""ONNX Runtime's profile, summed per operator kind and per layer."""

import json
from types import SimpleNamespace

import onnx
import pytest
from helpers import clipress

from clipress.artifact import read_header
from clipress.bench.layers import ELSE
from clipress.bench.profile import SCOPES, WARM_UP, layer_of, profile, split_queries, summarise
from clipress.runtime.export_folder import read_export

LAYERS = ["visual.transformer.resblocks.1", "visual.transformer.resblocks.10"]


def node(name, operator, us):
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": {"op_name": operator}}


def test_times_are_medians_over_queries_of_the_sum_per_kind():
    ten, one = "/visual/transformer/resblocks.10/mlp/c_fc/MatMul", "/visual/transformer/resblocks.1/attn/MatMul"
    places = {ten: LAYERS[1], one: LAYERS[0], "/ReduceL2": ELSE}

    def query(us):
        return [
            node(ten, "MatMul", us),
            node("BiasGelu", "BiasGelu", 7),
            node(f"{one}/MatMulScaleFusion/", "FusedMatMul", us),
            node("/ReduceL2", "ReduceL2", 3),
            {"cat": "Session", "name": "model_run", "dur": 99},
        ]

    warm_up = [event for _ in range(WARM_UP) for event in query(10_000)]
    started = {"cat": "Session", "name": "session_initialization", "dur": 1}
    events = [started, *warm_up, *query(10), *query(20), *query(90)]
    runs = split_queries(events)[WARM_UP:]
    assert len(runs) == 3
    operators, by_layer = summarise(runs, places)
    assert {row.name: (row.median_ms, row.nodes) for row in operators} == {
        "MatMul": (0.02, 1),
        "FusedMatMul": (0.02, 1),
        "BiasGelu": (0.007, 1),
        "ReduceL2": (0.003, 1),
    }
    layers = {row.name: (row.median_ms, row.nodes) for row in by_layer}
    assert layers == {LAYERS[1]: (0.027, 2), LAYERS[0]: (0.02, 1), ELSE: (0.003, 1)}
    assert sum(row.percent for row in by_layer) == pytest.approx(100, abs=0.1)


def test_a_node_is_assigned_by_its_path_or_by_dynamo_metadata():
    def of(name, **props):
        held = [SimpleNamespace(key=key, value=value) for key, value in props.items()]
        return layer_of(SimpleNamespace(name=name, metadata_props=held), LAYERS)

    assert of("/visual/transformer/resblocks.1/attn/q/MatMul") == LAYERS[0]
    assert of("/visual/transformer/resblocks.10/Add") == LAYERS[1]
    assert of("/visual/transformer/resblocks.2/Add") == of("/Div") == ELSE
    scopes = ["", "model.visual", "model.visual.transformer.resblocks.1", "linear_3"]
    assert of("node_linear_3", **{SCOPES: str(scopes)}) == LAYERS[0]


def test_every_node_that_ran_is_counted_once_in_both_sums(tiny_run):
    run, _ = tiny_run
    exported, blocks = read_export(run / "export" / "int8"), [f"visual.transformer.resblocks.{n}" for n in (0, 1)]
    path = exported.onnx("image")
    found = profile(path, exported.graphs["image"], 2, 1, 2, blocks)
    by_operator, by_layer = (sum(row.nodes for row in rows) for rows in (found.operators, found.layers))
    assert by_operator == by_layer <= len(onnx.load(path).graph.node)
    layers = {row.name: row.nodes for row in found.layers}
    assert layers.keys() == {*blocks, ELSE}
    assert layers[blocks[0]] == layers[blocks[1]] > 20
    quantized = [name for name in read_header(run / "int8")["quantization"]["modules"] if name.startswith("visual.")]
    assert {row.name: row.nodes for row in found.operators}["MatMulIntegerToFloat"] == len(quantized) > 0


def test_bench_profiles_on_request(tiny_run, tmp_path):
    options = ("--stage", "int8", "--profile", "--no-accuracy", "--duration", 0, "--iterations", 1, "--batch", 2)
    result = clipress("bench", tiny_run[0], *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(one["tower"], one["batch"]) for one in row["profiles"]] == [("image", 2), ("text", 2)]
    assert "int8, text tower, batch 2, 20 queries" in (tmp_path / "report.html").read_text()
