"""What every reader shares: texts in one piece of memory, safe paths, counted skips, a source made of files."""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from clipress.data.formats.text import NORMALISERS
from clipress.data.sources import Classes
from clipress.data.spec import SourceSpec
from clipress.data.transforms import open_image
from clipress.errors import DataError
from clipress.storage import read_json

log = logging.getLogger("clipress.data")
MAX_LINE, MAX_JSON = 1 << 24, 1 << 32  # letters, bytes
MAX_SKIPPED = 0.2  # a larger part of broken records stops the run
JUDGED = 10_000  # after every so many records, so that a wrong folder is told early
LOOKED_FOR = 50_000  # so many files are looked for when a source is opened; the others are found missing when read
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def needed(path: Path | None, key: str, form: str, folder: bool = False) -> Path:
    """Return a path that a recipe must give and that must exist."""
    if path is None:
        raise DataError(f"data: format '{form}' needs the key '{key}'.")
    if not (path.is_dir() if folder else path.is_file()):
        raise DataError(f"data: {key} {path} was asked for, and there is no such {'folder' if folder else 'file'}.")
    return path


def lines_of(path: Path) -> Iterator[str]:
    """Yield a text file's lines without their ends. Only a newline ends a line: captions may hold any other mark."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
            while line := file.readline(MAX_LINE):
                if len(line) == MAX_LINE:
                    raise DataError(f"{path} has a line of {MAX_LINE:,} letters or more; it is no table.")
                yield line.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from None


def json_of(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return read_json(path, MAX_JSON)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON: {error}.") from None


def pictures_under(root: Path) -> Iterator[str]:
    """Yield the picture files under a folder, hidden ones left out, relative to it and in order."""
    seen = set()  # links may lead in circles
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


def judge(origin: object, total: int, skipped: int, first: str) -> None:
    """Say how many records cannot be used; too many are an error."""
    refuse_many(origin, total, skipped, first)
    if skipped:
        log.warning("%s: %d of %d records skipped; first: %s", origin, skipped, total, first)


def refuse_many(origin: object, total: int, skipped: int, first: str) -> None:
    """Raise DataError when too many records cannot be used."""
    if skipped > MAX_SKIPPED * total:
        raise DataError(
            f"{origin}: {skipped} of {total} records cannot be used (first: {first}). "
            f"At most {MAX_SKIPPED:.0%} are skipped; check the source's paths."
        )


class Strings:
    """Many texts as one run of bytes and the places where they end.

    A list would have an object per text; workers that are forked would copy them all just by counting references.
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
    """A source of picture files, of texts, or of both: gathered by `add`, closed by `done`."""

    def __init__(self, spec: SourceSpec, origin: Path, classes: Classes | None = None) -> None:
        self.name, self.classes = spec.name or spec.format, classes
        self.root = (spec.images or origin.parent).resolve()
        self._inside = str(self.root).rstrip(os.sep) + os.sep
        self.origin, self.limit, self.check, self.fingerprint = origin, spec.limit, spec.check, ""
        self._normalised = NORMALISERS[spec.text_normaliser]
        self.paths, self.texts = Strings(), Strings()
        self.ends = array("q", [0])  # item i has the texts from ends[i] to ends[i + 1]
        self.groups = array("q")
        self.skipped, self.first_skipped = 0, ""

    @property
    def has_images(self) -> bool:
        return len(self.paths) > 0

    @property
    def has_texts(self) -> bool:
        return self.classes is not None or len(self.texts) > 0

    @property
    def full(self) -> bool:
        """Whether the recipe's `limit` is reached; `add` then takes no more."""
        return self.limit is not None and len(self) >= self.limit

    def add(self, path: str | None, texts: Sequence[str], where: str, group: int | None = None) -> None:
        """Take one picture, its captions, or both. A picture must lie under the images folder and exist."""
        if self.full:
            return
        texts = [self._normalised(text) for text in texts]
        if not all(text.strip() for text in texts):
            return self.skip(f"{where}: a caption is empty")
        if path is not None:
            # `..` and absolute paths are judged as text; links inside the folder are the user's own
            if not os.path.normpath(self.root / path).startswith(self._inside):
                return self.skip(f"{where}: {path!r} points outside {self.root}")
            if (self.check or len(self) < LOOKED_FOR) and not _there(self.root / path):
                return self.skip(f"{where}: there is no file {path}")
            self.paths.append(path)
        for text in texts:
            self.texts.append(text)
        self.ends.append(len(self.texts))
        self.groups.append(len(self.groups) if group is None else group)

    def skip(self, reason: str) -> None:
        """Count a record that cannot be used."""
        self.skipped += 1
        self.first_skipped = self.first_skipped or reason
        if (len(self) + self.skipped) % JUDGED == 0:
            refuse_many(self.origin, len(self) + self.skipped, self.skipped, self.first_skipped)

    def done(self) -> Files:
        """Report the skipped records; too many are an error."""
        judge(self.origin, len(self) + self.skipped, self.skipped, self.first_skipped)
        content = hashlib.sha256(repr(self.classes).encode())
        for part in (self.paths.bytes, self.paths.ends, self.texts.bytes, self.texts.ends, self.ends, self.groups):
            content.update(part)
        self.fingerprint = content.hexdigest()[:16]
        return self

    def __len__(self) -> int:
        return len(self.groups)

    def image(self, index: int) -> Image.Image:
        if not self.has_images:
            raise DataError(f"data: source '{self.name}' holds texts only, and a picture was asked for.")
        return open_image(self.root / self.paths[index])

    def captions(self, index: int) -> Sequence[str]:
        if self.classes is not None:
            return self.classes.prompts(self.groups[index])
        return tuple(self.texts[i] for i in range(self.ends[index], self.ends[index + 1]))

    def group(self, index: int) -> int:
        return self.groups[index]


def _there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
