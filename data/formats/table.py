"""Tables of pairs that stay in their file: of a row only its place is kept, 8 bytes however long it is.

Opening a table reads it once, since every row is checked. Rows are read again when they are needed. What was found in a
long table is kept in the cache folder, unless images were missing: they may have come by the next time.
"""

from __future__ import annotations

import csv
import hashlib
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipress.data.file_states import Check, file_states, state_of
from clipress.data.formats import files
from clipress.data.formats.files import Files, exists, lines_from, lines_of
from clipress.data.formats.index_files import keep_index, kept_index
from clipress.data.spec import SourceSpec
from clipress.data.transforms import open_image
from clipress.errors import DataError

Row = tuple[int, int, list[str] | str]
"""A record's place in bytes, the number of its line, and its cells, or an error message in their place."""
HASHED_AT_ONCE = 10_000  # rows
VERSION = 2  # Version of cached indices.
MAX_RECORD = 1 << 17  # characters of a quoted record while it is not clear whether the table is quoted


class Table(Files):
    """A source of pairs in a table, filled with `add` from `rows`. Rows of one image are one item, with their captions.

    Args:
        spec: says what its cells are.
        path: the table's file.
        separator: between cells.
    """

    def __init__(self, spec: SourceSpec, path: Path, separator: str) -> None:
        super().__init__(spec, path)
        self.separator, self.encoding = separator, spec.encoding
        self.places = array("q")
        """The place of every row; the rows of an image are together."""
        self.starts: np.ndarray | None = None
        """int64 [items + 1]: item i has the rows from starts[i] to starts[i + 1]; None if each has one."""
        self.columns: tuple[int | None, int, int] = (None, 0, 1)
        """The column of the images, if there are any, that of the captions, and how many there are."""
        self._images, self._first_images = array("q"), set[int]()  # hashes; those of all rows, and within the limit
        self._place, self._hash, self._unhashed = 0, hashlib.sha256(), list[str]()
        self._state = state_of(path)
        keys = ("format", "quoted", "encoding", "image_key", "caption_key", "limit", "text_normaliser", "max_skipped")
        settings = (separator, *(getattr(spec, key) for key in keys))
        self._identity = (VERSION, str(path.resolve()), self._state, settings, str(self.root))
        self._kept = None if self.check else kept_index("tables", self._identity)
        self.quoted = bool(self._kept["quoted"]) if self._kept else is_quoted(path, separator, spec)

    def restore(self) -> bool:
        """Take what an earlier opening found from the cache folder. Returns False if the rows must be read.

        The first images must exist, as when the rows are read.
        """
        index, self._kept = self._kept, None
        if index is None:
            return False
        self.places, self.starts = index["places"], index["starts"] if len(index["starts"]) else None
        column, first = self.columns[0], self.places[: files.FILES_CHECKED]
        if column is not None and not all(exists(self.root / cells[column]) for cells in self._cells(first)):
            self.places, self.starts = array("q"), None
            return False
        self.skipped, self.first_skipped = int(index["skipped"]), str(index["first_skipped"])
        self.fingerprint = str(index["fingerprint"])
        return True

    def rows(self) -> Iterator[Row]:
        """Yield all rows of the file, the header included."""
        for row in rows_of(self.origin, self.separator, self.encoding, self.quoted):
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
        return len(self.places)

    @property
    def full(self) -> bool:
        """Whether the recipe's `limit` is reached; of images it never is, since their rows may be anywhere."""
        return self.columns[0] is None and super().full

    def add(self, path: str | None, texts: Sequence[str], where: str, group: int | None = None) -> None:
        if path is None or not self._has_all_images or hash(path) in self._first_images:
            super().add(path, texts, where, group)

    def skip(self, reason: str) -> None:
        if not self._has_all_images:
            super().skip(reason)

    @property
    def _has_all_images(self) -> bool:
        """Whether rows of further images are beyond the recipe's `limit`."""
        return self.limit is not None and len(self._first_images) >= self.limit

    def keep(self, path: str | None, texts: Sequence[str], group: int | None) -> None:
        self.places.append(self._place)
        if path is not None:
            self._images.append(hash(path))
            if self.limit is not None:
                self._first_images.add(hash(path))
        self._unhashed += [path or "", *texts]
        if len(self._unhashed) > HASHED_AT_ONCE:
            self._hash_rows()

    def done(self) -> Table:
        self.report()
        if self.fingerprint:  # it was restored
            return self
        self._hash_rows()
        self._merge_images()
        self.fingerprint = self._hash.hexdigest()[:16]
        if not (self.check or self.missing) and len(self.places) > files.FILES_CHECKED:
            found = {"places": self.places, "starts": () if self.starts is None else self.starts, "quoted": self.quoted}
            found |= {"skipped": self.skipped, "first_skipped": self.first_skipped, "fingerprint": self.fingerprint}
            keep_index("tables", self._identity, {name: np.asarray(value) for name, value in found.items()})
        return self

    def __len__(self) -> int:
        return len(self.places) if self.starts is None else len(self.starts) - 1

    def image(self, index: int) -> Image.Image:
        column = self.columns[0]
        if column is None:
            raise DataError(f"data: source '{self.name}' has texts only, no images.")
        return open_image(self.root / next(self._cells(self._rows_of(index)))[column])

    def states(self, items: Sequence[int], check: Check) -> np.ndarray:
        rows = self._cells([self._rows_of(item)[0] for item in items])  # opens the table once
        return file_states([self.root / cells[self.columns[0]] for cells in rows], check)

    def captions(self, index: int) -> Sequence[str]:
        return tuple(self.normalised(cells[self.columns[1]]) for cells in self._cells(self._rows_of(index)))

    def group(self, index: int) -> int:
        return range(len(self))[index]

    def _rows_of(self, index: int) -> Sequence[int]:
        """Return the places of an item's rows."""
        if self.starts is None:
            return (self.places[index],)
        first = range(len(self))[index]
        return self.places[self.starts[first] : self.starts[first + 1]]

    def _cells(self, places: Sequence[int]) -> Iterator[list[str]]:
        try:
            with self.origin.open("rb") as file:
                if state_of(self.origin) != self._state:
                    raise DataError(f"{self.origin} has changed since it was opened. Start again.")
                for place in places:
                    lines = lines_from(file, int(place), self.encoding)
                    yield next(_rows(lines, self.separator, self.quoted))[2]
        except OSError as error:
            raise DataError(f"{self.origin} cannot be read: {error}.") from None

    def _hash_rows(self) -> None:
        self._hash.update("\0".join([*self._unhashed, ""]).encode("utf-8", "surrogatepass"))
        self._unhashed.clear()

    def _merge_images(self) -> None:
        """Bring the rows of each image together, images in the order in which they occur first."""
        images, self._images = np.asarray(self._images), array("q")
        ordered = np.sort(images)
        if not (ordered[1:] == ordered[:-1]).any():
            return
        _, first, image = np.unique(images, return_index=True, return_inverse=True)
        item = np.argsort(np.argsort(first))[image]
        self.places = np.asarray(self.places)[np.argsort(item, kind="stable")]
        self.starts = np.cumsum([0, *np.bincount(item)])
        self._hash.update(b"rows of an image are merged")


