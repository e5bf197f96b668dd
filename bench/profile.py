"""Time per operator kind and per layer, from ONNX Runtime's own profile.

Times are medians over queries of what all nodes of a kind, or of a layer, took in one query. A profiled session is
slower than a plain one: read the shares, not the sums.
"""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipress.bench.layers import ELSE
from clipress.bench.results import Profile, Spent
from clipress.errors import ExportError
from clipress.runtime.graph import Graph
from clipress.runtime.onnx_session import open_session

WARM_UP = 3  # queries that are run and not counted
SCOPES = "pkg.torch.onnx.name_scopes"  # The key under which the dynamo exporter records a node's module.
Events = list[Mapping[str, Any]]


def profile(path: Path, graph: Graph, batch: int, threads: int, queries: int, layers: Sequence[str]) -> Profile:
    """Profile one graph's file.

    Args:
        path: the ONNX file.
        queries: how many are counted.
        layers: module paths that nodes are grouped by; a node in none of them belongs to "all else".
    """
    events = _events(path, graph.example(batch), threads, queries + WARM_UP)
    runs = split_queries(events)[WARM_UP:]
    if not runs:
        raise ExportError(f"ONNX Runtime wrote no profile of {path}. Its release may use another format.")
    operators, by_layer = summarise(runs, _places(path, layers))
    return Profile(tower=graph.name, batch=batch, queries=len(runs), operators=operators, layers=by_layer)


def _events(path: Path, inputs: Mapping[str, np.ndarray], threads: int, queries: int) -> Events:
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, threads, profile_to=Path(folder) / "profile")
        for _ in range(queries):
            session.run(None, dict(inputs))
        return json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))


def split_queries(events: Iterable[Mapping[str, Any]]) -> list[Events]:
    """Return the nodes of each query in the order they ran; the event of a query follows those of its nodes."""
    runs: list[Events] = [[]]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[-1].append(event)
        elif event.get("name") == "model_run":
            runs.append([])
    return [run for run in runs if run]


def summarise(runs: Sequence[Events], places: Mapping[str, str]) -> tuple[tuple[Spent, ...], tuple[Spent, ...]]:
    """Sum the nodes of each query, by operator and by layer. `places` maps the file's nodes to their layers."""
    operators = _summed(runs, lambda run: [node["args"].get("op_name", "?") for node in run])
    return operators, _summed(runs, lambda run: _layers_of(run, places))


def _summed(runs: Sequence[Events], names_of: Callable[[Events], list[str]]) -> tuple[Spent, ...]:
    names = list(dict.fromkeys(name for run in runs for name in names_of(run)))
    times, counts = np.zeros((len(runs), len(names))), np.zeros(len(names), int)
    for i, run in enumerate(runs):
        for node, name in zip(run, names_of(run), strict=True):
            times[i, names.index(name)] += node["dur"] / 1000
            counts[names.index(name)] += 1
    medians = np.median(times, axis=0)
    whole = medians.sum() or 1.0
    rows = [
        Spent(name=name, median_ms=round(float(ms), 5), percent=round(float(100 * ms / whole), 2), nodes=int(n))
        for name, ms, n in zip(names, medians, counts // len(runs), strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: -row.median_ms))


def _places(path: Path, layers: Sequence[str]) -> dict[str, str]:
    """Return the layer of every node of the file, by the node's name."""
    import onnx

    return {node.name: layer_of(node, layers) for node in onnx.load(path, load_external_data=False).graph.node}


def layer_of(node: Any, layers: Sequence[str]) -> str:
    """Return which layer a node belongs to, by its recorded scopes or its name."""
    scope = f".{_scope(node).strip('.')}."
    return next((layer for layer in layers if f".{layer}." in scope), ELSE)


def _scope(node: Any) -> str:
    for prop in node.metadata_props:
        if prop.key == SCOPES:
            scopes = ast.literal_eval(prop.value)  # a list of strings, written as Python shows it
            return max((str(scope) for scope in scopes[:-1]), key=len, default="")
    return node.name.replace("/", ".")


def _layers_of(run: Events, places: Mapping[str, str]) -> list[str]:
    """Return each node's layer. A node made by fusion has no scope: it counts to the layer of the node before it."""
    found, before = [], ELSE
    for node in run:
        name = node["name"].removesuffix("_kernel_time")
        own = places.get(name)
        if own is None:  # fused nodes often keep the beginning of a name
            known = [place for place in places if place and name.startswith(place)]
            own = places[max(known, key=len)] if known else before
        found.append(own)
        before = own
    return found
