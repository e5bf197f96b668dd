"""Speed-ups between models, with intervals that hold on a noisy machine.

Both models ran in the same rounds, back to back, so what slows the machine slows both. Each round gives the logarithm of the
ratio of the two median latencies. A disturbance hits either model with equal chance, so the log ratios scatter
symmetrically around the true one, whatever the shape of the noise, which is all that Wilcoxon's signed-rank test
requires. The estimate is that of Hodges and Lehmann (the median of the averages of all pairs of rounds), and the interval
is the one that belongs to the test (Hollander and Wolfe, Nonparametric Statistical Methods, 3.1-3.3): exact up to 50
rounds, with no assumption of a normal distribution, and robust against single bad rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipress.bench.latency import Timings

LEAST_ROUNDS = 6  # with fewer rounds, no interval of ranks reaches 95 %
EXACT_ROUNDS = 50


@dataclass(frozen=True)
class Ratio:
    """`value` times as fast, with its 95 % interval; the ends are None if there were too few rounds."""

    value: float
    low: float | None
    high: float | None
    rounds: int


def includes_no_difference(low: float | None, high: float | None) -> bool:
    """Return whether an interval of a ratio includes 1, so that neither model was seen to be faster."""
    return low is not None and high is not None and low <= 1 <= high


def speed_up(reference: Timings, other: Timings) -> Ratio:
    """Return how many times as fast as `reference` the `other` is. Both must come from the same rounds."""
    rounds = len(reference.rounds)
    if rounds != len(other.rounds):
        raise ValueError(f"{rounds} and {len(other.rounds)} rounds cannot be paired; measure both in turns.")
    logs = np.log(reference.medians()) - np.log(other.medians())
    averages = np.sort((logs[:, None] + logs[None, :])[np.triu_indices(rounds)] / 2)
    value = float(np.exp(np.median(averages)))
    if rounds < LEAST_ROUNDS:
        return Ratio(value, None, None, rounds)
    outside = count_outside(rounds)
    low, high = np.exp(averages[[outside, -1 - outside]])
    return Ratio(value, float(low), float(high), rounds)


def count_outside(rounds: int) -> int:
    """Return how many averages lie outside a 95 % interval on either side: the largest k with P(W <= k) <= 0.025."""
    if rounds > EXACT_ROUNDS:  # normal approximation with continuity correction
        mean = rounds * (rounds + 1) / 4
        return int(mean - 1.959964 * (mean * (2 * rounds + 1) / 6) ** 0.5 - 0.5)
    chances = np.zeros(rounds * (rounds + 1) // 2 + 1)
    chances[0] = 1.0  # Probability of each sum of ranks if every rank is in it with probability 1/2.
    for rank in range(1, rounds + 1):
        chances[rank:] = (chances[rank:] + chances[:-rank]) / 2
        chances[:rank] /= 2
    return int(np.searchsorted(np.cumsum(chances), 0.025, side="right")) - 1
