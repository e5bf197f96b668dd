"""Gates have the form METRIC{WHERE} OP NUMBER."""

import operator

import pytest

from clipress.bench.fail_if import OPERATORS, broken, check, gate_from
from clipress.bench.results import Results
from clipress.errors import RecipeError

FIGURES = dict.fromkeys(
    ("min_ms", "max_ms", "mean_ms", "median_ms", "p50_ms", "p90_ms", "p95_ms", "throughput_qps", "items_per_s"), 1.0
) | {"threads": 1, "iterations": 10}


@pytest.fixture
def results():
    def row(stage, scale, top1):
        latency = [
            FIGURES | {"tower": tower, "batch": batch, "p99_ms": scale * batch, "speed_up": 1 / scale}
            for tower in ("image", "text")
            for batch in (1, 8)
        ]
        return {"stage": f"run/{stage}", "artifact": stage, "backend": "onnxruntime", "precision": "fp32",
                "bytes": 1000, "accuracy": {"digits/top1": top1}, "latency": latency}  # fmt: skip

    rows = [row("teacher", 2.0, 99.0), row("int8", 0.5, 90.0)]
    return Results.model_validate({"schema_version": 1, "conditions": {}, "rows": rows})


def broken_by(results, *texts):
    return broken([gate_from(text) for text in texts], results)


def test_a_gate_without_a_filter_applies_to_every_row_tower_and_batch(results):
    assert len(broken_by(results, "p99_ms > 1.9")) == 6
    assert broken_by(results, "p99_ms > 16") == []
    assert len(broken_by(results, "p99_ms >= 16")) == 2


def test_a_filter_narrows_a_gate_and_the_message_names_metric_value_place_and_bound(results):
    (message,) = broken_by(results, "p99_ms{stage=int8, tower=image, batch=8} > 3")
    assert message == "p99_ms is 4 (run/int8, image tower, batch 8), and must not be > 3"
    assert len(broken_by(results, 'p99_ms{stage="run/int8"} > 0')) == 4


def test_every_failed_gate_reports_what_it_found(results):
    messages = broken_by(results, "digits/top1 < 95", "bytes > 999", "speed_up{stage=int8,batch=1,tower=text}<=2")
    assert [line.split()[0] for line in messages] == ["digits/top1", "bytes", "bytes", "speed_up"]


@pytest.mark.parametrize("sign", OPERATORS)
def test_operators_are_those_of_python(results, sign):
    known = {
        ">": operator.gt,
        "<": operator.lt,
        ">=": operator.ge,
        "<=": operator.le,
        "==": operator.eq,
        "!=": operator.ne,
    }
    for bound in (989.5, 1000, 1.0005e3):
        assert bool(broken_by(results, f"bytes{{stage=int8}} {sign} {bound}")) == known[sign](1000, bound)


@pytest.mark.parametrize(
    "text",
    ["", "p99_ms", "p99_ms > ", "> 10", "p99_ms => 10", "p99_ms > ten", "p99_ms > 10 or 1", "__import__('os') > 1",
     "p99_ms > 10; 1", "p99_ms{batch=8 > 10", "p99_ms > nan", "p99_ms(1) > 1"],
)  # fmt: skip
def test_malformed_gates_are_refused_with_the_expected_form(text):
    with pytest.raises(RecipeError, match="METRIC OP NUMBER"):
        gate_from(text)


def test_unknown_or_empty_filters_are_refused():
    with pytest.raises(RecipeError, match="Did you mean 'batch'"):
        gate_from("p99_ms{bach=8} > 1")
    with pytest.raises(RecipeError, match="'batch=VALUE'"):
        gate_from("p99_ms{batch} > 1")


def test_gates_are_validated_early_and_typos_get_a_suggestion():
    def early(text):
        check([gate_from(text)], ["run/teacher", "run/int8"], ["onnxruntime"], [1, 8], ["digits"], ["image", "text"])

    early("p99_ms{stage=int8, batch=8} > 1")
    early("p99_ms{stage=run/int8} > 1")
    early("digits/anything > 1")  # The metrics of a set are only known after measuring.
    for text, words in {
        "p99ms > 1": "Did you mean 'p99_ms'",
        "p99_ms{stage=run/int} > 1": "Did you mean 'run/int8'",
        "p99_ms{tower=photo} > 1": "Known: image, text",
        "p99_ms{batch=2} > 1": "batch '2'",
        "digit/top1 < 1": "Did you mean 'digits'",
    }.items():
        with pytest.raises(RecipeError, match=words):
            early(text)


def test_a_missing_metric_is_refused_with_the_nearest_name(results):
    with pytest.raises(RecipeError, match="Did you mean 'digits/top1'"):
        broken_by(results, "digit/top1 < 1")
    with pytest.raises(RecipeError, match="measured nowhere with precision=int8"):
        broken_by(results, "p99_ms{precision=int8} > 1")


def test_a_gate_on_accuracy_that_is_not_measured_is_reported_early():
    with pytest.raises(RecipeError, match="Leave --no-accuracy out"):
        check([gate_from("digits/top1 < 95")], ["int8"], ["onnxruntime"], [1], [])


def test_towers_must_be_timed_graphs_and_any_name_passes_while_they_are_unknown():
    def early(graphs):
        check([gate_from("p99_ms{tower=question} > 1")], ["vqa"], ["onnxruntime"], [1], [], graphs)

    early(["image", "question"])
    early(None)
    with pytest.raises(RecipeError, match=r"unknown tower 'question'\. Known: image, text"):
        early(["image", "text"])
