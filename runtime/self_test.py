"""A self-test that an ONNX file carries: inputs from a seed, and what exact arithmetic makes of them.

It catches a runtime that computes something else with the file than its weights say, such as INT8 kernels that overflow.
Every file that clipress exports has one in its metadata, under `self_test`:

    seed, rows      inputs: see `inputs_of`
    least_cosine    which every row of every output must have with the expected one
    outputs         name: {shape: [rows, ...], float16: little-endian, base64}
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SEED, ROWS, MAX_ROWS = 0, 4, 64
# Exact sessions round a few activations the other way, since float sums come in another order; an overflow moves them all.
# A model in which that counts for more than usual is allowed MARGIN times what it shows where it is exported.
LEAST_COSINE, MARGIN = 0.9995, 3
GRID, SPREAD, IDS = 4, 2.0, 400  # squares per side of a picture and their largest value; ids are below this


def inputs_of(takes: Sequence[Any], seed: int, rows: int) -> dict[str, np.ndarray]:
    """Return inputs for a session's `get_inputs()`, the same on every machine and with every numpy.

    Pixels, float32 [rows, 3, H, W]: every other row is noise, the rest 4 x 4 plain squares, which drive activations further.
    Ids, int64 [rows, L]: from 1 to 399. They come from `numpy.random.RandomState(seed)`, in the order of the inputs.
    """
    random, made = np.random.RandomState(seed), {}
    for put in takes:
        shape = (rows, *put.shape[1:])
        if put.type == "tensor(float)":
            height, width = (np.arange(side) * GRID // side for side in shape[-2:])
            pixels = random.standard_normal(shape)
            squares = random.uniform(-SPREAD, SPREAD, (*shape[:-2], GRID, GRID))[..., height, :][..., width]
            pixels[1::2] = squares[1::2]
            made[put.name] = pixels.astype(np.float32)
        else:
            made[put.name] = random.randint(1, IDS, shape).astype(np.int64)
    return made


def self_test_from(reference: Any, exact: Any) -> dict[str, Any]:
    """Write down what a session answers whose optimiser is off, and how close one that runs exactly must come.

    exact: a session as it will be used, in exact mode.
    """
    names = [put.name for put in reference.get_outputs()]
    found = reference.run(names, inputs_of(reference.get_inputs(), SEED, ROWS))
    outputs = {
        name: {"shape": list(rows.shape), "float16": base64.b64encode(rows.astype("<f2").tobytes()).decode()}
        for name, rows in zip(names, found, strict=True)
    }
    told = {"seed": SEED, "rows": ROWS, "outputs": outputs}
    usual = 1 - least_cosine(exact, told)
    return {**told, "least_cosine": round(min(LEAST_COSINE, 1 - MARGIN * usual), 6)}


def least_cosine(session: Any, told: Mapping[str, Any]) -> float:
    """Return the least cosine between a session's rows and those of a file's self-test; -1 for what is no number.

    Raises LookupError, TypeError or ValueError for a self-test that cannot be read, and what onnxruntime raises.
    """
    names, seed, rows_asked = list(told["outputs"]), int(told["seed"]), int(told["rows"])
    if not 1 <= rows_asked <= MAX_ROWS:
        raise ValueError(f"rows must be 1 to {MAX_ROWS}, found {rows_asked}")
    found = session.run(names, inputs_of(session.get_inputs(), seed, rows_asked))
    cosines = [1.0]
    for rows, wanted in zip(found, told["outputs"].values(), strict=True):
        expected = np.frombuffer(base64.b64decode(wanted["float16"]), "<f2").reshape(wanted["shape"])
        cosines.append(float(_cosines(rows, expected).min()))
    return min(cosines)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape != b.shape:
        raise ValueError(f"the self-test expects outputs of shape {b.shape}, found {a.shape}")
    a, b = (side.reshape(len(side), -1).astype(np.float64) for side in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.nan_to_num((a * b).sum(1) / np.maximum(norms, 1e-12), nan=-1.0)
