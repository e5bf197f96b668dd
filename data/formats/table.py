"""Tables of pairs that stay in their file: of a row only its place is kept, 8 bytes however long it is.

Opening a table reads it once, since every row is checked. Rows are read again when they are needed. What was found in a
long table is kept in the cache folder, unless images were missing: they may have come by the next time.
"""

from __future__ import annotations

import csv
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipress.data.formats import files
from clipress.data.formats.files import Files, exists, lines_from, lines_of
from clipress.data.formats.index_files import keep_index, kept_index, state_of
from clipress.data.spec import SourceSpec
from clipress.data.transforms import open_image
from clipress.errors import DataError

Row = tuple[int, int, list[str] | str]
"""A record's place in bytes, the number of its line, and its cells, or an error message in their place."""
HASHED_AT_ONCE = 10_000  # rows
VERSION = 1  # Version of cached indices.


class Table(Files):
    """A source of pairs in a table, filled with `add` from `rows`.

    Args:
        spec: its `separator` "," means a quoted table (RFC 4180), any other one that is not.
        path: the table's file.
    """

    def __init__(self, spec: SourceSpec, path: Path, separator: str) -> None:
        super().__init__(spec, path)
        self.separator, self.places = separator, array("q")
        self.columns: tuple[int | None, int, int] = (None, 0, 1)
        """The column of the images, if there are any, that of the captions, and how many there are."""
        self._place, self._hash, self._unhashed = 0, hashlib.sha256(), list[str]()
        self._state = state_of(path)
        settings = (spec.format, separator, spec.image_key, spec.caption_key, spec.limit, spec.text_normaliser)
        self._identity = (VERSION, str(path.resolve()), self._state, settings, str(self.root))

    def restore(self) -> bool:
        """Take what an earlier opening found from the cache folder. Returns False if the rows must be read.

        The first images must exist, as when the rows are read.
        """
        index = None if self.check else kept_index("tables", self._identity)
        if index is None:
            return False
        column, checked = self.columns[0], min(len(index["places"]), files.FILES_CHECKED)
        self.places = index["places"]
        if column is not None and not all(exists(self.root / self._cells(row)[column]) for row in range(checked)):
            self.places = array("q")
            return False
        self.skipped, self.first_skipped = int(index["skipped"]), str(index["first_skipped"])
        self.fingerprint = str(index["fingerprint"])
        return True

    def rows(self) -> Iterator[Row]:
        """Yield all rows of the file, the header included."""
        for row in _rows(lines_of(self.origin), self.separator):
            self._place = row[0]
            yield row

    @property
    def has_images(self) -> bool:
        return self.columns[0] is not None and len(self.places) > 0

    @property
    def has_texts(self) -> bool:
        return len(self.places) > 0

    @property
    def num_captions(self) -> int:
        """Number of captions of all rows."""
        return len(self)

    def keep(self, path: str | None, texts: Sequence[str], group: int | None) -> None:
        self.places.append(self._place)
        self._unhashed += [path or "", *texts]
        if len(self._unhashed) > HASHED_AT_ONCE:
            self._hash_rows()

    def done(self) -> Table:
        self.report()
        if self.fingerprint:  # it was restored
            return self
        self._hash_rows()
        self.fingerprint = self._hash.hexdigest()[:16]
        if not (self.check or self.missing) and len(self) > files.FILES_CHECKED:
            found = {"places": self.places, "skipped": self.skipped, "first_skipped": self.first_skipped}
            found["fingerprint"] = self.fingerprint
            keep_index("tables", self._identity, {name: np.asarray(value) for name, value in found.items()})
        return self

    def __len__(self) -> int:
        return len(self.places)

    def image(self, index: int) -> Image.Image:
        column = self.columns[0]
        if column is None:
            raise DataError(f"data: source '{self.name}' has texts only, no images.")
        return open_image(self.root / self._cells(index)[column])

    def captions(self, index: int) -> Sequence[str]:
        return (self.normalised(self._cells(index)[self.columns[1]]),)

    def group(self, index: int) -> int:
        return range(len(self))[index]

    def _cells(self, index: int) -> list[str]:
        try:
            with self.origin.open("rb") as file:
                if state_of(self.origin) != self._state:
                    raise DataError(f"{self.origin} has changed since it was opened. Start again.")
                _, _, cells = next(_rows(lines_from(file, int(self.places[index])), self.separator))
        except OSError as error:
            raise DataError(f"{self.origin} cannot be read: {error}.") from None
        return cells

    def _hash_rows(self) -> None:
        self._hash.update("\0".join([*self._unhashed, ""]).encode("utf-8", "surrogatepass"))
        self._unhashed.clear()


def _rows(lines: Iterator[tuple[int, str]], separator: str) -> Iterator[Row]:
    if separator == ",":
        return _quoted(lines)
    return ((place, number, line.split(separator)) for number, (place, line) in enumerate(lines, 1))


def _quoted(lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    places: list[int] = []  # of the lines of the record that is read

    def texts() -> Iterator[str]:
        for place, line in lines:
            places.append(place)
            yield line + "\n"

    reader = csv.reader(texts(), strict=True)
    while True:
        places.clear()
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # an unclosed quote swallows lines, each of them a lost record
            for number, place in enumerate(places, first):
                yield place, number, f"invalid quoting: {error}"
        else:
            yield places[0], first, cells
