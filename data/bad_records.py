"""Bad records, those that cannot be read: they are replaced, counted and reported; too many stop the work.

`read_record` runs where images are decoded, in any worker; `BadRecords` counts where the batches arrive. The replacement
of a record depends on the draw alone, so batches are the same for any number of workers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipress.data.spec import MAX_REPLACED, MAX_SKIPPED
from clipress.errors import DataError

if TYPE_CHECKING:
    from clipress.data.sources import Source

log = logging.getLogger("clipress.data")
ATTEMPTS = 20  # this many bad records in a row are no accident
FEW = 20  # this many bad records are accepted in a small set, whatever their fraction
MAX_SKIPPED_OF = "the source's 'max_skipped'"  # what sets the limit of a source
RECORDED = "bad_records"  # the key of their number in what a stage records
SHOWN = 5  # this many are shown while running; the log has all of them


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read."""

    source: str
    index: int
    reason: str

    def __str__(self) -> str:
        return f"record {self.index} of source '{self.source}': {self.reason}"


@dataclass(frozen=True)
class Record:
    """The record read for a draw: item `index` of the source, and the bad records tried before it."""

    index: int
    image: Any
    """An image, or None from a source of texts."""
    captions: Sequence[str]
    """Empty from a source of images."""
    bad: tuple[BadRecord, ...] = ()
    other_image: Any = None
    """The second image, from a source of pairs."""


def read_record(source: Source, index: int, draw: Sequence[int], images: bool = True, texts: bool = True) -> Record:
    """Read the required sides of an item, or of a random other one if it cannot be read; `draw` seeds that choice.

    Raises DataError after 20 bad records in a row.
    """
    bad: list[BadRecord] = []
    while len(bad) < ATTEMPTS:
        try:
            image = source.image(index) if images and source.has_images else None
            other = source.other_image(index) if images and getattr(source, "has_pairs", False) else None
            captions = source.captions(index) if texts and source.has_texts else ()
            return Record(index, image, captions, tuple(bad), other)
        except DataError as error:
            bad.append(BadRecord(source.name, index, str(error)))
            index = int(np.random.default_rng([*draw, len(bad)]).integers(len(source)))
    raise DataError(
        f"data: {ATTEMPTS} records of source '{source.name}' in a row cannot be read; the last one: {bad[-1].reason} "
        "Check the source's paths."
    )


def refuse_too_many(
    where: object,
    bad: int,
    total: int,
    example: object,
    limit: float = MAX_SKIPPED,
    least: int = 0,
    setting: str | None = None,
) -> None:
    """Raise DataError when more than `limit` of the records, and more than `least`, are bad; a limit of 0 allows none.

    `setting` is what the user may raise, such as the source's 'max_skipped'.
    """
    if bad > max(least if limit else 0, limit * total):
        remedy = f"repair or remove these records, or raise {setting}" if setting else "or repair these records"
        raise DataError(
            f"{where}: {bad} of {total} records cannot be used (for example, {str(example).rstrip('.')}). At most {limit:.0%} may be bad. "
            f"Check the source's paths, {remedy}."
        )


class BadRecords:
    """Counts bad records as they are met. At most `limit` of the records read may be bad, or `least` of them.

    `setting` is what sets the limit.
    """

    def __init__(self, limit: float = MAX_REPLACED, least: int = FEW, setting: str | None = None) -> None:
        self.limit, self.least, self.setting = limit, least, setting
        self.total = self.bad = 0
        self._seen: set[tuple[str, int]] = set()

    def count(self, good: int, bad: Sequence[BadRecord]) -> list[BadRecord]:
        """Count a batch of `good` records and the bad ones; return those that occur for the first time.

        Raises DataError when there are too many.
        """
        self.total += good + len(bad)
        self.bad += len(bad)
        new = []
        for record in bad:
            if (record.source, record.index) not in self._seen:
                self._seen.add((record.source, record.index))
                new.append(record)
                if len(self._seen) <= SHOWN:
                    log.warning("data: replaced %s", record)
        if bad:
            refuse_too_many("data", self.bad, self.total, bad[-1], self.limit, self.least, self.setting)
        return new

    @property
    def different(self) -> int:
        """How many records are bad; one that was read several times counts once."""
        return len(self._seen)
