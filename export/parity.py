"""Does an exported model say what torch says? Checked on real samples before a file is shipped.

fp32: every cosine at least 0.9999, and every first place the same (equal scores aside). INT8 is held against torch with
the same quantisers, where only rounding may differ; ONNX Runtime's own quantisation rounds in more places. A file put together from the towers' is held against them, one in
float16 against the float32 one. An engine is held against ONNX Runtime on the file it was built
from: TF32 in what is called fp32, fewer bits of mantissa, and for int8 both its rounding and theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipress.data.eval_sets import EvalSet
from clipress.data.transforms import Preprocess
from clipress.errors import ExportError
from clipress.models.load import Model
from clipress.runtime.onnx_session import open_session

SAMPLES = 128  # pictures per set, with their captions
# precision: (least cosine, least part of queries with the same first place, what counts as an equal score)
LIMITS = {
    "fp32": (0.9999, 1.0, 1e-5),
    "int8": (0.999, 0.95, 5e-3),
    "static int8": (0.99, 0.95, 2e-2),
    "fp16": (0.999, 0.97, 5e-3),
    "int8-fp16": (0.99, 0.95, 2e-2),
    "fp32 engine": (0.9999, 0.99, 1e-3),
    "fp16 engine": (0.999, 0.97, 5e-3),
    "bf16 engine": (0.99, 0.95, 2e-2),
    "int8 engine": (0.99, 0.95, 2e-2),
}
BATCHES = (1, 3)  # beside all samples at once
Encode = Callable[[np.ndarray], np.ndarray]
Feeds = Mapping[str, np.ndarray]  # a graph's inputs by their names
Run = Callable[[Feeds], dict[str, np.ndarray]]  # -> its outputs by theirs


def runner(path: Path, float16: bool = False) -> Encode:
    """Return a function from one batch to its embeddings; `float16` as in `open_session`."""
    opened = open_session(path, float16=float16)
    name = opened.get_inputs()[0].name
    return lambda batch: opened.run(None, {name: batch})[0]


def all_outputs(path: Path, float16: bool = False) -> Run:
    """Return a function from a file's inputs to all its outputs, by names; `float16` as in `open_session`."""
    opened = open_session(path, float16=float16)
    names = [output.name for output in opened.get_outputs()]
    return lambda feeds: dict(zip(names, opened.run(None, dict(feeds)), strict=True))


def check(model: Model, folder: Path, inputs: Mapping[str, np.ndarray], precision: str) -> dict[str, Any]:
    """Compare both towers with torch on `samples`. Returns the figures; raises ExportError when they are out of bounds."""
    towers = dict(zip(("image", "text"), model.encoders(), strict=True))
    files = {tower: runner(folder / f"{tower}.onnx") for tower in towers}
    figures = compare(towers, files, inputs, precision, {tower: f"{tower}.onnx" for tower in towers})
    return {"images": len(inputs["image"]), "texts": len(inputs["text"]), "batches": [*BATCHES, "all"], **figures}


def compare(
    reference: Mapping[str, Encode],
    candidate: Mapping[str, Encode],
    inputs: Mapping[str, np.ndarray],
    precision: str,
    names: Mapping[str, str],
    batches: Sequence[int] = BATCHES,
) -> dict[str, float]:
    """Hold encoders against the ones they came from, tower by tower and, when both are there, by ranking.

    Each is asked for all inputs at once, which is the largest batch, and for the first ones in `batches`.

    Returns the figures; raises ExportError when they are out of `precision`'s bounds. `names` are for messages.
    """
    least_cosine, least_same, equal = LIMITS[precision]
    figures, embeddings = {}, []
    for tower, encode in reference.items():
        wanted, found = encode(inputs[tower]), candidate[tower](inputs[tower])
        cosine = float(_cosines(wanted, found).min())
        for batch in batches:
            part = candidate[tower](inputs[tower][:batch])
            if part.shape != wanted[:batch].shape:
                raise ExportError(
                    f"{names[tower]} gives {part.shape} for a batch of {batch}: its batch is not dynamic."
                )
            cosine = min(cosine, float(_cosines(wanted[:batch], part).min()))
        figures[f"{tower}_min_cosine"] = cosine
        if not cosine >= least_cosine:  # also when it is NaN
            raise ExportError(
                f"{names[tower]} does not agree with the model it came from: least cosine {cosine:.6f} on "
                f"{len(inputs[tower])} samples, at least {least_cosine} is asked for at {precision}. "
                "Nothing was written."
            )
        embeddings.append((wanted, found))
    if len(embeddings) == 2:
        same = _same_first(*(list(side) for side in zip(*embeddings, strict=True)), equal)
        figures["same_first_place"] = same
        if same < least_same:
            raise ExportError(
                f"{' and '.join(names.values())} rank differently: the first place is the same for {same:.1%} of the "
                f"queries, {least_same:.0%} is asked for at {precision}. Nothing was written."
            )
    return figures


def same_outputs(
    reference: Run, candidate: Run, cases: Sequence[Feeds], limits: Mapping[str, float], name: str
) -> dict[str, float]:
    """Hold a file against those it was made from, output by output.

    `limits` are the largest differences allowed. Returns the ones found; raises ExportError when one is out of bounds.
    """
    figures: dict[str, float] = {}
    for case in cases:
        found = candidate(case)
        for output, wanted in reference(case).items():
            if wanted.shape != found[output].shape:
                raise ExportError(
                    f"{name}: {output} is {found[output].shape}, {wanted.shape} is asked for: its batch is not dynamic. "
                    "Nothing was written."
                )
            off = float(np.abs(wanted - found[output]).max())
            if not off <= limits[output]:  # also when it is NaN
                raise ExportError(
                    f"{name}: {output} is off by {off:.2g} from what it was made from gives, at most "
                    f"{limits[output]:.2g} is allowed. Nothing was written."
                )
            key = f"{output}_max_difference"
            figures[key] = max(figures.get(key, 0.0), off)
    return figures


def samples(
    preprocess: Preprocess, tokenize: Callable[[list[str]], np.ndarray], sets: Sequence[EvalSet]
) -> dict[str, np.ndarray]:
    """Return real inputs of both towers: pixels [N, 3, S, S] and the ids [M, L] of their captions."""
    if not sets:
        raise ExportError("Parity is checked on real samples, and the recipe names no 'test', 'val' or 'train' data.")
    pixels, texts = [], []
    for evalset in sets:
        taken = next(evalset.pixel_batches(preprocess, SAMPLES))
        pixels.append(taken)
        texts += [evalset.source.captions(i)[0] for i in range(len(taken))]
    return {"image": np.concatenate(pixels), "text": tokenize(list(dict.fromkeys(texts)))}


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
