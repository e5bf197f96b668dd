"""A latency cost table: what a block costs on the target as its widths shrink. `prune` reads it and never measures.

One block of each tower is cut to a few widths, exported and timed with ONNX Runtime, all variants in turns. Per tower and
kind of unit, the table has the milliseconds of one block at so many levels, with the other kinds at full width. A block with
cross-attentions reads memories of their full length, and makes keys and values of them in every pass.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipress.bench.latency import measure_in_turns
from clipress.models import anatomy, surgery
from clipress.models.anatomy import Attn, Block, Part
from clipress.models.load import Model
from clipress.models.parts import cost_name
from clipress.runtime.onnx_session import open_session

SCHEMA_VERSION = 1
POINTS = 6  # widths measured per kind


@dataclass(frozen=True)
class Conditions:
    """Settings for timing blocks."""

    batch: int
    threads: int
    duration_ms: float


@dataclass(frozen=True)
class Cuttable:
    """One kind of unit in a block, which is measured at several widths."""

    block: Block
    index: int
    """Which part of the block has these units."""
    kind: str
    """`heads`, `qk`, `v` or `ffn`."""

    @property
    def part(self) -> Part:
        return self.block.parts[self.index]

    @property
    def name(self) -> str:
        """The key in the table."""
        return cost_name(self.part, self.kind)

    @property
    def levels(self) -> list[int]:
        """The widths that are measured."""
        return levels_of(unit_counts(self.part)[self.kind], self.part.qk_unit if self.kind == "qk" else 1)


def cuttables(model: nn.Module) -> list[Cuttable]:
    """Return what is measured: every kind of unit in the first block of each tower; of equal cross-attentions the first."""
    found: dict[tuple[str, str], Cuttable] = {}
    for tower in anatomy.towers(model):
        # ConvNeXt's blocks are of many shapes, so one cannot stand for all.
        blocks = (block for block in anatomy.blocks(model) if block.tower == tower and block.attends)
        for block in islice(blocks, 1):
            for index, part in enumerate(block.parts):
                for kind in unit_counts(part):
                    one = Cuttable(block, index, kind)
                    found.setdefault((tower, one.name), one)
    return list(found.values())


def cost_table(
    model: Model, batch: int, threads: int, duration_ms: float, done: Callable[[str], None]
) -> dict[str, Any]:
    """Measure one block of each tower. `done` is called with each tower and kind that has been measured."""
    conditions = Conditions(batch, threads, duration_ms)
    towers: dict[str, dict[str, Any]] = {}
    for one in cuttables(model.module):
        towers.setdefault(one.block.tower, {})[one.name] = _curve(one, conditions)
        done(f"{one.block.tower} {one.name}")
    return {"schema_version": SCHEMA_VERSION, "batch": batch, "threads": threads, "towers": towers}


def unit_counts(part: Part) -> dict[str, int]:
    """Return how many units a part has of each kind that can be cut."""
    if not isinstance(part, Attn):
        return {"ffn": part.hidden}
    return {"heads": part.module.heads, "qk": part.module.qk_dim, "v": part.module.v_dim}


def levels_of(units: int, step: int = 1) -> list[int]:
    """Return the widths that are measured, multiples of `step`."""
    return sorted({step * max(round(units // step * point / POINTS), 1) for point in range(1, POINTS + 1)})


def _curve(one: Cuttable, conditions: Conditions) -> dict[str, Any]:
    inputs, levels = inputs_of(one.block, conditions.batch), one.levels
    with tempfile.TemporaryDirectory() as folder:
        queries = {}
        for level in levels:
            path = Path(folder) / f"{level}.onnx"
            _export(Alone(narrow_block(one.block, one.index, one.kind, level)), inputs, path)
            session = open_session(path, conditions.threads)
            queries[str(level)] = lambda session=session: session.run(None, inputs)
        measured = measure_in_turns(queries, warm_up_ms=20, duration_ms=conditions.duration_ms, iterations=10)
    times = [float(np.median(measured[str(level)].latency)) for level in levels]
    # a block without any unit of a kind cannot be measured alone: extend the line through the two narrowest
    slope = (times[1] - times[0]) / (levels[1] - levels[0]) if len(levels) > 1 else times[0] / levels[0]
    at_zero = max(times[0] - max(slope, 0.0) * levels[0], 0.0)
    return {"levels": [0, *levels], "ms": [round(ms, 6) for ms in (at_zero, *times)]}


def inputs_of(block: Block, batch: int) -> dict[str, np.ndarray]:
    """Return random tokens `x` of a block, and `memory_0`, ... that its cross-attentions read."""
    rng = np.random.default_rng(0)
    sizes = {"x": (block.tokens, block.width)}
    crosses = [part for part in block.parts if isinstance(part, Attn) and part.is_cross]
    sizes |= {f"memory_{number}": (part.memory, part.memory_width) for number, part in enumerate(crosses)}
    return {name: rng.standard_normal((batch, *size), dtype=np.float32) for name, size in sizes.items()}


class Alone(nn.Module):
    """A block that is called with its tokens and memories, without masks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *memories: Tensor) -> Tensor:
        """Run the block on [B, N, W] and memories [B, M, V]."""
        return self.block(x, memories=memories) if memories else self.block(x)


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


def _export(module: nn.Module, inputs: Mapping[str, np.ndarray], path: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        tensors = tuple(map(torch.from_numpy, inputs.values()))
        torch.onnx.export(module, tensors, str(path), input_names=list(inputs), opset_version=18, dynamo=False)
