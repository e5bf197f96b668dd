"""Latency figures match trtexec."""

import numpy as np
import pytest

from clipress.bench.latency import Enqueued, Timings, measure_in_turns, percentile, summary


class Clock:
    """A clock that only queries advance; it records the order of queries."""

    def __init__(self):
        self.now, self.seen = 0, []

    def __call__(self):
        return self.now

    def query(self, name, ms):
        def run():
            self.seen.append(name)
            self.now += int(ms * 1e6)

        return run


def timings(*latency, rounds=None, enqueue=None):
    rounds = rounds or [len(latency)]
    return Timings(np.array(latency), np.array(rounds), np.zeros(len(rounds)), enqueue and np.array(enqueue))


def test_percentiles_match_trtexec():
    times = [float(t) for t in range(1, 201)]  # 200 sorted times.
    assert [percentile(times, p) for p in (50, 90, 95, 99)] == [100.0, 180.0, 190.0, 198.0]
    assert percentile([5.0], 99) == 5.0
    assert percentile([1.0, 2.0, 3.0], 100) == 3.0


def test_a_summary_has_the_figures_of_trtexec():
    found = summary(timings(4.0, 1.0, 3.0, 2.0, rounds=[3, 1]), batch=8)
    assert (found["min_ms"], found["max_ms"], found["mean_ms"], found["median_ms"]) == (1.0, 4.0, 2.5, 2.5)
    assert (found["throughput_qps"], found["items_per_s"]) == (400.0, 3200.0)
    assert (found["iterations"], found["rounds"]) == (4, 2)
    assert found["cv_percent"] == pytest.approx(100 * 1.25**0.5 / 2.5, abs=1e-4)
    assert summary(timings(3.0, 1.0, 2.0), 1)["median_ms"] == 2.0
    assert not any("enqueue" in name for name in found)


def test_a_device_has_enqueue_times_beside_its_latency():
    found = summary(timings(4.0, 2.0, 3.0, enqueue=[0.3, 0.1, 0.2]), 1)
    assert (found["enqueue_mean_ms"], found["enqueue_median_ms"], found["enqueue_p99_ms"]) == (0.2, 0.2, 0.3)


def test_models_alternate_until_all_reach_their_duration_and_iterations():
    clock = Clock()
    queries = {"a": clock.query("a", 1), "b": clock.query("b", 4)}
    found = measure_in_turns(queries, warm_up_ms=0, duration_ms=8, iterations=5, clock=clock)
    # One warm-up each; a turn is a twentieth of 8 ms, which is one query.
    assert "".join(clock.seen) == "ab" + "abba" * 4
    assert {name: len(own.latency) for name, own in found.items()} == {"a": 8, "b": 8}  # `a` reaches its 8 ms last.
    assert found["a"].latency.tolist() == [1.0] * 8 and found["b"].latency.tolist() == [4.0] * 8
    assert found["a"].starts.tolist()[:3] == [0, 9, 10] and found["b"].starts.tolist()[:3] == [1, 5, 11]
    assert found["a"].enqueue is None


def test_warm_up_lasts_as_long_as_set_and_is_not_counted():
    clock = Clock()
    found = measure_in_turns({"a": clock.query("a", 3)}, warm_up_ms=10, duration_ms=0, iterations=2, clock=clock)
    assert len(clock.seen) == 4 + 2  # After 9 ms the warm-up of 10 ms is not over.
    assert len(found["a"].latency) == 2 and found["a"].starts[0] == 0


def test_a_turn_lasts_a_twentieth_of_the_duration():
    clock = Clock()
    found = measure_in_turns(
        {name: clock.query(name, 1) for name in "ab"}, warm_up_ms=0, duration_ms=100, iterations=1, clock=clock
    )
    assert found["a"].rounds.tolist() == found["b"].rounds.tolist() == [5] * 20


def test_one_slow_query_as_long_as_the_duration_still_leaves_paired_rounds():
    clock = Clock()
    slow = iter([0, 5000])  # The first query after the warm-up is slow.

    def query():
        clock.now += int((1 + next(slow, 0)) * 1e6)

    found = measure_in_turns({"a": query}, warm_up_ms=0, duration_ms=100, iterations=10, clock=clock)
    assert len(found["a"].rounds) == 10 and found["a"].rounds[0] == 1


def test_a_device_query_is_timed_until_it_is_enqueued_and_until_it_is_done():
    clock = Clock()
    query = Enqueued(clock.query("e", 1), clock.query("w", 5))
    own = measure_in_turns({"a": query}, warm_up_ms=0, duration_ms=0, iterations=3, clock=clock)["a"]
    assert own.latency.tolist() == [6.0] * 3 and own.enqueue.tolist() == [1.0] * 3
    assert "".join(clock.seen) == "ew" * 4


def test_a_reopenable_model_is_reopened_and_briefly_warmed_up_every_round():
    clock, opened = Clock(), []

    def renew(name):
        opened.append(name)
        return clock.query(f"{name}{opened.count(name)} ", 1)

    queries = {name: clock.query(name, 1) for name in "ab"}
    found = measure_in_turns(
        queries,
        warm_up_ms=20,
        duration_ms=0,
        iterations=2,
        renew={name: lambda name=name: renew(name) for name in "ab"},
        clock=clock,
    )
    assert "".join(clock.seen) == "a" * 20 + "b" * 20 + "a1 a1 b1 b1 b2 b2 a2 a2 "
    assert opened == ["a", "b", "b", "a"]
    assert found["a"].latency.tolist() == [1.0, 1.0] and found["a"].rounds.tolist() == [1, 1]


def test_each_round_has_its_own_median():
    assert timings(1.0, 9.0, 2.0, 4.0, 6.0, rounds=[3, 2]).medians().tolist() == [2.0, 5.0]
