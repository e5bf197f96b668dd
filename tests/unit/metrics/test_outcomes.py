"""Standard errors and paired differences match textbook formulas and resampling."""

import numpy as np
import pytest

from clipress.errors import DataError
from clipress.metrics.outcomes import (
    Outcomes,
    contributions,
    paired_difference,
    percent,
    read_outcomes,
    standard_error,
    write_outcomes,
)


def hits(n, p, seed=0):
    return np.random.default_rng(seed).random(n) < p


def slow_value(outcomes, items):
    """Compute the metric of the drawn items from its definition."""
    strata = np.zeros(len(outcomes.values)) if outcomes.strata is None else outcomes.strata
    means = [outcomes.values[items][strata[items] == s].mean() for s in np.unique(strata[items])]
    if outcomes.combine == "harmonic":
        return 100 * len(means) / sum(1 / m for m in means)
    return 100 * (sum(means) if outcomes.combine == "sum" else np.mean(means))


def slow_draws(outcomes, replicates=1500):
    """Draw units with replacement and recompute the metric each time."""
    rng = np.random.default_rng(1)
    units = np.arange(len(outcomes.values)) if outcomes.units is None else outcomes.units
    members = [np.flatnonzero(units == u) for u in np.unique(units)]
    return [
        np.concatenate([members[u] for u in rng.integers(0, len(members), len(members))]) for _ in range(replicates)
    ]


N = 600
LABELS = np.random.default_rng(3).choice(8, N, p=[0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])
OWNER = np.sort(np.random.default_rng(4).integers(0, 150, N))
KINDS = {
    "mean": {},
    "mean per class": {"strata": LABELS},
    "harmonic mean of two": {"strata": LABELS // 4, "combine": "harmonic"},
    "captions of images": {"units": OWNER},
    "both ways": {"strata": np.arange(N) % 2, "units": OWNER},
    "sum": {"strata": np.arange(N) % 3, "units": OWNER, "combine": "sum"},
}


def model(kind, p, seed):
    """Return outcomes that differ between classes and correlate within a unit."""
    rng = np.random.default_rng(seed)
    lift = np.linspace(0.1, -0.4, 8)[LABELS] + np.random.default_rng(9).normal(0, 0.25, 150)[OWNER]
    return Outcomes(rng.random(N) < p + lift, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_match_their_definitions(kind):
    outcomes = model(kind, 0.6, 0)
    assert percent(outcomes) == pytest.approx(slow_value(outcomes, np.arange(N)))


@pytest.mark.parametrize("kind", KINDS)
def test_standard_errors_match_resampling(kind):
    outcomes = model(kind, 0.6, 0)
    drawn = [slow_value(outcomes, items) for items in slow_draws(outcomes)]
    assert standard_error(outcomes) == pytest.approx(np.std(drawn), rel=0.08)


@pytest.mark.parametrize("kind", KINDS)
def test_the_paired_interval_matches_joint_resampling(kind):
    first, second = model(kind, 0.65, 0), model(kind, 0.6, 1)
    found = paired_difference(first, second)
    drawn = [slow_value(first, items) - slow_value(second, items) for items in slow_draws(first)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert found.value == pytest.approx(percent(first) - percent(second))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low) / 2)


def test_the_standard_error_of_hits_is_binomial():
    values = hits(500, 0.3)
    p = values.mean()
    assert standard_error(Outcomes(values)) == pytest.approx(100 * np.sqrt(p * (1 - p) / 500))


def test_the_standard_error_of_mean_per_class_recall_adds_the_classes_variances():
    values, parts = hits(N, 0.5), []
    for label in range(8):
        own = values[label == LABELS]
        parts.append(own.mean() * (1 - own.mean()) / len(own))
    assert standard_error(Outcomes(values, strata=LABELS)) == pytest.approx(100 * np.sqrt(sum(parts)) / 8)


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_sum_to_zero(kind):
    assert contributions(model(kind, 0.5, 2)).sum() == pytest.approx(0, abs=1e-9)


def test_the_paired_interval_agrees_with_scipys_bootstrap():
    from scipy.stats import bootstrap

    a, b = hits(300, 0.6), hits(300, 0.6) ^ hits(300, 0.1, 1)
    theirs = bootstrap(
        (100.0 * a, 100.0 * b), lambda x, y, axis: (x - y).mean(axis=axis), paired=True, method="percentile",
        n_resamples=4000, vectorized=True, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    ours = paired_difference(Outcomes(a), Outcomes(b))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.4)


def test_paired_differences_are_more_precise_than_two_standard_errors():
    a = hits(2000, 0.6)
    b = a & ~hits(2000, 0.03, 1)  # `b` misses a few items that `a` gets right.
    found = paired_difference(Outcomes(a), Outcomes(b))
    assert 0 < found.low < found.value < found.high
    unpaired = 1.96 * np.hypot(standard_error(Outcomes(a)), standard_error(Outcomes(b)))
    assert found.value < unpaired  # Unpaired standard errors would not separate the two.


def test_a_model_does_not_differ_from_itself():
    found = paired_difference(model("both ways", 0.5, 0), model("both ways", 0.5, 0))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_interval_is_deterministic_and_antisymmetric():
    a, b = model("mean", 0.6, 0), model("mean", 0.5, 1)
    found, again, back = paired_difference(a, b), paired_difference(a, b), paired_difference(b, a)
    assert found == again
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=0.3)


@pytest.mark.parametrize("other", [{"n": 9}, {"strata": np.arange(10)}, {"units": np.arange(10)}])
def test_models_that_answered_different_items_are_not_compared(other):
    second = Outcomes(hits(other.pop("n", 10), 0.5), **other)
    with pytest.raises(DataError, match="on the same items, found"):
        paired_difference(Outcomes(hits(10, 0.5)), second)


def test_outcomes_round_trip(tmp_path):
    items = {f"set/{kind}": model(kind, 0.5, 0) for kind in KINDS}
    write_outcomes(items, tmp_path / "items.npz")
    read = read_outcomes(tmp_path / "items.npz")
    assert list(read) == list(items)
    for key, outcomes in items.items():
        assert percent(read[key]) == percent(outcomes)
        assert standard_error(read[key]) == standard_error(outcomes)
        assert paired_difference(read[key], outcomes).value == 0
