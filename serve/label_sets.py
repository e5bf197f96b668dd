"""Embeddings of label sets that were asked for lately, within an amount of memory."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

Key = tuple[tuple[str, ...], tuple[str, ...]]


class LabelSets:
    """A cache by (labels, templates); the least recently used set goes first.

    Args:
        limit: bytes of all embeddings and names together; a set that is larger is not kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._sets: OrderedDict[Key, np.ndarray] = OrderedDict()

    def get(self, key: Key) -> np.ndarray | None:
        """Return a set's embeddings [C, D], if they are there."""
        if key in self._sets:
            self._sets.move_to_end(key)
        return self._sets.get(key)

    def put(self, key: Key, classes: np.ndarray) -> None:
        """Keep a set's embeddings."""
        if key in self._sets or _size(key, classes) > self._limit:
            return
        self._sets[key] = classes
        self._size += _size(key, classes)
        while self._size > self._limit:
            self._size -= _size(*self._sets.popitem(last=False))


def _size(key: Key, classes: np.ndarray) -> int:
    return classes.nbytes + sum(len(text.encode()) for part in key for text in part)
