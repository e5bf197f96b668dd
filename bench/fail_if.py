"""`--fail-if`: what must not be true of the results, for CI.

    p99_ms > 10
    p99_ms{stage=int8, tower=image, batch=8} > 10
    digits/top1{stage=int8} < 95
    speed_up{stage=int8, tower=image} < 1.5

METRIC{WHERE} OP NUMBER. Without WHERE a gate holds for every row, tower and batch. Nothing is ever evaluated as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
PLACES = ("stage", "backend", "precision", "tower", "batch", "threads")


@dataclass(frozen=True)
class Gate:
    """One condition that breaks the build when it is true."""

    text: str
    metric: str
    where: tuple[tuple[str, str], ...]
    sign: str
    bound: float


def gate_from(text: str, places: Sequence[str] = PLACES) -> Gate:
    """Read a gate; `places` are the keys that say where. Raises RecipeError when it has another form."""
    form = FORM.fullmatch(text)
    if form is None:
        raise RecipeError(
            f"--fail-if '{text}': METRIC OP NUMBER is asked for, such as 'p99_ms > 10' or "
            f"'p99_ms{{stage=int8, batch=8}} > 10'; OP is one of {', '.join(OPERATORS)}."
        )
    metric, where, sign, bound = form.groups()
    return Gate(text.strip(), metric, tuple(_places(where or "", text, places)), sign, float(bound))


def _places(where: str, text: str, places: Sequence[str]) -> Iterator[tuple[str, str]]:
    for part in filter(None, map(str.strip, where.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in places:
            raise RecipeError(f"--fail-if '{text}': '{key}' says nothing about where.{nearest(key, places)}")
        if not equals or not value:
            raise RecipeError(f"--fail-if '{text}': '{key}=VALUE' is asked for, found '{part}'.")
        yield key, value.strip("\"'")


def broken(gates: Sequence[Gate], results: dict[str, Any]) -> list[str]:
    """Return a message for each place where a gate's condition is true.

    Raises RecipeError for a metric, or a place, that the results do not have.
    """
    told = []
    for gate in gates:
        found = list(_figures(results["rows"], gate))
        if not found:
            raise RecipeError(_nothing(results["rows"], gate))
        for place, value in found:
            if OPERATORS[gate.sign](value, gate.bound):
                told.append(
                    f"{gate.metric} is {value:g} ({', '.join(place)}), and must not be {gate.sign} {gate.bound:g}"
                )
    return told


def check(
    gates: Sequence[Gate],
    stages: Sequence[str],
    backends: Sequence[str],
    batches: Sequence[int],
    sets: Sequence[str],
) -> None:
    """Check before anything is measured what can be known by then. Raises RecipeError."""
    known = {
        "stage": [*stages, *(f"{stage} ({backend})" for stage in stages for backend in backends)],
        "backend": backends,
        "tower": ["image", "text"],
        "batch": [str(batch) for batch in batches],
    }
    for gate in gates:
        for key, value in gate.where:
            if key in known and value not in _all_names(known[key], key):
                raise RecipeError(f"--fail-if '{gate.text}': there is no {key} '{value}'.{nearest(value, known[key])}")
        evalset = gate.metric.rpartition("/")[0]  # an accuracy's name is SET/METRIC
        if not evalset and gate.metric not in KNOWN:
            raise RecipeError(
                f"--fail-if '{gate.text}': there is no metric '{gate.metric}'.{nearest(gate.metric, KNOWN)}"
            )
        if evalset and evalset not in sets:
            raise RecipeError(
                f"--fail-if '{gate.text}': accuracy on '{evalset}' is not measured."
                f"{nearest(evalset, sets) if sets else ' Leave --no-accuracy out.'}"
            )


def _all_names(names: Sequence[str], key: str) -> set[str]:
    """A stage of one run among several may be called without its run, as in results."""
    return {*names, *(name.rpartition("/")[2] for name in names)} if key == "stage" else set(names)


TIMED = (
    *("min_ms", "max_ms", "mean_ms", "median_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "cv_percent"),
    *("throughput_qps", "items_per_s", "iterations", "rounds", "speed_up", "speed_up_low", "speed_up_high"),
    *("enqueue_mean_ms", "enqueue_median_ms", "enqueue_p99_ms"),
)
WEIGHED = ("params", "params_without_embeddings", "block_params", "block_params_kept", "macs", "bytes")
KNOWN = (*TIMED, *WEIGHED)


def _figures(rows: Sequence[dict[str, Any]], gate: Gate) -> Iterator[tuple[list[str], float]]:
    """Yield every place a gate speaks of, in words, with the metric's value there."""
    for row in rows:
        for timing in row.get("latency", ()):
            if gate.metric in timing and timing[gate.metric] is not None and _is_there(gate, row | timing):
                yield [row["stage"], f"{timing['tower']} tower", f"batch {timing['batch']}"], timing[gate.metric]
        whole = {key: row[key] for key in WEIGHED if key in row} | row.get("accuracy", {})
        if gate.metric in whole and _is_there(gate, row):
            yield [row["stage"]], whole[gate.metric]


def _is_there(gate: Gate, place: dict[str, Any]) -> bool:
    return all(value in _names(place, key) for key, value in gate.where)


def _names(place: dict[str, Any], key: str) -> set[str]:
    names = {str(place.get(key))}
    return names | {str(place.get("artifact"))} if key == "stage" else names


def _nothing(rows: Sequence[dict[str, Any]], gate: Gate) -> str:
    known = {key for row in rows for key in row.get("accuracy", {})} | set(WEIGHED)
    known |= {key for row in rows for timing in row.get("latency", ()) for key in timing if key in TIMED}
    if gate.metric not in known:
        return unknown_metric(gate, known)
    return nowhere(gate)


def unknown_metric(gate: Gate, known: Iterable[str]) -> str:
    """Say that the results have no such metric."""
    return f"--fail-if '{gate.text}': the results have no metric '{gate.metric}'.{nearest(gate.metric, known)}"


def nowhere(gate: Gate) -> str:
    """Say that a metric was not measured at the place a gate speaks of."""
    asked = ", ".join(f"{key}={value}" for key, value in gate.where)
    return f"--fail-if '{gate.text}': {gate.metric} was measured nowhere with {asked or 'a value'}."
