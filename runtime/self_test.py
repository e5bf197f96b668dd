"""The self-test in an ONNX file: seeded inputs and the outputs that exact arithmetic gives for them.

It catches runtimes that compute wrong results, such as INT8 kernels that overflow. Every file that clipress exports has
one in its metadata, under `self_test`:

    seed, rows      make the inputs, see `inputs_of`
    largest         name: the largest id, of every input of integers; 399 where it is absent
    lengths         name: how many ids, of every input of texts that may be shorter
    least_cosine    required between every row of every output and the expected row
    outputs         name: {shape: [rows, ...], float16: little-endian, base64}
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SEED, ROWS, MAX_ROWS, MAX_LENGTH = 0, 4, 64, 1 << 13
# Exact sessions sum floats in another order and so round a few activations the other way; an overflow changes all of
# them. A model that is unusually sensitive to this is allowed MARGIN times the difference seen when it is exported.
LEAST_COSINE, MARGIN = 0.9995, 3
GRID, SPREAD = 4, 2.0  # Squares per image side, and their largest value.
LARGEST = 399  # Id of an input without a limit of its own, as in files that do not name one.


def inputs_of(
    takes: Sequence[Any], seed: int, rows: int, largest: Mapping[str, int], lengths: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Return inputs for a session's `get_inputs()`, the same on every machine and with every numpy version.

    Floats are noise; of images, float32 [rows, C, H, W], every other row is a grid of 4 x 4 uniform squares, which
    drive activations further. Integers are ids from 1 to the input's largest, as many as `lengths` says where the file
    takes any number. All come from `numpy.random.RandomState(seed)`, input by input.
    """
    random, made = np.random.RandomState(seed), {}
    for put in takes:
        shape = (rows, lengths[put.name]) if put.name in lengths else (rows, *put.shape[1:])
        if put.type != "tensor(float)":
            made[put.name] = random.randint(1, largest.get(put.name, LARGEST) + 1, shape).astype(np.int64)
            continue
        values = random.standard_normal(shape)
        if len(shape) == 4:
            height, width = (np.arange(side) * GRID // side for side in shape[-2:])
            squares = random.uniform(-SPREAD, SPREAD, (*shape[:-2], GRID, GRID))[..., height, :][..., width]
            values[1::2] = squares[1::2]
        made[put.name] = values.astype(np.float32)
    return made


def self_test_from(
    reference: Callable[[], Any], exact: Callable[[], Any], largest: Mapping[str, int], lengths: Mapping[str, int]
) -> dict[str, Any]:
    """Record the outputs of a session without optimizer, and how close other sessions must come.

    Args:
        reference: opens a session with the optimizer off.
        exact: opens a session as it will be used, in exact mode; its difference sets the limit for sensitive models.
        largest: of inputs of integers, by name: an embedding fails at ids beyond its table.
        lengths: of inputs of texts that may be shorter, by name: the longest.
    """
    session = reference()
    names = [put.name for put in session.get_outputs()]
    found = session.run(names, inputs_of(session.get_inputs(), SEED, ROWS, largest, lengths))
    del session  # before the next is opened: each holds the file's weights
    outputs = {
        name: {"shape": list(rows.shape), "float16": base64.b64encode(rows.astype("<f2").tobytes()).decode()}
        for name, rows in zip(names, found, strict=True)
    }
    test = {"seed": SEED, "rows": ROWS, "largest": dict(largest), "lengths": dict(lengths), "outputs": outputs}
    usual = 1 - least_cosine(exact(), test)
    return {**test, "least_cosine": round(min(LEAST_COSINE, 1 - MARGIN * usual), 6)}


def least_cosine(session: Any, test: Mapping[str, Any]) -> float:
    """Return the least cosine between a session's rows and those of a file's self-test; NaN counts as -1.

    Raises LookupError, TypeError or ValueError for a damaged self-test, or an error of onnxruntime.
    """
    names, seed, count = list(test["outputs"]), int(test["seed"]), int(test["rows"])
    if not 1 <= count <= MAX_ROWS:
        raise ValueError(f"rows: expected 1 to {MAX_ROWS}, found {count}")
    largest, lengths = (
        {name: int(value) for name, value in dict(test.get(key, {})).items()} for key in ("largest", "lengths")
    )
    if any(not 1 <= length <= MAX_LENGTH for length in lengths.values()):
        raise ValueError(f"lengths: expected 1 to {MAX_LENGTH:,} ids, found {lengths}")
    found = session.run(names, inputs_of(session.get_inputs(), seed, count, largest, lengths))
    cosines = [1.0]
    for rows, wanted in zip(found, test["outputs"].values(), strict=True):
        expected = np.frombuffer(base64.b64decode(wanted["float16"]), "<f2").reshape(wanted["shape"])
        cosines.append(float(_cosines(rows, expected).min()))
    return min(cosines)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape != b.shape:
        raise ValueError(f"the self-test expects outputs of shape {b.shape}, found {a.shape}")
    a, b = (side.reshape(len(side), -1).astype(np.float64) for side in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.nan_to_num((a * b).sum(1) / np.maximum(norms, 1e-12), nan=-1.0)
