"""How much faster one model is than another, with an interval that a noisy machine does not fool.

Both ran in the same rounds, back to back, so what slows the machine slows both. What is compared is, round by round,
the logarithm of the ratio of their median latencies. A round's disturbance is as likely to hit the one as the other, so the
log ratios scatter symmetrically around the true one, whatever the shape of the noise. That is all that Wilcoxon's signed
rank test needs. The estimate is Hodges and Lehmann's (the median of the averages of all pairs of rounds), the interval
is the one that belongs to the test (Hollander and Wolfe, Nonparametric Statistical Methods, 3.1-3.3): exact up to 50
rounds, no normal distribution assumed, and single spoilt rounds move it little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipress.bench.latency import Timings

LEAST_ROUNDS = 6  # with fewer, no interval of ranks reaches 95 %
EXACT_ROUNDS = 50


@dataclass(frozen=True)
class Ratio:
    """`value` times as fast, and its 95 % interval; without one (None) where there were too few rounds."""

    value: float
    low: float | None
    high: float | None
    rounds: int


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
    beyond = _beyond(rounds)
    low, high = np.exp(averages[[beyond, -1 - beyond]])
    return Ratio(value, float(low), float(high), rounds)


def _beyond(rounds: int) -> int:
    """Return how many averages lie outside a 95 % interval on either side: the largest k with P(W <= k) <= 0.025."""
    if rounds > EXACT_ROUNDS:  # normal, with the correction for whole numbers
        mean = rounds * (rounds + 1) / 4
        return int(mean - 1.959964 * (mean * (2 * rounds + 1) / 6) ** 0.5 - 0.5)
    chances = np.zeros(rounds * (rounds + 1) // 2 + 1)
    chances[0] = 1.0  # of each sum of ranks, when every rank is in it or not with equal chance
    for rank in range(1, rounds + 1):
        chances[rank:] = (chances[rank:] + chances[:-rank]) / 2
        chances[:rank] /= 2
    return int(np.searchsorted(np.cumsum(chances), 0.025, side="right")) - 1
