"""What every reader of pictures on disk shares: safe paths, counted skips, a source made of files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from clipress.data.pairs import Classes, SourceSpec
from clipress.data.transforms import open_image
from clipress.errors import DataError
from clipress.recipe import digest

log = logging.getLogger("clipress.data")
MAX_SKIPPED = 0.2  # a larger part of broken records stops the run


def needed(path: Path | None, key: str, form: str, folder: bool = False) -> Path:
    """Return a path that a recipe must give and that must exist."""
    if path is None:
        raise DataError(f"data: format '{form}' needs the key '{key}'.")
    if not (path.is_dir() if folder else path.is_file()):
        raise DataError(f"data: {key} {path} was asked for, and there is no such {'folder' if folder else 'file'}.")
    return path


class Files:
    """A source of picture files, gathered by `add`, closed by `done`."""

    def __init__(self, spec: SourceSpec, origin: Path, classes: Classes | None = None) -> None:
        self.name, self.classes = spec.name or spec.format, classes
        self.root = (spec.images or origin.parent).resolve()
        self.origin, self.limit, self.fingerprint = origin, spec.limit, ""
        self.paths: list[str] = []
        self.texts: list[tuple[str, ...]] = []
        self.groups: list[int] = []
        self.skipped: list[str] = []

    def add(self, path: str, texts: tuple[str, ...], where: str, group: int | None = None) -> None:
        """Take one picture with its captions; it must lie under the images folder and exist."""
        if self.limit is not None and len(self.paths) >= self.limit:
            return
        try:
            full = (self.root / path).resolve()
            inside, there = full.is_relative_to(self.root), full.is_file()
        except (OSError, ValueError):
            inside = there = False
        if not inside:
            self.skip(f"{where}: {path!r} points outside {self.root}")
        elif not there:
            self.skip(f"{where}: there is no file {path}")
        else:
            self.groups.append(len(self.paths) if group is None else group)
            self.paths.append(path)
            self.texts.append(texts)

    def skip(self, reason: str) -> None:
        """Count a record that cannot be used."""
        self.skipped.append(reason)

    def done(self) -> Files:
        """Report the skipped records; too many are an error."""
        total = len(self.paths) + len(self.skipped)
        if self.skipped:
            log.warning(
                "%s: %d of %d records skipped; first: %s", self.origin, len(self.skipped), total, self.skipped[0]
            )
        if len(self.skipped) > MAX_SKIPPED * total:
            raise DataError(
                f"{self.origin}: {len(self.skipped)} of {total} records cannot be used (first: {self.skipped[0]}). "
                f"At most {MAX_SKIPPED:.0%} are skipped; check 'annotations' and 'images'."
            )
        self.fingerprint = digest(self.paths, self.texts, self.groups)
        return self

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        return open_image(self.root / self.paths[index])

    def captions(self, index: int) -> Sequence[str]:
        return self.texts[index]

    def group(self, index: int) -> int:
        return self.groups[index]
