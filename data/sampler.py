"""Training batches as lists of draws; each is a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clipress.errors import DataError


@dataclass(frozen=True)
class Draw:
    """One item of a batch: which source, which item, and which time it is shown."""

    source: int
    index: int
    epoch: int


class Batches:
    """Yield batches of `Draw`s, step by step; batch t is a function of (seed, t) alone.

    A run can therefore stop at any step and resume exactly. Every source fills its share of each batch and walks through
    its own permutations. With several processes each takes every `world`-th item, so the global batch is the same for
    any number of processes. With `repeats`, every item comes so many times in a row.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[float],
        batch: int,
        steps: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
    ) -> None:
        if batch % world:
            raise DataError(
                f"batch_size: expected a multiple of the {world} processes, found {batch}. Change one of them."
            )
        self.sizes, self.steps, self.seed, self.start = list(sizes), steps, seed, start
        self.rank, self.world, self.repeats = rank, world, repeats
        exact = np.asarray(shares, float) / sum(shares) * batch
        counts = np.floor(exact).astype(int)
        for source in np.argsort(counts - exact, kind="stable")[: batch - counts.sum()]:
            counts[source] += 1
        self.counts = counts.tolist()
        self._order = lru_cache(maxsize=2 * len(self.sizes))(self._permutation)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, source, epoch]).permutation(self.sizes[source])

    def at(self, step: int) -> list[Draw]:
        """Return the global batch of a step."""
        draws = []
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            for position in range(step * count, (step + 1) * count):
                shown, copy = divmod(position, self.repeats)
                epoch, place = divmod(shown, size)
                draws.append(Draw(source, int(self._order(source, epoch)[place]), epoch * self.repeats + copy))
        return draws

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.steps):
            yield self.at(step)[self.rank :: self.world]

    def __len__(self) -> int:
        return self.steps - self.start