def rows_of(path: Path, separator: str, encoding: str, quoted: bool) -> Iterator[Row]:
    """Yield all rows of a table, the header included. Raises DataError for another encoding."""
    return _rows(lines_of(path, encoding), separator, quoted)


def is_quoted(path: Path, separator: str, spec: SourceSpec) -> bool:
    """Return whether a table's cells are quoted where needed, by its settings or by its content.

    A writer of quoted tables quotes cells that contain a separator, a quotation mark or a newline, or all of them, the header
    included. A single quotation mark elsewhere tells that nothing is quoted.
    """
    if spec.quoted is True and len(separator) > 1:
        raise DataError(
            f"{path}: a quoted table has a separator of one character, found {separator!r}. Leave out 'quoted'."
        )
    if spec.quoted != "auto" or separator == "," or len(separator) > 1:
        return separator == "," if spec.quoted == "auto" else spec.quoted
    mark = re.escape(separator)
    cell = re.compile(rf'(?:^|{mark})(?:"((?:[^"]|"")*)"|[^"{mark}\n]*)(?={mark}|$)')
    record, needed = "", False
    for place, line in lines_of(path, spec.encoding):
        if not record and '"' not in line:
            continue
        record += line + "\n"
        if len(record) > MAX_RECORD:
            return False
        if record.count('"') % 2:  # a cell with a newline, or a mark that quotes nothing
            continue
        found = list(cell.finditer(record[:-1]))
        if sum(len(one[0]) for one in found) != len(record) - 1:
            return False
        inner = [one[1] for one in found if one[1] is not None]
        needed |= place == 0 or any(separator in text or '"' in text or "\n" in text for text in inner)
        record = ""
    return needed and not record


def _rows(lines: Iterator[tuple[int, str]], separator: str, quoted: bool) -> Iterator[Row]:
    if quoted:
        return _quoted(lines, separator)
    return ((place, number, line.split(separator)) for number, (place, line) in enumerate(lines, 1))


def _quoted(lines: Iterator[tuple[int, str]], separator: str) -> Iterator[Row]:
    places: list[int] = []  # of the lines of the record that is read

    def texts() -> Iterator[str]:
        for place, line in lines:
            places.append(place)
            yield line + "\n"

    reader = csv.reader(texts(), strict=True, delimiter=separator)
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
