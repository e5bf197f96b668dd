"""Does an exported model say what torch says? Checked on real samples before a file is shipped.

fp32: every cosine at least 0.9999, and every first place the same (equal scores aside). INT8 is held against torch with
the same quantisers, where only rounding may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipress.data.evalsets import EvalSet
from clipress.errors import ExportError
from clipress.models.exported import cpu_session
from clipress.models.load import Clip

SAMPLES = 128  # pictures per set, with their captions
# precision: (least cosine, least part of queries with the same first place, what counts as an equal score)
LIMITS = {"fp32": (0.9999, 1.0, 1e-5), "int8": (0.999, 0.95, 5e-3)}
BATCHES = (1, 3)


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from one batch to its embeddings."""
    opened = cpu_session(path)
    name = opened.get_inputs()[0].name
    return lambda batch: opened.run(None, {name: batch})[0]


def check(clip: Clip, folder: Path, sets: Sequence[EvalSet], precision: str) -> dict[str, Any]:
    """Compare both towers with torch. Returns the figures; raises ExportError when they are out of bounds."""
    if not sets:
        raise ExportError("Parity is checked on real samples, and the recipe names no 'test', 'val' or 'train' data.")
    least_cosine, least_same, equal = LIMITS[precision]
    pixels, ids = _samples(clip, sets)
    figures: dict[str, Any] = {"images": len(pixels), "texts": len(ids)}
    torch_side, onnx_side = [], []
    for tower, encode, inputs in zip(("image", "text"), clip.encoders(), (pixels, ids), strict=True):
        run = runner(folder / f"{tower}.onnx")
        wanted, found = encode(inputs), run(inputs)
        cosine = float(_cosines(wanted, found).min())
        for batch in BATCHES:
            part = run(inputs[:batch])
            if part.shape != wanted[:batch].shape:
                raise ExportError(f"{tower}.onnx gives {part.shape} for a batch of {batch}: its batch is not dynamic.")
            cosine = min(cosine, float(_cosines(wanted[:batch], part).min()))
        figures[f"{tower}_min_cosine"] = cosine
        if not cosine >= least_cosine:  # also when it is NaN
            raise ExportError(
                f"{tower}.onnx does not agree with the model it came from: least cosine {cosine:.6f} on {len(inputs)} "
                f"real samples, at least {least_cosine} is asked for at {precision}. Nothing was written."
            )
        torch_side.append(wanted)
        onnx_side.append(found)
    same = _same_first(torch_side, onnx_side, equal)
    figures["same_first_place"] = same
    if same < least_same:
        raise ExportError(
            f"The exported towers rank differently: the first place is the same for {same:.1%} of the queries, "
            f"{least_same:.0%} is asked for at {precision}. Nothing was written."
        )
    return figures


def _samples(clip: Clip, sets: Sequence[EvalSet]) -> tuple[np.ndarray, np.ndarray]:
    pixels, texts = [], []
    for evalset in sets:
        taken = next(evalset.pixel_batches(clip.preprocess, SAMPLES))
        pixels.append(taken)
        texts += [evalset.source.captions(i)[0] for i in range(len(taken))]
    return np.concatenate(pixels), clip.tokenize()(list(dict.fromkeys(texts)))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(norms, 1e-12)


def _same_first(wanted: list[np.ndarray], found: list[np.ndarray], equal: float) -> float:
    """Return the part of queries, both ways, whose first place is the same up to equal scores."""
    truth, other = wanted[0] @ wanted[1].T, found[0] @ found[1].T
    same = []
    for scores, ranked in ((truth, other), (truth.T, other.T)):
        chosen = scores[np.arange(len(scores)), ranked.argmax(1)]
        same.append(scores.max(1) - chosen <= equal)
    return float(np.concatenate(same).mean())
