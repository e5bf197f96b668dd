"""A study: methods × ratios × seeds from one recipe, each run in a process of its own, gathered into one table.

The file names a base recipe, the methods' stages and where the ratio goes; see configs/studies/. Every run is an ordinary
run folder; a study that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from pydantic import Field

from clipress.errors import ArtifactError, RecipeError
from clipress.recipe import Recipe, Section, checked, read_recipe

SCHEMA_VERSION = 1


class Study(Section):
    """A study file."""

    name: str
    recipe: str
    """The base, relative to the study file; its stages are replaced."""
    methods: dict[str, list[dict[str, Any]]]
    """Stages of each method, the first one a prune."""
    reference: str
    """The method whose losses the others' are compared with."""
    ratios: dict[str, float]
    """Name and what is kept, put into the first stage's budget."""
    seeds: dict[str, tuple[int, ...]]
    """Per ratio."""
    bench: dict[str, Any] = Field(default_factory=dict)


class Case(Section):
    """One run of a study."""

    method: str
    ratio: str
    seed: int
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{self.method}-{self.ratio}-s{self.seed}"


def read_study(path: Path) -> tuple[Study, list[Case]]:
    """Read a study and spell out its runs; every recipe is checked."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"Study {path} cannot be read: {error}") from None
    study = checked(Study, raw, "study")
    base = read_recipe(path.parent / study.recipe).model_dump(exclude_none=True)
    cases = []
    for ratio, kept in study.ratios.items():
        for seed in study.seeds[ratio]:  # methods side by side, so that a slow hour hits all of them
            for method, stages in study.methods.items():
                recipe = copy.deepcopy(base) | {"name": f"{study.name}-{method}", "seed": seed, "bench": study.bench}
                recipe["stages"] = copy.deepcopy(stages)
                recipe["stages"][0]["prune"]["budget"] = {"params": kept}
                cases.append(
                    Case(method=method, ratio=ratio, seed=seed, recipe=checked(Recipe, recipe, method).model_dump())
                )
    return study, cases


def row_of(case: Case, run: Path) -> dict[str, Any]:
    """Read what a finished run measured: accuracy after each stage, cost, latency against the dense teacher."""
    try:
        results = json.loads((run / "bench" / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{run} holds no readable results ({error}); run the study again.") from None
    teacher, pruned, recovered = results["rows"][:3]
    search = next(record for record in pruned["lineage"] if record["stage"] == pruned["stage"])
    details = search["details"]
    speed = _milliseconds(recovered) / _milliseconds(teacher)
    return {
        "method": case.method,
        "ratio": case.ratio,
        "seed": case.seed,
        "dense": teacher["accuracy"],
        "after_slimming": pruned["accuracy"],
        "after_recovery": recovered["accuracy"],
        "block_params_kept": pruned["block_params_kept"],
        "macs": pruned["macs"],
        "dense_macs": teacher["macs"],
        "latency_ms": round(_milliseconds(recovered), 4),
        "latency_of_dense": round(speed, 4),
        "search_seconds_per_step": round(details["seconds"] / details["steps"], 4),
        "peak_memory_mb": search["peak_memory_mb"],
        "shapes": details["shapes"],
        "date": results["conditions"]["date"],
    }


def _milliseconds(row: dict[str, Any]) -> float:
    """Median of both towers at the largest batch, added."""
    largest = max(timing["batch"] for timing in row["latency"])
    return sum(timing["median_ms"] for timing in row["latency"] if timing["batch"] == largest)


def recall(accuracy: dict[str, float]) -> float:
    """Mean R@1 of both ways over all retrieval sets."""
    return mean(value for key, value in accuracy.items() if key.endswith(("/text_r1", "/image_r1")))


def _top1(accuracy: dict[str, float]) -> float:
    return mean(value for key, value in accuracy.items() if key.endswith("/top1"))


def lost(row: dict[str, Any], when: str) -> float:
    """Points of mean R@1 lost against the dense teacher."""
    return recall(row["dense"]) - recall(row[when])


def summary(study: Study, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gather seeds: mean and standard deviation of what people compare, per ratio and method."""
    gathered = []
    for ratio in study.ratios:
        for method in study.methods:
            mine = [row for row in rows if (row["ratio"], row["method"]) == (ratio, method)]
            if not mine:
                continue
            columns = {
                "r1_after_slimming": [recall(row["after_slimming"]) for row in mine],
                "r1_after_recovery": [recall(row["after_recovery"]) for row in mine],
                "lost_after_slimming": [lost(row, "after_slimming") for row in mine],
                "lost_after_recovery": [lost(row, "after_recovery") for row in mine],
                "top1_after_slimming": [_top1(row["after_slimming"]) for row in mine],
                "top1_after_recovery": [_top1(row["after_recovery"]) for row in mine],
                "macs_m": [row["macs"] / 1e6 for row in mine],
                "latency_of_dense": [row["latency_of_dense"] for row in mine],
                "search_seconds_per_step": [row["search_seconds_per_step"] for row in mine],
                "peak_memory_mb": [row["peak_memory_mb"] for row in mine],
            }
            spread = {
                key: (mean(values), stdev(values) if len(values) > 1 else None) for key, values in columns.items()
            }
            gathered.append({"ratio": ratio, "method": method, "seeds": len(mine), **spread})
    return gathered


