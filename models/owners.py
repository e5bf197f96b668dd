"""Which sample of a batch each row belongs to, where a module runs on other rows than one per sample.

Gates (compress/prune/gates.py) collect gradients per sample, so they ask here whose rows they see. What is recomputed in the backward
pass (activation checkpointing) runs outside `owned`, which torch refuses: a search on such rows needs the activations kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Owners:
    """The samples that rows belong to."""

    rows: Tensor
    """int64 [rows]: the sample of every row."""
    samples: int

    def expand(self, each: Tensor) -> Tensor:
        """Give every row what its sample has: [samples, ...] -> [rows, ...]. Gradients are summed over a sample's rows."""
        return each.index_select(0, self.rows)


_CURRENT: list[Owners] = []


@contextmanager
def owned(rows: Tensor, samples: int) -> Iterator[None]:
    """Say whose rows the calls within are: int64 [rows], the sample of every row. Without it, row i is sample i's."""
    _CURRENT.append(Owners(rows, samples))
    try:
        yield
    finally:
        _CURRENT.pop()


def current() -> Owners | None:
    """Return whose rows the present call has; None: row i is sample i's."""
    return _CURRENT[-1] if _CURRENT else None
