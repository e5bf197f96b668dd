"""A latency cost table: what a block costs on the target as its widths shrink. `prune` reads it and never measures.

One block of each tower is cut to a few widths, exported and timed with ONNX Runtime, all variants in turns. Per tower and
kind of unit, the table has the milliseconds of one block at so many levels, with the other kinds at full width.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clipress.bench.latency import measure_in_turns
from clipress.errors import RecipeError
from clipress.models import anatomy, surgery
from clipress.models.anatomy import Attn, Block, Part
from clipress.models.load import Model
from clipress.runtime.onnx_session import open_session

SCHEMA_VERSION = 1
POINTS = 6  # widths measured per kind


@dataclass(frozen=True)
class Conditions:
    """Settings for timing blocks."""

    batch: int
    threads: int
    duration_ms: float


def cost_table(
    model: Model, batch: int, threads: int, duration_ms: float, done: Callable[[str], None]
) -> dict[str, Any]:
    """Measure one block of each tower. `done` is called with each tower and kind that has been measured.

    Raises RecipeError for blocks with cross-attentions, whose costs the table cannot tell from those of their self-attention.
    """
    if crossed := next((block for block in anatomy.blocks(model.module) if block.memory), None):
        raise RecipeError(
            f"latency-table: expected blocks with one attention, found {crossed.name} with cross-attentions too. Use a budget "
            "of params or macs."
        )
    conditions = Conditions(batch, threads, duration_ms)
    firsts: dict[str, Block] = {}
    for block in filter(lambda block: block.attends, anatomy.blocks(model.module)):  # ConvNeXt's are of many shapes
        firsts.setdefault(block.tower, block)
    towers: dict[str, dict[str, Any]] = {}
    for tower, block in firsts.items():
        towers[tower] = {}
        for index, part in enumerate(block.parts):
            for kind, units in unit_counts(part).items():
                towers[tower][kind] = _curve(
                    block, index, kind, levels_of(units, part.qk_unit if kind == "qk" else 1), conditions
                )
                done(f"{tower} {kind}")
    return {"schema_version": SCHEMA_VERSION, "batch": batch, "threads": threads, "towers": towers}


def unit_counts(part: Part) -> dict[str, int]:
    """Return how many units a part has of each kind that can be cut."""
    if not isinstance(part, Attn):
        return {"ffn": part.hidden}
    return {"heads": part.module.heads, "qk": part.module.qk_dim, "v": part.module.v_dim}


def levels_of(units: int, step: int = 1) -> list[int]:
    """Return the widths that are measured, multiples of `step`."""
    return sorted({step * max(round(units // step * point / POINTS), 1) for point in range(1, POINTS + 1)})


def _curve(block: Block, index: int, kind: str, levels: list[int], conditions: Conditions) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((conditions.batch, block.tokens, block.width), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        queries = {}
        for level in levels:
            path = Path(folder) / f"{level}.onnx"
            _export(narrow_block(block, index, kind, level), inputs, path)
            session = open_session(path, conditions.threads)
            queries[str(level)] = lambda session=session: session.run(None, {"x": inputs})
        measured = measure_in_turns(queries, warm_up_ms=20, duration_ms=conditions.duration_ms, iterations=10)
    times = [float(np.median(measured[str(level)].latency)) for level in levels]
    # a block without any unit of a kind cannot be measured alone: extend the line through the two narrowest
    slope = (times[1] - times[0]) / (levels[1] - levels[0]) if len(levels) > 1 else times[0] / levels[0]
    at_zero = max(times[0] - max(slope, 0.0) * levels[0], 0.0)
    return {"levels": [0, *levels], "ms": [round(ms, 6) for ms in (at_zero, *times)]}


def narrow_block(block: Block, index: int, kind: str, level: int) -> nn.Module:
    """Return a copy of a block whose part number `index` keeps the first `level` units of one kind."""
    twin = replace(block, module=copy.deepcopy(block.module))
    part = twin.parts[index]
    kept = torch.arange(unit_counts(part)[kind]) < level
    if not isinstance(part, Attn):
        surgery.cut(part, surgery.FfnMask(kept))
    elif kind == "heads":
        surgery.cut(part, surgery.AttnMask(heads=kept))
    else:
        surgery.cut(part, surgery.AttnMask(**{kind: kept.expand(part.module.heads, -1)}))
    return twin.module.eval()


def _export(module: nn.Module, inputs: np.ndarray, path: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.from_numpy(inputs),), str(path), input_names=["x"], opset_version=18, dynamo=False
        )
