"""Ratios and intervals against scipy, an exact count of sign patterns, and the truth on simulated noise."""

import itertools

import numpy as np
import pytest
import scipy.stats

from clipress.bench.compare import LEAST_ROUNDS, count_outside, speed_up
from clipress.bench.latency import Timings


def timings(medians):
    """One query per round."""
    medians = np.asarray(medians, float)
    return Timings(medians, np.ones(len(medians), int), np.zeros(len(medians)))


@pytest.mark.parametrize("rounds", [6, 7, 10, 12])
def test_the_interval_matches_an_exact_count_of_sign_patterns(rounds):
    sums = [
        sum(rank for rank, sign in enumerate(signs, 1) if sign) for signs in itertools.product((0, 1), repeat=rounds)
    ]
    outside = count_outside(rounds)
    assert np.mean(np.array(sums) <= outside) <= 0.025 < np.mean(np.array(sums) <= outside + 1)


@pytest.mark.parametrize("rounds", [50, 51, 80, 200])
def test_the_normal_approximation_is_within_one_of_the_exact_count(rounds):
    ways = [1]  # Exact number of ways to reach each sum of ranks.
    for rank in range(1, rounds + 1):
        ways = [a + b for a, b in zip(ways + [0] * rank, [0] * rank + ways, strict=True)]
    reached = itertools.accumulate(ways)
    exact = sum(40 * total <= 2**rounds for total in reached) - 1
    assert abs(count_outside(rounds) - exact) <= (0 if rounds == 50 else 1)


@pytest.mark.parametrize("rounds", [8, 20, 35])
def test_the_interval_contains_exactly_the_ratios_that_scipys_signed_rank_test_accepts(rounds):
    rng = np.random.default_rng(rounds)
    slow, fast = rng.lognormal(1.0, 0.1, rounds), rng.lognormal(0.5, 0.1, rounds)
    found = speed_up(timings(slow), timings(fast))
    logs = np.log(slow / fast)

    def refused(ratio):
        return scipy.stats.wilcoxon(logs - np.log(ratio), method="exact").pvalue < 0.05

    for end, inwards in ((found.low, 1.0), (found.high, -1.0)):
        assert not refused(end * (1 + inwards * 1e-6))
        assert refused(end * (1 - inwards * 1e-6))
    walsh = [(a + b) / 2 for i, a in enumerate(logs) for b in logs[i:]]
    assert found.value == pytest.approx(np.exp(np.median(walsh)))


def test_slowing_the_whole_machine_does_not_change_the_ratio():
    drift = np.linspace(1, 5, 20)
    found = speed_up(timings(3 * drift), timings(2 * drift))
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_outliers_in_a_quarter_of_the_rounds_barely_move_the_estimate():
    rng = np.random.default_rng(0)
    slow, fast = 2 * rng.lognormal(0, 0.01, 20), rng.lognormal(0, 0.01, 20)
    fast[:4] *= 10
    assert speed_up(timings(slow), timings(fast)).value == pytest.approx(2, rel=0.02)


def test_the_interval_has_its_nominal_coverage_on_a_noisy_machine():
    """Both models share a drifting load, and each has its own bursts."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        load = np.exp(np.cumsum(rng.normal(0, 0.2, 20)))
        bursts = np.where(rng.random((2, 20)) < 0.2, rng.uniform(1, 4, (2, 20)), 1) * rng.lognormal(0, 0.03, (2, 20))
        found = speed_up(timings(1.7 * load * bursts[0]), timings(load * bursts[1]))
        held += found.low <= 1.7 <= found.high
    assert 0.92 <= held / 400 <= 0.99


def test_too_few_rounds_give_a_ratio_without_an_interval():
    few = LEAST_ROUNDS - 1
    found = speed_up(timings([2.0] * few), timings([1.0] * few))
    assert (found.value, found.low, found.high, found.rounds) == (2.0, None, None, few)


def test_rounds_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="7 and 8 rounds"):
        speed_up(timings([1.0] * 7), timings([1.0] * 8))
