"""Targets of `clipress auto`: what they limit, and in which unit."""

import pytest

from clipress.bench.results import Latency, Row
from clipress.errors import RecipeError
from clipress.workflow.targets import target_from, worst


def row(**latency):
    timed = {name: dict.fromkeys(Latency.model_fields, 1) for name in latency}
    measured = [
        Latency.model_construct(**{**timed[name], "tower": name, "batch": 1, "median_ms": ms})
        for name, ms in latency.items()
    ]
    return Row.model_construct(bytes=30e6, params=7.5e6, macs=2e7, latency=measured)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("latency<=5ms", 5.0),
        (" latency <= 500 us ", 0.5),
        ("size<=40MB", 40e6),
        ("size <= 1.5 gb", 1.5e9),
        ("params<=20M", 20e6),
        ("macs<=1000000", 1e6),
    ],
)
def test_a_limit_is_read_in_its_unit(text, limit):
    assert target_from(text).limit == pytest.approx(limit)


def test_latencies_of_all_graphs_add_up_unless_one_is_named():
    measured = row(image=4.0, text=2.0)
    assert target_from("latency<=5ms").excess(measured) == pytest.approx(1.2)
    assert target_from("latency{tower=image}<=5ms").excess(measured) == pytest.approx(0.8)
    assert target_from("size<=40MB").excess(measured) == pytest.approx(0.75)
    assert worst([target_from("latency<=5ms"), target_from("size<=40MB")], measured) == pytest.approx(1.2)
    assert worst([], measured) == 0
    assert target_from("latency<=5ms").shown(measured) == "6 ms"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latency", "expected FIGURE<=NUMBER"),
        ("latency>=5ms", "expected FIGURE<=NUMBER"),
        ("latncy<=5ms", "Did you mean 'latency'"),
        ("latency<=5MB", "expected a unit of latency, ms or us or s; found 'MB'"),
        ("latency<=5", "expected a unit of latency"),
        ("size{tower=image}<=5MB", "counted for the whole model"),
        ("size<=0MB", "above 0"),
    ],
)
def test_a_target_of_another_form_is_refused(text, words):
    with pytest.raises(RecipeError, match=words):
        target_from(text)


def test_a_graph_that_the_model_lacks_is_named():
    with pytest.raises(RecipeError, match=r"no graph 'imge'.*'image'"):
        target_from("latency{tower=imge}<=5ms").excess(row(image=1.0))
