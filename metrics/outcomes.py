"""A metric's outcome per item, and what follows from it: its value, standard error, and the difference of two models.

A value combines a few means: one mean (top-1), the average over classes (mean-per-class recall; weighted, mean IoU), the harmonic
mean of two (generalised zero-shot), a sum (rsum), or a geometric mean with a penalty for the last one (BLEU). To first order, each item makes its own contribution to the value (the delta
method), and both the standard error and the paired bootstrap are computed from these contributions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from clipress.errors import DataError

REPLICATES = 10_000
CELLS = 1 << 22  # Cells of the bootstrap table that are computed at a time: 32 MB.


@dataclass(frozen=True)
class Outcomes:
    """One metric's outcomes, one per item; all arrays are [n]."""

    values: np.ndarray
    """Hit or miss, or any number per item."""
    strata: np.ndarray | None = None
    """Stratum of each item, an int: items are averaged within strata, then the means are combined. None: one stratum."""
    units: np.ndarray | None = None
    """Unit of each item, an int: items of one unit are dependent, as captions of one image. None: all are independent."""
    combine: Literal["mean", "harmonic", "sum", "bleu"] = "mean"
    """How the means of the strata are combined. bleu: the geometric mean of all but the last, times exp(min(0, 1 - 1 / last))."""
    tied: int = 0
    """Number of items that tie with a wrong answer, which counts against the model."""
    weights: np.ndarray | None = None
    """Weight of each item in its stratum's mean; a stratum without weight is left out. None: all are alike."""


@dataclass(frozen=True)
class Difference:
    """First model minus second, in points, with a 95 % interval."""

    value: float
    low: float
    high: float


def _means(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the stratum of every item [n], and the weight and mean of every stratum [S]; the mean of one without weight is NaN."""
    if outcomes.strata is None:
        index = np.zeros(len(outcomes.values), np.int64)
    else:
        _, index = np.unique(outcomes.strata, return_inverse=True)
    weights = np.ones(len(index)) if outcomes.weights is None else outcomes.weights
    sizes = np.bincount(index, weights)
    sums = np.bincount(index, outcomes.values * weights)
    return index, sizes, np.divide(sums, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)


def _combined(means: np.ndarray, combine: str) -> float:
    means = means[~np.isnan(means)]
    if combine == "harmonic":
        return float(len(means) / (1 / means).sum()) if (means > 0).all() else 0.0
    if combine == "bleu":
        *precisions, ratio = means
        return float(np.exp(np.log(precisions).mean() + min(0, 1 - 1 / ratio))) if (means > 0).all() else 0.0
    return float(means.sum() if combine == "sum" else means.mean())


def percent(outcomes: Outcomes) -> float:
    """Return the metric's value in percent."""
    return 100.0 * _combined(_means(outcomes)[2], outcomes.combine)


def contributions(outcomes: Outcomes) -> np.ndarray:
    """Return each unit's contribution to the deviation of the value, in points [units]. They sum to zero."""
    index, sizes, means = _means(outcomes)
    weighed = int((sizes > 0).sum())
    if outcomes.combine == "harmonic":  # dH/dp = H² / (S p²)
        ratio = np.divide(_combined(means, "harmonic"), means, out=np.zeros_like(means), where=means > 0)
        slopes = ratio**2 / weighed
    elif outcomes.combine == "bleu":  # dB/dp = B / (4 p), dB/dr = B / r² where the penalty counts
        powers = np.append(means[:-1] * (weighed - 1), means[-1] ** 2 if means[-1] < 1 else np.inf)
        slopes = np.divide(_combined(means, "bleu"), powers, out=np.zeros_like(means), where=powers > 0)
    else:
        slopes = np.full(len(means), 1.0 if outcomes.combine == "sum" else 1 / weighed)
    shares = np.divide(slopes, sizes, out=np.zeros(len(sizes)), where=sizes > 0)
    parts = 100.0 * shares[index] * (outcomes.values - np.nan_to_num(means)[index])
    if outcomes.weights is not None:
        parts *= outcomes.weights
    if outcomes.units is None:
        return parts
    return np.bincount(np.unique(outcomes.units, return_inverse=True)[1], parts)


def standard_error(outcomes: Outcomes) -> float:
    """Return the value's standard error in points.

    For hits and misses of independent items it is the binomial sqrt(p (1 - p) / n). Items of one unit are grouped
    (Liang and Zeger's sandwich): five captions of one image carry less information than captions of five images.
    """
    return float(np.sqrt((contributions(outcomes) ** 2).sum()))


def percents(items: Mapping[str, Outcomes]) -> dict[str, float]:
    """Return the value of every metric in percent."""
    return {key: percent(outcomes) for key, outcomes in items.items()}


def standard_errors(items: Mapping[str, Outcomes]) -> dict[str, float]:
    """Return the standard error of every metric in points."""
    return {key: standard_error(outcomes) for key, outcomes in items.items()}


def paired_difference(first: Outcomes, second: Outcomes, replicates: int = REPLICATES, seed: int = 0) -> Difference:
    """Compare two models on the same items by a paired bootstrap (Efron) over units: percentile interval.

    Drawing n units with replacement is a multinomial draw of the count of each distinct outcome; there are few of them,
    so the cost does not grow with the number of items. Raises DataError if the models were evaluated on different items.
    """
    if not (
        len(first.values) == len(second.values)
        and first.combine == second.combine
        and _same(first.strata, second.strata)
        and _same(first.units, second.units)
    ):
        raise DataError(
            f"comparison: expected outcomes of two models on the same items, found {len(first.values)} and "
            f"{len(second.values)} items that differ. Evaluate both on the same data."
        )
    value = percent(first) - percent(second)
    parts = contributions(first) - contributions(second)
    distinct, counts = np.unique(parts, return_counts=True)
    rng, step = np.random.default_rng(seed), max(1, CELLS // len(distinct))
    moved = [
        rng.multinomial(len(parts), counts / len(parts), min(step, replicates - start)) @ distinct
        for start in range(0, replicates, step)
    ]
    low, high = np.quantile(value + np.concatenate(moved), (0.025, 0.975))
    return Difference(value, float(low), float(high))


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def paired_error(first: Outcomes, second: Outcomes) -> float:
    """Return the standard error of the difference of two models on the same items, in points."""
    return float(np.sqrt(((contributions(first) - contributions(second)) ** 2).sum()))


def write_outcomes(items: Mapping[str, Outcomes], path: Path) -> None:
    """Write outcomes as npz: `<set>/<metric>/{values,strata,units,combine,tied}`; fields that are None are left out."""
    arrays = {
        f"{key}/{field}": np.asarray(value)
        for key, outcomes in items.items()
        for field, value in vars(outcomes).items()
        if value is not None
    }
    np.savez_compressed(path, **arrays)


def read_outcomes(path: Path) -> dict[str, Outcomes]:
    """Read a file of `write_outcomes`."""
    found: dict[str, dict] = {}
    with np.load(path) as arrays:
        for name, array in arrays.items():
            key, _, field = name.rpartition("/")
            found.setdefault(key, {})[field] = array.item() if array.ndim == 0 else array
    return {key: Outcomes(**fields) for key, fields in found.items()}
