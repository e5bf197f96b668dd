"""Write faiss's index files block by block: faiss itself builds an index in memory, and with copies while it grows.

The files are those of `faiss.write_index`. Their heads are faiss's own, of an index that knows its number of vectors and
holds none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

Blocks = Callable[[], Iterable[np.ndarray]]
"""Yield the vectors, float32 [n, D] each; the same ones whenever it is called."""
LISTS = b"ilar"  # begins the inverted lists of a file


def write_filled(path: Path, empty: Any, count: int, blocks: Blocks) -> None:
    """Write the file of an `IndexFlat` or of a trained `IndexIVFFlat` as if `count` vectors had been added to it."""
    if hasattr(empty, "nlist"):
        _write_lists(path, empty, count, blocks)
    else:
        _write_flat(path, empty, count, blocks)


def _write_flat(path: Path, empty: Any, count: int, blocks: Blocks) -> None:
    size = np.uint64(count * empty.d).tobytes()
    with path.open("wb") as file:
        file.write(_head(empty, count)[: -len(size)] + size)
        for block in blocks():
            file.write(_floats(block))


def _write_lists(path: Path, empty: Any, count: int, blocks: Blocks) -> None:
    lists = np.concatenate([empty.quantizer.search(_floats(block), 1)[1][:, 0] for block in blocks()])
    order = np.argsort(lists, kind="stable")  # the ids of all lists, one list after the other
    sizes = np.bincount(lists, minlength=empty.nlist).astype(np.uint64)
    head, mark, _ = _head(empty, count).rpartition(LISTS)
    about = np.asarray([empty.nlist, empty.code_size], np.uint64).tobytes() + b"full" + np.uint64(len(sizes)).tobytes()
    head += mark + about + sizes.tobytes()
    sizes, width = sizes.astype(np.int64), empty.code_size
    starts = np.cumsum([0, *sizes[:-1]])  # vectors before each list
    codes = len(head) + starts * (width + 8)  # where its vectors begin; its ids follow them
    place = np.empty(count, np.int64)  # where each vector goes
    place[order] = codes[lists[order]] + (np.arange(count) - starts[lists[order]]) * width
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS: a full disk is an error now
            os.posix_fallocate(file.fileno(), 0, len(head) + count * (width + 8))
        file.write(head)
        file.flush()
        for at, first, size in zip(codes.tolist(), starts.tolist(), sizes.tolist(), strict=True):
            os.pwrite(file.fileno(), order[first : first + size].tobytes(), at + size * width)
        done = 0
        for block in blocks():
            rows = _floats(block)
            for row, at in zip(rows, place[done : done + len(rows)].tolist(), strict=True):
                os.pwrite(file.fileno(), row, at)
            done += len(rows)


def _head(empty: Any, count: int) -> bytes:
    import faiss

    empty.ntotal = count
    try:
        return faiss.serialize_index(empty).tobytes()
    finally:
        empty.ntotal = 0


def _floats(block: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(block, np.float32)
