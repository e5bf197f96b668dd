"""A cache of the embeddings of label sets, limited by memory."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

Key = tuple[tuple[str, ...], tuple[str, ...]]


class LabelSets:
    """A cache keyed by (labels, templates). The least recently used set is dropped first.

    Args:
        limit: bytes of all embeddings and names together. A set larger than that is not kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._sets: OrderedDict[Key, np.ndarray] = OrderedDict()

    def get(self, key: Key) -> np.ndarray | None:
        """Return the embeddings [C, D] of a set, or None if the cache does not have them."""
        if key in self._sets:
            self._sets.move_to_end(key)
        return self._sets.get(key)

    def put(self, key: Key, classes: np.ndarray) -> None:
        """Keep the embeddings of a set."""
        if key in self._sets or _size(key, classes) > self._limit:
            return
        self._sets[key] = classes
        self._size += _size(key, classes)
        while self._size > self._limit:
            self._size -= _size(*self._sets.popitem(last=False))


def _size(key: Key, classes: np.ndarray) -> int:
    return classes.nbytes + sum(len(text.encode()) for part in key for text in part)
