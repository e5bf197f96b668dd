"""Where ONNX Runtime spends a query: its own profile, summed per operator kind and per layer.

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
from clipress.bench.runners import noise
from clipress.errors import ExportError
from clipress.runtime.onnx_session import open_session

WARM_UP = 3  # queries that are run and left out
SCOPES = "pkg.torch.onnx.name_scopes"  # where the dynamo exporter notes which module a node comes from


def profile(path: Path, tower: str, batch: int, threads: int, queries: int, layers: Sequence[str]) -> dict[str, Any]:
    """Profile one tower. Returns `{tower, batch, queries, operators, layers}`, both lists by falling time.

    layers: module paths that nodes are gathered under; what lies in none of them is "all else".
    """
    events = _events(path, tower, batch, threads, queries + WARM_UP)
    runs = _per_query(events)[WARM_UP:]
    if not runs:
        raise ExportError(f"ONNX Runtime wrote no profile of {path}; its release may write another format.")
    places = _places(path, layers)
    operators = _summed(runs, lambda run: [node["args"].get("op_name", "?") for node in run])
    by_layer = _summed(runs, lambda run: _layers_of(run, places, layers))
    return {"tower": tower, "batch": batch, "queries": len(runs), "operators": operators, "layers": by_layer}


def _events(path: Path, tower: str, batch: int, threads: int, queries: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, threads, profile_to=Path(folder) / "profile")
        takes = session.get_inputs()[0]
        inputs = noise(tower, (batch, *takes.shape[1:]))
        for _ in range(queries):
            session.run(None, {takes.name: inputs})
        return json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))


def _per_query(events: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the nodes of each query in the order they ran; the event of a query comes after those of its nodes."""
    runs: list[list[Mapping[str, Any]]] = [[]]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[-1].append(event)
        elif event.get("name") == "model_run":
            runs.append([])
    return [run for run in runs if run]


def _summed(runs: list[list[Mapping[str, Any]]], names_of: Callable[[list], list[str]]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for run in runs for name in names_of(run)))
    times, counts = np.zeros((len(runs), len(names))), np.zeros(len(names), int)
    for i, run in enumerate(runs):
        for node, name in zip(run, names_of(run), strict=True):
            times[i, names.index(name)] += node["dur"] / 1000
            counts[names.index(name)] += 1
    medians = np.median(times, axis=0)
    whole = medians.sum() or 1.0
    rows = [
        {"name": name, "median_ms": round(float(ms), 5), "percent": round(float(100 * ms / whole), 2), "nodes": int(n)}
        for name, ms, n in zip(names, medians, counts // len(runs), strict=True)
    ]
    return sorted(rows, key=lambda row: -row["median_ms"])


def _places(path: Path, layers: Sequence[str]) -> dict[str, str]:
    """Return the layer of every node of the file, by the node's name."""
    import onnx

    return {node.name: _layer(_scope(node), layers) for node in onnx.load(path, load_external_data=False).graph.node}


def _scope(node: Any) -> str:
    for prop in node.metadata_props:
        if prop.key == SCOPES:
            scopes = ast.literal_eval(prop.value)  # a list of strings, written as Python shows it
            return max((str(scope) for scope in scopes[:-1]), key=len, default="")
    return node.name.replace("/", ".")


def _layer(scope: str, layers: Sequence[str]) -> str:
    return next((layer for layer in layers if f".{layer}." in f".{scope.strip('.')}."), ELSE)


def _layers_of(run: list[Mapping[str, Any]], places: Mapping[str, str], layers: Sequence[str]) -> list[str]:
    """Return each node's layer. A node that fusion made has no place of its own: it counts to the one run before it."""
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
