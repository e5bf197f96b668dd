"""What a metric says of each item, and what follows: the figure, its standard error, the difference of two models.

A figure is a few means put together: one mean (top-1), the average of one per class (mean-per-class recall), the harmonic
mean of two (generalised zero-shot), a sum (rsum). To first order each item then adds its own part to the figure
(`contributions`, the delta method), and both the standard error and the paired bootstrap need nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from clipress.errors import DataError

REPLICATES = 10_000
CELLS = 1 << 22  # of the table of bootstrap draws that is held at a time: 32 MB


@dataclass(frozen=True)
class Outcomes:
    """One metric's outcomes, item by item; all arrays are [n]."""

    values: np.ndarray
    """Hit or miss, or any number per item."""
    strata: np.ndarray | None = None
    """Items are averaged within their stratum, an int each, before the means are combined. None: one stratum."""
    units: np.ndarray | None = None
    """Items of one unit, an int each, stand or fall together, as the captions of an image do. None: each on its own."""
    combine: Literal["mean", "harmonic", "sum"] = "mean"
    """How the means of the strata make the figure."""
    tied: int = 0
    """Queries that would rank better if ties with wrong answers went their way; here they do not."""


@dataclass(frozen=True)
class Difference:
    """First model minus second, in points, with its 95 % interval."""

    value: float
    low: float
    high: float


def _means(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the stratum of every item [n], and the size and mean of every stratum [S]; empty strata are not there."""
    if outcomes.strata is None:
        index = np.zeros(len(outcomes.values), np.int64)
    else:
        _, index = np.unique(outcomes.strata, return_inverse=True)
    sizes = np.bincount(index)
    return index, sizes, np.bincount(index, outcomes.values) / sizes


def _combined(means: np.ndarray, combine: str) -> float:
    if combine == "harmonic":
        return float(len(means) / (1 / means).sum()) if (means > 0).all() else 0.0
    return float(means.sum() if combine == "sum" else means.mean())


def percent(outcomes: Outcomes) -> float:
    """Return the figure, in percent."""
    return 100.0 * _combined(_means(outcomes)[2], outcomes.combine)


def contributions(outcomes: Outcomes) -> np.ndarray:
    """Return how far each unit moves the figure off its value, in points [units]. They sum to zero."""
    index, sizes, means = _means(outcomes)
    if outcomes.combine == "harmonic":  # dH/dp = H² / (S p²)
        ratio = np.divide(_combined(means, "harmonic"), means, out=np.zeros_like(means), where=means > 0)
        slopes = ratio**2 / len(means)
    else:
        slopes = np.full(len(means), 1.0 if outcomes.combine == "sum" else 1 / len(means))
    parts = 100.0 * (slopes / sizes)[index] * (outcomes.values - means[index])
    if outcomes.units is None:
        return parts
    return np.bincount(np.unique(outcomes.units, return_inverse=True)[1], parts)


def standard_error(outcomes: Outcomes) -> float:
    """Return the figure's standard error in points.

    For hits and misses of independent items it is the binomial sqrt(p (1 - p) / n). Items of one unit are counted
    together (Liang and Zeger's sandwich): five captions of one image tell less than captions of five images.
    """
    return float(np.sqrt((contributions(outcomes) ** 2).sum()))


def percents(items: Mapping[str, Outcomes]) -> dict[str, float]:
    """Return every figure, in percent."""
    return {key: percent(outcomes) for key, outcomes in items.items()}


def standard_errors(items: Mapping[str, Outcomes]) -> dict[str, float]:
    """Return every figure's standard error, in points."""
    return {key: standard_error(outcomes) for key, outcomes in items.items()}


def paired_difference(first: Outcomes, second: Outcomes, replicates: int = REPLICATES, seed: int = 0) -> Difference:
    """Compare two models on the same items by a paired bootstrap (Efron) over units: percentile interval.

    Drawing n units with replacement is a multinomial draw of how often each distinct outcome occurs; two models' outcomes
    take few distinct values, so this costs the same for a thousand items as for fifty thousand.
    Raises DataError when the items are not the same.
    """
    if not (
        len(first.values) == len(second.values)
        and first.combine == second.combine
        and _same(first.strata, second.strata)
        and _same(first.units, second.units)
    ):
        raise DataError(
            f"Two models can be compared on the same items only; found {len(first.values)} and {len(second.values)} "
            "items that are not the same. Evaluate both on the same data."
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


def write_outcomes(items: Mapping[str, Outcomes], path: Path) -> None:
    """Write outcomes as npz: `<set>/<metric>/{values,strata,units,combine,tied}`, what is None left out."""
    arrays = {
        f"{key}/{field}": np.asarray(value)
        for key, outcomes in items.items()
        for field, value in vars(outcomes).items()
        if value is not None
    }
    np.savez_compressed(path, **arrays)


def read_outcomes(path: Path) -> dict[str, Outcomes]:
    """Read what `write_outcomes` wrote."""
    found: dict[str, dict] = {}
    with np.load(path) as arrays:
        for name, array in arrays.items():
            key, _, field = name.rpartition("/")
            found.setdefault(key, {})[field] = array.item() if array.ndim == 0 else array
    return {key: Outcomes(**fields) for key, fields in found.items()}
