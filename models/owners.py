"""Which sample of a batch each row belongs to, where a module runs on other rows than one per sample.

Gates (compress/prune/gates.py) collect gradients per sample, so they ask here whose rows they see. The backward pass runs outside
`owned`, so what it recomputes must be told again: models recompute by `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch.utils.checkpoint
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


_CURRENT: list[Owners | None] = []


def owned(rows: Tensor, samples: int) -> AbstractContextManager[None]:
    """Say whose rows the calls within are: int64 [rows], the sample of every row. Without it, row i is sample i's."""
    return _within(Owners(rows, samples))


@contextmanager
def _within(owners: Owners | None) -> Iterator[None]:
    _CURRENT.append(owners)
    try:
        yield
    finally:
        _CURRENT.pop()


def current() -> Owners | None:
    """Return whose rows the present call has; None: row i is sample i's."""
    return _CURRENT[-1] if _CURRENT else None


def checkpoint(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x), whose activations are recomputed in the backward pass for rows of the same samples as now."""
    owners = current()

    def call(x: Tensor) -> Tensor:
        with _within(owners):
            return function(x)

    # A compiled graph holds what was traced now, and tracing allows no change of `_CURRENT` in what is recomputed.
    known = function if torch.compiler.is_compiling() else call
    return torch.utils.checkpoint.checkpoint(known, x, use_reentrant=False)
