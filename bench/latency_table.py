"""A latency cost table: what a block costs on the target as its widths shrink. `prune` reads it; it never measures.

One block of each tower is cut to a few widths, exported and timed with ONNX Runtime, all variants in turns. The table says,
per tower and kind of unit, the milliseconds of one block for so many levels, the other kinds at full width.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clipress.bench.latency import measure_in_turns
from clipress.models import anatomy, surgery
from clipress.models.anatomy import Block
from clipress.models.load import Model
from clipress.runtime.onnx_session import open_session

SCHEMA_VERSION = 1
POINTS = 6  # widths measured per kind


def cost_table(
    model: Model, batch: int, threads: int, duration_ms: float, done: Callable[[str], None]
) -> dict[str, Any]:
    """Measure both towers' blocks. Returns the table's `towers`; `done` is told each tower and kind."""
    firsts = {block.tower: block for block in reversed(anatomy.blocks(model.module))}
    towers = {}
    for tower, block in firsts.items():
        full = {
            "heads": block.attn.heads,
            "qk": block.attn.qk_dim,
            "v": block.attn.v_dim,
            "ffn": block.ffn_in.out_features,
        }
        towers[tower] = {}
        for kind, units in full.items():
            levels = sorted({max(round(units * part / POINTS), 1) for part in range(1, POINTS + 1)})
            towers[tower][kind] = _curve(block, kind, levels, batch, threads, duration_ms)
            done(f"{tower} {kind}")
    return {"schema_version": SCHEMA_VERSION, "batch": batch, "threads": threads, "towers": towers}


def _curve(block: Block, kind: str, levels: list[int], batch: int, threads: int, duration_ms: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((batch, block.tokens, block.width), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        queries = {}
        for level in levels:
            path = Path(folder) / f"{level}.onnx"
            _export(_narrow(block, kind, level), inputs, path)
            session = open_session(path, threads)
            queries[str(level)] = lambda session=session: session.run(None, {"x": inputs})
        measured = measure_in_turns(queries, warm_up_ms=20, duration_ms=duration_ms, iterations=10)
    times = [float(np.median(measured[str(level)].latency)) for level in levels]
    # nothing of a kind cannot be measured alone: continue the line through the two narrowest
    slope = (times[1] - times[0]) / (levels[1] - levels[0]) if len(levels) > 1 else times[0] / levels[0]
    nothing = max(times[0] - max(slope, 0.0) * levels[0], 0.0)
    return {"levels": [0, *levels], "ms": [round(ms, 6) for ms in (nothing, *times)]}


def _narrow(block: Block, kind: str, level: int) -> nn.Module:
    twin = Block(block.tower, block.name, copy.deepcopy(block.module), block.tokens)
    attn = twin.attn

    def kept(name: str, units: int) -> torch.Tensor:
        return torch.arange(units) < (level if name == kind else units)

    surgery.cut(
        twin,
        surgery.Keep(
            kept("qk", attn.qk_dim).expand(attn.heads, -1),
            kept("v", attn.v_dim).expand(attn.heads, -1),
            kept("ffn", twin.ffn_in.out_features),
            kept("heads", attn.heads),
        ),
    )
    return twin.module.eval()


def _export(module: nn.Module, inputs: np.ndarray, path: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.from_numpy(inputs),), str(path), input_names=["x"], opset_version=18, dynamo=False
        )
