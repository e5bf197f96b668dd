"""`--fail-if`: conditions under which a build fails, for CI.

    p99_ms > 10
    p99_ms{stage=int8, tower=image, batch=8} > 10
    digits/top1{stage=int8} < 95
    speed_up{stage=int8, tower=image} < 1.5

METRIC{WHERE} OP NUMBER. Without WHERE a gate applies to every row, graph (`tower`) and batch. Nothing is evaluated as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipress.bench.results import Latency, Results, Row
from clipress.errors import RecipeError, nearest

OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
FORM = re.compile(rf"\s*([\w./@-]+)\s*(?:\{{(.*)\}})?\s*({'|'.join(OPERATORS)})\s*({NUMBER})\s*")
PLACES = ("stage", "backend", "precision", "tower", "batch", "ids", "threads")
TIMED = tuple(name for name in Latency.model_fields if name not in PLACES)
COSTS = ("params", "params_without_embeddings", "block_params", "block_params_kept", "macs", "bytes")
KNOWN = (*TIMED, *COSTS)


@dataclass(frozen=True)
class Gate:
    """One condition that fails the build when it is true."""

    text: str
    metric: str
    where: tuple[tuple[str, str], ...]
    sign: str
    bound: float

    def fails(self, value: float) -> bool:
        """Return whether a value meets the condition."""
        return OPERATORS[self.sign](value, self.bound)

    def message(self, value: float, place: Sequence[str]) -> str:
        """Describe the value found and its place."""
        return f"{self.metric} is {value:g} ({', '.join(place)}), and must not be {self.sign} {self.bound:g}"


def gate_from(text: str, places: Sequence[str] = PLACES) -> Gate:
    """Parse a gate; `places` are the keys that WHERE may have. Raises RecipeError for another form."""
    form = FORM.fullmatch(text)
    if form is None:
        raise RecipeError(
            f"--fail-if '{text}': expected METRIC OP NUMBER, such as 'p99_ms > 10' or "
            f"'p99_ms{{stage=int8, batch=8}} > 10'. OP is one of {', '.join(OPERATORS)}."
        )
    metric, where, sign, bound = form.groups()
    return Gate(text.strip(), metric, tuple(_places(where or "", text, places)), sign, float(bound))


def _places(where: str, text: str, places: Sequence[str]) -> Iterator[tuple[str, str]]:
    for part in filter(None, map(str.strip, where.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in places:
            raise RecipeError(f"--fail-if '{text}': unknown key '{key}' between the braces.{nearest(key, places)}")
        if not equals or not value:
            raise RecipeError(f"--fail-if '{text}': expected '{key}=VALUE', found '{part}'.")
        yield key, value.strip("\"'")


def broken(gates: Sequence[Gate], results: Results) -> list[str]:
    """Return a message for each place where a gate's condition is true.

    Raises RecipeError for a metric, or a place, that the results do not have.
    """
    messages = []
    for gate in gates:
        found = list(_figures(results.rows, gate))
        if not found:
            raise RecipeError(_not_found(results.rows, gate))
        messages += [gate.message(value, place) for place, value in found if gate.fails(value)]
    return messages


def check(
    gates: Sequence[Gate],
    stages: Sequence[str],
    backends: Sequence[str],
    batches: Sequence[int],
    sets: Sequence[str],
    graphs: Sequence[str] | None = None,
) -> None:
    """Check gates before anything is measured, as far as possible. Raises RecipeError.

    `graphs` are the names that `tower` may have; None: not known yet.
    """
    known: dict[str, Sequence[str]] = {
        "stage": [*stages, *(f"{stage} ({backend})" for stage in stages for backend in backends)],
        "backend": backends,
        "batch": [str(batch) for batch in batches],
    }
    if graphs is not None:
        known["tower"] = graphs
    for gate in gates:
        for key, value in gate.where:
            if key in known and value not in _all_names(known[key], key):
                raise RecipeError(f"--fail-if '{gate.text}': unknown {key} '{value}'.{nearest(value, known[key])}")
        evalset = gate.metric.rpartition("/")[0]  # an accuracy's name is SET/METRIC
        if not evalset and gate.metric not in KNOWN:
            raise RecipeError(f"--fail-if '{gate.text}': unknown metric '{gate.metric}'.{nearest(gate.metric, KNOWN)}")
        if evalset and evalset not in sets:
            raise RecipeError(
                f"--fail-if '{gate.text}': accuracy on '{evalset}' is not measured."
                f"{nearest(evalset, sets) if sets else ' Leave --no-accuracy out.'}"
            )


def _all_names(names: Sequence[str], key: str) -> set[str]:
    """Among several runs, a stage may be named without its run, as in the results."""
    return {*names, *(name.rpartition("/")[2] for name in names)} if key == "stage" else set(names)


def _figures(rows: Sequence[Row], gate: Gate) -> Iterator[tuple[list[str], float]]:
    """Yield every place that a gate applies to, in words, with the metric's value there."""
    for row in rows:
        place = {"stage": row.stage, "backend": row.backend, "precision": row.precision}
        for timing in row.latency:
            here = place | {"tower": timing.tower, "batch": timing.batch, "threads": timing.threads}
            here["ids"] = timing.ids or row.text_ids
            value = getattr(timing, gate.metric) if gate.metric in TIMED else None
            if value is not None and _applies(gate, row, here):
                yield [row.stage, f"{timing.tower} tower", timing.case.size], value
        value = getattr(row, gate.metric) if gate.metric in COSTS else row.accuracy.get(gate.metric)
        if value is not None and _applies(gate, row, place):
            yield [row.stage], value


def _applies(gate: Gate, row: Row, place: Mapping[str, Any]) -> bool:
    return all(value == str(place.get(key)) or (key == "stage" and value == row.artifact) for key, value in gate.where)


def _not_found(rows: Sequence[Row], gate: Gate) -> str:
    known = {key for row in rows for key in row.accuracy} | set(COSTS)
    known |= {key for row in rows for timing in row.latency for key in timing.model_fields_set & set(TIMED)}
    if gate.metric not in known:
        return unknown_metric(gate, known)
    return nowhere(gate)


def unknown_metric(gate: Gate, known: Iterable[str]) -> str:
    """Report that the results have no such metric."""
    return f"--fail-if '{gate.text}': the results have no metric '{gate.metric}'.{nearest(gate.metric, known)}"


def nowhere(gate: Gate) -> str:
    """Report that a metric was not measured at the place that a gate names."""
    where = ", ".join(f"{key}={value}" for key, value in gate.where)
    return f"--fail-if '{gate.text}': {gate.metric} was measured nowhere with {where or 'a value'}."
