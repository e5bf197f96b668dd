"""What does padding cost? `python studies/text_length.py [MS]`: a ViT-B/32's text tower, and a training step, by length of texts.

Weights are random, since only time is measured. Lengths take turns; a ratio is to the whole 77 ids in the same rounds, the median
with its 95 % interval. Writes text_length.json and text_length.md beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import torch

from clipress.artifact import save_artifact
from clipress.bench.compare import speed_up
from clipress.bench.latency import measure_in_turns, summary
from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.export import parity
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models.load import Model, artifact_from_model, new_model
from clipress.studies.speed import conditions_of, in_int8, in_words, times_as_fast, write_tables
from clipress.tasks.clip import INPUTS

TEXT = "text"
SMALL = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1}  # its image tower is not measured
WHOLE = 77
IDS = (10, 16, 24, 32, WHOLE)
STEP_IDS = (16, 24, 32, WHOLE)
BATCHES = (1, 8, 32)
STEP_BATCH = 16


def timed(queries: dict[int, Callable[[], Any]], batch: int, duration: float, **about: Any) -> list[dict[str, Any]]:
    """Time all lengths in turns. Returns a row for each."""
    timings = measure_in_turns(queries, warm_up_ms=300, duration_ms=duration, iterations=20)
    rows = []
    for ids, own in timings.items():
        ratio = speed_up(timings[WHOLE], own)
        figures = {"speed_up": ratio.value, "low": ratio.low, "high": ratio.high}
        rounded = {key: value and round(value, 3) for key, value in figures.items()}
        rows.append({**about, "batch": batch, "ids": ids, **rounded, **summary(own, batch)})
    return rows


def tower_rows(duration: float) -> list[dict[str, Any]]:
    """Time the text tower in ONNX Runtime, float32 and INT8."""
    sets = evalsets([SourceSpec(format="scenes", split="test", limit=8)])
    dense = new_model({**open_clip.get_model_config("ViT-B-32"), "vision_cfg": SMALL}, 0)
    captions = [source.captions(i)[0] for source in (one.source for one in sets) for i in range(len(source))]
    samples = {TEXT: {INPUTS[TEXT]: torch.from_numpy(np.asarray(dense.tokenize()(captions)))}}
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as home:
        for precision, model in {"fp32": dense, "int8": in_int8(dense, samples)}.items():
            folder = Path(home) / precision
            artifact = save_artifact(
                artifact_from_model(model, ({"stage": "x", "hash": "x"},), {}), folder / "artifact"
            )
            onnx_from_artifact(artifact, folder / "export", OnnxSettings(), sets)
            runner = OnnxRuntimeRunner(folder / "export", 1)
            for batch in BATCHES:
                queries = {ids: runner.query(TEXT, batch, ids) for ids in IDS}
                rows += timed(queries, batch, duration, what=f"text tower, {precision}")
    return rows


def step_rows(duration: float) -> list[dict[str, Any]]:
    """Time a contrastive training step of the whole ViT-B/32 in torch."""
    model = new_model(open_clip.get_model_config("ViT-B-32"), 0)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=0.0, foreach=True)
    pixels = torch.randn(STEP_BATCH, 3, 224, 224)
    queries = {ids: _step(model, optimizer, pixels, torch.randint(1, 399, (STEP_BATCH, ids))) for ids in STEP_IDS}
    return timed(queries, STEP_BATCH, duration, what="training step, fp32")


def _step(model: Model, optimizer: torch.optim.Optimizer, pixels: torch.Tensor, ids: torch.Tensor) -> Callable:
    loss = open_clip.ClipLoss()

    def run() -> None:
        images = model.module.encode_image(pixels, normalize=True)
        texts = model.module.encode_text(ids, normalize=True)
        loss(images, texts, model.module.logit_scale.exp()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def markdown(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# What padding costs",
        "",
        f"{in_words(conditions)} ViT-B/32 with random weights. Texts have {WHOLE} ids with their padding; a caption has 10 to 24. The ratio is to the whole texts in the same "
        "rounds: median over rounds [95 % interval].",
        "",
        "| | batch | ids | ms | times as fast |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['batch']} | {row['ids']} | {row['median_ms']:.1f} | {times_as_fast(row)} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(duration: str = "1000") -> None:
    """Measure everything and write the tables."""
    torch.set_num_threads(1)
    parity.LIMITS["int8"] = (0.98, 0.0, 1.0)  # Weights are random, so rankings mean nothing.
    rows = tower_rows(float(duration)) + step_rows(float(duration))
    conditions = conditions_of(f"python studies/text_length.py {duration}")
    write_tables("text_length", rows, conditions, markdown(rows, conditions))


if __name__ == "__main__":
    main(*sys.argv[1:])
