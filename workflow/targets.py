"""Targets of `clipress auto`: `latency<=5ms`, `latency{tower=image}<=5ms`, `size<=40MB`, `params<=20M`, `macs<=1G`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from clipress.bench.results import Row
from clipress.errors import RecipeError, nearest

UNITS = {
    "latency": {"ms": 1.0, "us": 1e-3, "s": 1e3},
    "size": {"MB": 1e6, "KB": 1e3, "GB": 1e9},
    "params": {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9},
    "macs": {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9},
}
SHOWN = {"latency": ("ms", "ms"), "size": ("MB", "MB"), "params": ("M", "M params"), "macs": ("M", "M MACs")}
"""The unit in which a figure is reported, and its name."""
FORM = re.compile(r"\s*(\w+)\s*(?:\{\s*tower\s*=\s*([\w-]+)\s*\})?\s*<=\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*")

Pace = Mapping[tuple[str, int], float]
"""Median ms of one model by (graph, batch). A machine's own speed drifts by more than two models differ."""


@dataclass(frozen=True)
class Target:
    """An upper limit on one figure of a model."""

    text: str
    figure: str
    """A key of UNITS."""
    limit: float
    """In ms, bytes, parameters or multiply-accumulates."""
    tower: str | None = None
    """The graph whose latency counts; None: all of them, added."""

    def value(self, row: Row) -> float:
        """Return the figure of a measured model. Raises RecipeError for a graph that it does not have."""
        if self.figure != "latency":
            return float({"size": row.bytes, "params": row.params, "macs": row.macs}[self.figure])
        own = [timing for timing in row.latency if self.tower in (None, timing.tower)]
        if not own:
            known = [timing.tower for timing in row.latency]
            raise RecipeError(
                f"--target '{self.text}': the model has no graph '{self.tower}'.{nearest(self.tower, known)}"
            )
        return sum(timing.median_ms for timing in own)

    def excess(self, row: Row) -> float:
        """Return the figure divided by the limit: at most 1 where the target is met."""
        return self.value(row) / self.limit

    def shown(self, row: Row) -> str:
        """Return the figure of a measured model in the target's unit, such as 4.31 ms."""
        unit, name = SHOWN[self.figure]
        return f"{self.value(row) / UNITS[self.figure][unit]:.4g} {name}"


def target_from(text: str) -> Target:
    """Parse a target. Raises RecipeError for another form."""
    form = FORM.fullmatch(text)
    if form is None:
        raise RecipeError(
            f"--target '{text}': expected FIGURE<=NUMBER with a unit, such as 'latency<=5ms', "
            "'latency{tower=image}<=5ms' or 'size<=40MB'."
        )
    figure, tower, number, unit = form.groups()
    if figure not in UNITS:
        raise RecipeError(f"--target '{text}': unknown figure '{figure}'.{nearest(figure, UNITS)}")
    if tower is not None and figure != "latency":
        raise RecipeError(f"--target '{text}': {figure} is counted for the whole model. Leave out {{tower={tower}}}.")
    scales = {name.lower(): scale for name, scale in UNITS[figure].items()}
    if unit.lower() not in scales:
        raise RecipeError(
            f"--target '{text}': expected a unit of {figure}, {' or '.join(filter(None, UNITS[figure]))}; found '{unit}'."
        )
    if not float(number) > 0:
        raise RecipeError(f"--target '{text}': expected a number above 0.")
    return Target(text.strip(), figure, float(number) * scales[unit.lower()], tower)


def pace_of(row: Row) -> Pace:
    """Return the median latency of a model in each case."""
    return {timing.case: timing.median_ms for timing in row.latency}


def at_pace(row: Row, own: Pace, wanted: Pace) -> Row:
    """Scale the median latencies of a row: `own` is the pace of another model in the same turns, `wanted` its usual pace."""
    latency = tuple(
        timing.model_copy(update={"median_ms": timing.median_ms * wanted[case] / own[case]})
        for case, timing in zip(pace_of(row), row.latency, strict=True)
    )
    return row.model_copy(update={"latency": latency})


def worst(targets: Iterable[Target], row: Row) -> float:
    """Return the largest excess over all targets; 0 if there are none."""
    return max((target.excess(row) for target in targets), default=0.0)