def markdown(study: Study, rows: Sequence[dict[str, Any]], conditions: dict[str, Any]) -> str:
    """Write the table for people: mean ± standard deviation over seeds."""
    dense = rows[0]["dense"]
    lines = [
        f"# Study: {study.name}",
        "",
        f"Dense teacher: mean R@1 {recall(dense):.1f} %, zero-shot top-1 {_top1(dense):.1f} %. "
        "R@1 is the mean of both ways on the test split; *lost* is in points against the dense teacher. Latency: ONNX Runtime, "
        "median of both towers at the largest batch, against the dense teacher measured in turns with it.",
        "",
        "| ratio | method | seeds | R@1 slimmed | R@1 recovered | lost slimmed | lost recovered | of "
        f"{study.reference}'s loss | top-1 slimmed | top-1 recovered | MACs (M) | latency | s/step | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    table = summary(study, rows)
    reference = {row["ratio"]: row for row in table if row["method"] == study.reference}
    for row in table:
        base = reference.get(row["ratio"])
        share = "–"
        if base:
            parts = [
                row[key][0] / base[key][0] for key in ("lost_after_slimming", "lost_after_recovery") if base[key][0]
            ]
            share = " / ".join(f"{part:.0%}" for part in parts)
        told = [
            _told(row[key], 1)
            for key in ("r1_after_slimming", "r1_after_recovery", "lost_after_slimming", "lost_after_recovery")
        ]
        rest = [_told(row["top1_after_slimming"], 1), _told(row["top1_after_recovery"], 1), _told(row["macs_m"], 1)]
        rest += [
            _told(row["latency_of_dense"], 3),
            _told(row["search_seconds_per_step"], 3),
            _told(row["peak_memory_mb"], 0),
        ]
        lines.append("| " + " | ".join([row["ratio"], row["method"], str(row["seeds"]), *told, share, *rest]) + " |")
    lines += ["", "Conditions: " + ", ".join(f"{key} {value}" for key, value in conditions.items()) + "."]
    return "\n".join(lines) + "\n"


def _told(value: tuple[float, float | None], decimals: int) -> str:
    average, spread = value
    return f"{average:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")


COLOURS = ("#0b62c4", "#c4510b", "#6b6b6b", "#2a8a4a", "#8a2a7a", "#a08a10")


def picture(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Draw R@1 after recovery against latency, one line per method, as SVG."""
    table = summary(study, rows)
    points = {
        method: sorted(
            (row["latency_of_dense"][0], row["r1_after_recovery"][0], row["ratio"])
            for row in table
            if row["method"] == method
        )
        for method in study.methods
    }
    everything = [point for line in points.values() for point in line]
    dense = recall(rows[0]["dense"])
    low = min([point[1] for point in everything] + [dense]) - 2
    right = max([point[0] for point in everything] + [1.0]) * 1.02

    def at(x: float, y: float) -> tuple[float, float]:
        return 70 + 600 * x / right, 30 + 340 * (dense + 2 - y) / (dense + 2 - low)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 440" font-family="sans-serif" font-size="13">',
        '<rect width="720" height="440" fill="white"/>',
    ]
    for tick in range(int(low // 5 + 1) * 5, int(dense + 2) + 1, 5):
        _, y = at(0, tick)
        parts.append(
            f'<line x1="70" x2="670" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/><text x="62" y="{y + 4:.1f}" text-anchor="end">{tick}</text>'
        )
    for tick in (0.25, 0.5, 0.75, 1.0):
        x, _ = at(tick, 0)
        parts.append(f'<text x="{x:.1f}" y="390" text-anchor="middle">{tick}</text>')
    x, y = at(1.0, dense)
    parts.append(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/><text x="{x - 8:.1f}" y="{y - 8:.1f}" text-anchor="end">dense teacher</text>'
    )
    for line, colour in zip(points.values(), COLOURS * 3, strict=False):
        placed = [(*at(x, y), ratio) for x, y, ratio in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, ratio in placed:
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/><text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" fill="{colour}">{ratio}</text>'
            )
    for place, (method, colour) in enumerate(zip(study.methods, COLOURS * 3, strict=False)):
        parts.append(f'<text x="{90 + 150 * place}" y="425" fill="{colour}" font-weight="bold">{method}</text>')
    parts.append('<text x="370" y="408" text-anchor="middle">latency, of the dense teacher</text>')
    parts.append(
        '<text x="20" y="200" transform="rotate(-90 20 200)" text-anchor="middle">mean R@1 after recovery (%)</text></svg>'
    )
    return "\n".join(parts) + "\n"
