"""Shared by all readers: a source of image files, compact storage of texts, safe paths, counts of skipped records."""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from clipress.data.bad_records import MAX_SKIPPED_OF, refuse_too_many
from clipress.data.file_states import Check, file_states
from clipress.data.formats.text import NORMALISERS
from clipress.data.sources import Classes
from clipress.data.spec import MAX_SKIPPED, SourceSpec
from clipress.data.transforms import FORMATS, open_image
from clipress.errors import DataError
from clipress.storage import read_json

log = logging.getLogger("clipress.data")
MAX_LINE, MAX_JSON = 1 << 24, 1 << 32  # bytes
CHECKED_EVERY = 10_000  # records, so that a wrong folder is reported early
FILES_CHECKED = 50_000  # files whose existence is checked on opening; others are found missing when they are read
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", *((".avif",) if "AVIF" in FORMATS else ())}


def needed(path: Path | None, key: str, form: str, folder: bool = False) -> Path:
    """Return a path that the recipe must set and that must exist."""
    if path is None:
        raise DataError(f"data: format '{form}' requires the key '{key}'.")
    if not (path.is_dir() if folder else path.is_file()):
        raise DataError(f"data: {key}: no such {'folder' if folder else 'file'}: {path}.")
    return path


def lines_of(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yield the place in bytes and the text of a file's lines, without line ends.

    Only a newline ends a line: captions may contain other separators. Raises DataError for a line in another encoding.
    """
    try:
        with path.open("rb") as file:
            yield from lines_from(file, 0, encoding)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from None


def lines_from(file: BinaryIO, place: int, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yield the lines of an open file from a place on, as `lines_of` does."""
    file.seek(place)
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise DataError(f"{file.name}: expected lines of less than {MAX_LINE:,} bytes. This is not a table.")
        mark = codecs.BOM_UTF8 if place == 0 else b""
        yield place, decoded(line.removeprefix(mark), encoding, f"{file.name}, byte {place:,}").rstrip("\r\n")
        place += len(line)


def decoded(text: bytes, encoding: str, where: str) -> str:
    """Decode a text. Raises DataError if it is in another encoding."""
    try:
        return text.decode(encoding)
    except UnicodeDecodeError as error:
        found = text[max(error.start - 20, 0) : error.end + 20]
        raise DataError(
            f"{where}: expected text in {encoding}, found {found!r}. Convert the file to UTF-8, or set the source's 'encoding', "
            "such as cp1252 or gbk."
        ) from None


def json_of(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return read_json(path, MAX_JSON)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON: {error}.") from None


def rows_of(path: Path) -> list[Any]:
    """Read a JSON list. Raises DataError for anything else."""
    rows = json_of(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, found {type(rows).__name__}.")
    return rows


def images_under(root: Path) -> Iterator[str]:
    """Yield the image files under a folder, except hidden ones, as sorted relative paths."""
    seen = set()  # links may form a cycle
    for folder, inner, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        prefix = Path(folder).relative_to(root)
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield str(prefix / name)


def report_skipped(origin: object, total: int, skipped: int, first: str, limit: float = MAX_SKIPPED) -> None:
    """Log how many records were skipped. Raises DataError if they are more than `limit` of all."""
    refuse_too_many(origin, skipped, total, first, limit, setting=MAX_SKIPPED_OF)
    if skipped:
        log.warning("%s: skipped %d of %d records; the first: %s", origin, skipped, total, first)


class Strings:
    """Many texts in one byte array, with the offsets of their ends.

    A list has an object per text, and forked workers copy each of them as soon as they touch its reference count.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.bytes, self.ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a text at the end."""
        self.bytes += text.encode("utf-8", "surrogatepass")
        self.ends.append(len(self.bytes))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.bytes[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogatepass")


class Files:
    """A source of image files, texts, or both: filled with `add`, completed with `done`."""

    def __init__(self, spec: SourceSpec, origin: Path, classes: Classes | None = None) -> None:
        self.name, self.classes = spec.name or spec.format, classes
        self.root = (spec.images or origin.parent).resolve()
        self._inside = str(self.root).rstrip(os.sep) + os.sep
        self.origin, self.limit, self.check, self.fingerprint = origin, spec.limit, spec.check, ""
        self.max_skipped = spec.max_skipped
        self.normalised = NORMALISERS[spec.text_normaliser]
        self.paths, self.texts = Strings(), Strings()
        self.ends = array("q", [0])  # item i has the texts from ends[i] to ends[i + 1]
        self.groups = array("q")
        self.skipped, self.first_skipped, self.missing = 0, "", 0

    @property
    def has_images(self) -> bool:
        return len(self.paths) > 0

    @property
    def has_texts(self) -> bool:
        return self.classes is not None or len(self.texts) > 0

    @property
    def full(self) -> bool:
        """Whether the recipe's `limit` is reached; `add` then ignores further records."""
        return self.limit is not None and len(self) >= self.limit

    def add(self, path: str | None, texts: Sequence[str], where: str, group: int | None = None) -> None:
        """Add an image, texts, or both. An image must exist and be inside the images folder."""
        if self.full:
            return
        texts = [self.normalised(text) for text in texts]
        if not all(text and not text.isspace() for text in texts):
            return self.skip(f"{where}: empty caption")
        if path is None or self.is_usable(path, where):
            self.keep(path, texts, group)

    def is_usable(self, path: str, where: str) -> bool:
        """Return whether an image exists and is inside the images folder; otherwise its record is counted as skipped."""
        if not self._is_inside(path):
            self.skip(f"{where}: {path!r} is outside {self.root}")
            return False
        if (self.check or len(self) < FILES_CHECKED) and not exists(self.root / path):
            self.missing += 1
            self.skip(f"{where}: no such file: {path}")
            return False
        return True

    def keep(self, path: str | None, texts: Sequence[str], group: int | None) -> None:
        """Store a record that was checked."""
        if path is not None:
            self.paths.append(path)
        for text in texts:
            self.texts.append(text)
        self.ends.append(len(self.texts))
        self.groups.append(len(self.groups) if group is None else group)

    def _is_inside(self, path: str) -> bool:
        """Only the path itself counts: links inside the folder are the user's responsibility."""
        if os.sep == "/" and path and path[0] not in "/." and ".." not in path:  # almost every path, and quick
            return True
        return os.path.normpath(self.root / path).startswith(self._inside)

    def skip(self, reason: str) -> None:
        """Count a record that cannot be used. Raises DataError early if there are too many."""
        self.skipped += 1
        self.first_skipped = self.first_skipped or reason
        if (len(self) + self.skipped) % CHECKED_EVERY == 0:
            total = len(self) + self.skipped
            refuse_too_many(
                self.origin, self.skipped, total, self.first_skipped, self.max_skipped, setting=MAX_SKIPPED_OF
            )

    def done(self) -> Files:
        """Report the skipped records and compute the fingerprint. Raises DataError if too many were skipped."""
        self.report()
        content = hashlib.sha256(repr(self.classes).encode())
        for part in self.content():
            content.update(part)
        self.fingerprint = content.hexdigest()[:16]
        return self

    def content(self) -> Iterator[bytes | bytearray | array]:
        """Yield everything that the records consist of."""
        for strings in (self.paths, self.texts):
            yield from (strings.bytes, strings.ends)
        yield from (self.ends, self.groups)

    def report(self) -> None:
        """Report the skipped records. Raises DataError if they are too many."""
        report_skipped(self.origin, len(self) + self.skipped, self.skipped, self.first_skipped, self.max_skipped)

    def __len__(self) -> int:
        return len(self.groups)

    def image(self, index: int) -> Image.Image:
        if not self.has_images:
            raise DataError(f"data: source '{self.name}' has texts only, no images.")
        return open_image(self.root / self.paths[index])

    def states(self, items: Sequence[int], check: Check) -> np.ndarray:
        """Return what tells whether images were replaced, see file_states.py: int64 [N, 2]."""
        return file_states([self.root / self.paths[item] for item in items], check)

    def captions(self, index: int) -> Sequence[str]:
        if self.classes is not None:
            return self.classes.prompts(self.groups[index])
        return tuple(self.texts[i] for i in range(self.ends[index], self.ends[index + 1]))

    def group(self, index: int) -> int:
        return self.groups[index]


def exists(path: Path) -> bool:
    """Return whether a file exists."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # Not a valid file name.
        return False
