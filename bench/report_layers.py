"""Tables of a report's layers: what each one costs, and where ONNX Runtime spends its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from clipress.bench.layers import ELSE
from clipress.bench.report_columns import Column, number_column, word_column
from clipress.bench.report_rows import Rows
from clipress.bench.results import LayerCost, Spent


def layer_columns(rows: Rows) -> list[Column]:
    """Return parameters and MACs per layer, models of the same shapes in one column; nothing if none has layers."""
    alike: dict[tuple[LayerCost, ...], list[str]] = {}
    for row in rows:
        if row.layers:
            alike.setdefault(row.layers, []).append(row.stage)
    if not alike:
        return []
    models = [(stages, {(one.tower, one.name): one for one in layers}) for layers, stages in alike.items()]
    names = list(dict.fromkeys(name for _, layers in models for name in layers))
    columns = [word_column("layer", [name for _, name in names]), word_column("tower", [tower for tower, _ in names])]
    for key, unit, head in (("params", 1e-3, "parameters (k)"), ("macs", 1e-6, "MACs (M)")):
        shown = [[getattr(layers[name], key) if name in layers else None for name in names] for _, layers in models]
        # bars compare blocks: an embedding table would dwarf all of them
        blocks = [v for column in shown for (_, name), v in zip(names, column, strict=True) if v and name != ELSE]
        most = max(blocks, default=1)
        for (stages, _), exact in zip(models, shown, strict=True):
            values = [None if value is None else value * unit for value in exact]
            titles = ["" if value is None else f"{value:,} {head.split(' ')[0]}" for value in exact]
            parts = [None if value is None else min(value / most, 1.0) for value in exact]
            columns.append(replace(number_column(head, ", ".join(stages), values, 2), parts=parts, titles=titles))
    return columns


def profile_tables(rows: Rows) -> Iterator[tuple[str, dict[str, list[Column]]]]:
    """Yield the title of each profile, and its tables by their names: operators and layers."""
    for i, row in enumerate(rows):
        for profile in row.profiles:
            name = f"profile-{i}-{profile.tower}"
            tables = {
                f"{name}-operators": _spent_columns("operator", profile.operators),
                f"{name}-layers": _spent_columns("layer", profile.layers),
            }
            yield f"{row.stage}, {profile.case}, {profile.queries} queries", tables


def _spent_columns(head: str, spent: Sequence[Spent]) -> list[Column]:
    shares = [one.percent / 100 for one in spent]
    return [
        word_column(head, [one.name for one in spent]),
        number_column("", "median (ms)", [one.median_ms for one in spent], 3),
        replace(number_column("", "share (%)", [one.percent for one in spent], 1), parts=shares),
        number_column("", "nodes", [one.nodes for one in spent], 0),
    ]
