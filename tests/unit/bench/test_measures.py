"""Latency figures are trtexec's; costs are what arithmetic says."""

import pytest

from clipress.bench.cost import macs
from clipress.bench.latency import measure_in_turns, percentile, summary
from clipress.models.load import new_clip
from clipress.models.tiny import tiny_architecture


def test_percentiles_are_trtexecs():
    times = [float(t) for t in range(1, 201)]  # sorted, 200 of them
    assert [percentile(times, p) for p in (90, 95, 99)] == [180.0, 190.0, 198.0]
    assert percentile([5.0], 99) == 5.0
    assert percentile([1.0, 2.0, 3.0], 100) == 3.0


def test_a_summary_has_trtexecs_figures():
    found = summary([4.0, 1.0, 3.0, 2.0], batch=8, wall_ms=20.0)
    assert (found["min_ms"], found["max_ms"], found["mean_ms"], found["median_ms"]) == (1.0, 4.0, 2.5, 2.5)
    assert (found["throughput_qps"], found["items_per_s"], found["iterations"]) == (200.0, 1600.0, 4)
    assert summary([3.0, 1.0, 2.0], 1, 6.0)["median_ms"] == 2.0


def test_models_take_turns_and_reach_their_iterations():
    calls = []
    queries = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    measured = measure_in_turns(queries, warm_up_ms=0, duration_ms=0, iterations=5)
    assert {name: len(times) for name, (times, _) in measured.items()} == {"a": 5, "b": 5}
    assert calls == ["a", "b"] * 6  # one warm-up each, then turn by turn
    for times, wall in measured.values():
        assert wall == pytest.approx(times.sum()) and (times >= 0).all()


def test_multiply_accumulates_are_what_arithmetic_says():
    width, layers, patches, embed, length = 48, 3, 16, 20, 24
    clip = new_clip(tiny_architecture(width=width, layers=layers, embed_dim=embed), 0)
    n = patches + 1

    def blocks(tokens):
        linear = tokens * (4 * width * width + 2 * width * 4 * width)
        return layers * (linear + 2 * tokens * tokens * width)

    image = patches * 3 * 8 * 8 * width + blocks(n) + width * embed
    assert macs(clip) == {"image": image, "text": blocks(length) + width * embed}
