"""Records that cannot be read: another takes their place, they are counted and named, too many stop the run.

`readable` runs where pictures are decoded, in any worker; `BrokenRecords` keeps count where the batches arrive. What
takes a record's place depends on the draw alone, so batches stay the same for any number of workers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipress.errors import DataError

if TYPE_CHECKING:
    from clipress.data.sources import Source

log = logging.getLogger("clipress.data")
ATTEMPTS = 20  # so many unreadable records in a row are no accident
NAMED = 5  # so many are shown while running; all are in the log


@dataclass(frozen=True)
class Broken:
    """A record that could not be read."""

    source: str
    index: int
    reason: str


@dataclass(frozen=True)
class Record:
    """What was read in answer to a draw: item `index` of the source, and those that were tried before it."""

    index: int
    image: Any
    """A picture, or None from a source of texts."""
    captions: Sequence[str]
    """None of them from a source of images."""
    broken: tuple[Broken, ...] = ()


def readable(source: Source, index: int, draw: Sequence[int], images: bool = True, texts: bool = True) -> Record:
    """Read what is wanted of an item; if it cannot be read, of another. `draw` is what the choice is seeded with.

    Raises DataError when 20 records in a row cannot be read.
    """
    broken: list[Broken] = []
    while len(broken) < ATTEMPTS:
        try:
            image = source.image(index) if images and source.has_images else None
            captions = source.captions(index) if texts and source.has_texts else ()
            return Record(index, image, captions, tuple(broken))
        except DataError as error:
            broken.append(Broken(source.name, index, str(error)))
            index = int(np.random.default_rng([*draw, len(broken)]).integers(len(source)))
    raise DataError(
        f"data: {ATTEMPTS} records of source '{source.name}' in a row cannot be read; the last one: {broken[-1].reason}"
    )


class BrokenRecords:
    """Count of what could not be read. At most `limit` of the records looked at may be broken, or `least` of them."""

    def __init__(self, limit: float = 0.05, least: int = 20) -> None:
        self.limit, self.least = limit, least
        self.looked_at = self.broken = 0
        self._named: set[tuple[str, int]] = set()

    def see(self, items: int, broken: Sequence[Broken]) -> list[Broken]:
        """Count a batch of `items` records and those tried in vain; return the ones met for the first time.

        Raises DataError when there are too many.
        """
        self.looked_at += items + len(broken)
        self.broken += len(broken)
        new = []
        for record in broken:
            if (record.source, record.index) not in self._named:
                self._named.add((record.source, record.index))
                new.append(record)
                if len(self._named) <= NAMED:
                    log.warning("data: %s", _told(record))
        if self.broken > max(self.least, self.limit * self.looked_at):
            raise DataError(
                f"data: {self.broken} of {self.looked_at} records looked at cannot be read (the last: "
                f"{_told(broken[-1])}). At most {self.limit:.0%} are replaced by others; repair or remove them."
            )
        return new


def _told(record: Broken) -> str:
    return f"record {record.index} of source '{record.source}' is replaced: {record.reason}"
