"""WebDataset shards by open_clip's conventions (as written by img2dataset), with random access to records.

A shard is a plain tar file. Consecutive members with the same name up to the first dot are one record: an image (the
first of `jpg`, `png`, `jpeg` and `webp`) with its caption (`txt`) or, if the recipe sets `classes`, with its label
(`cls`). Suffixes are case-insensitive; other members, such as `json`, are ignored.

The headers of a shard are read once, and the offsets of its records are kept in the cache folder. Records can then be
read in any order: workers, processes and exact epochs work as they do for files.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipress.data.formats.files import report_skipped
from clipress.data.formats.index_files import bytes_at, keep_index, kept_index
from clipress.data.formats.text import NORMALISERS
from clipress.data.prompts import read_classes, read_templates
from clipress.data.sources import FORMATS, Classes
from clipress.data.spec import SourceSpec
from clipress.data.transforms import open_image
from clipress.errors import DataError

IMAGES = ("jpg", "png", "jpeg", "webp")
VERSION = 2  # Version of cached indices.
MAX_SHARDS, MAX_BRACES = 1_000_000, 100
MAX_EXTENDED = 1 << 13  # bytes of a long name or pax records; real ones are shorter, and parsing is quadratic
EXTENDED = {
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
}
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_BRACES, _RANGE = re.compile(r"\{([^{}]*)\}"), re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_META = re.compile(r"__[^/]*__($|/)")


@FORMATS.register("webdataset")
def read(spec: SourceSpec) -> Shards:
    """Read the shards that `shards` lists."""
    if not spec.shards:
        raise DataError("data: format 'webdataset' requires the key 'shards', such as 'dir/{00000..00003}.tar'.")
    classes = None
    if spec.classes is not None:
        classes = Classes(read_classes(spec.classes).names, read_templates(spec.templates))
    return Shards(spec, shard_paths(spec.shards), classes)


def shard_paths(pattern: str) -> list[Path]:
    """Return the shards of a pattern, in order; all must exist."""
    paths: list[Path] = []
    if pattern.count("{") > MAX_BRACES:
        raise DataError(f"data: shards: expected at most {MAX_BRACES} braces, found {pattern.count('{')}.")
    for part in pattern.split("::"):
        more = sorted(Path(part).glob("*.tar")) if Path(part).is_dir() else map(Path, expanded(part))
        paths += itertools.islice(more, MAX_SHARDS + 1 - len(paths))
    if len(paths) > MAX_SHARDS:
        raise DataError(f"data: shards: expected at most {MAX_SHARDS:,}, found more in {pattern}.")
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        found = f"{len(missing)} of {len(paths)} are missing, such as {missing[0]}" if missing else "none found"
        raise DataError(f"data: shards {pattern}: {found}.")
    return paths


def expanded(pattern: str) -> Iterator[str]:
    """Expand braces as a shell does: `{00..03}` counts, `{a,b}` lists."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    for choice in _choices(match[1]):
        yield from expanded(pattern[: match.start()] + choice + pattern[match.end() :])


def _choices(inner: str) -> Sequence[str]:
    """Return the alternatives inside braces. Raises DataError if there are too many."""
    ends = _RANGE.fullmatch(inner)
    if not ends:
        return inner.split(",")
    first, last = map(int, ends.groups())
    if last - first >= MAX_SHARDS:
        raise DataError(f"data: shards: expected at most {MAX_SHARDS:,}, found more in {{{inner}}}.")
    width = max(map(len, ends.groups())) if any(end[0] == "0" and len(end) > 1 for end in ends.groups()) else 1
    return [f"{number:0{width}}" for number in range(first, last + 1)]


class Shards:
    """A source of the records in tar files."""

    has_images = has_texts = True

    def __init__(self, spec: SourceSpec, paths: Sequence[Path], classes: Classes | None) -> None:
        self.name, self.classes, self.paths = spec.name or spec.format, classes, list(paths)
        self._normalised = NORMALISERS[spec.text_normaliser]
        images, texts, labels, counts, total = [], [], [], [], 0
        for path in self.paths:
            members = index_of(path)
            usable = members["image"][:, 1] > 0
            usable &= members["label"] >= 0 if classes else members["text"][:, 1] > 0
            images.append(members["image"][usable])
            texts.append(members["text"][usable])
            labels.append(members["label"][usable])
            counts.append(int(usable.sum()))
            total += len(usable)
        sides = "an image or a label (cls)" if classes else "an image or a caption (txt)"
        report_skipped(spec.shards, total, total - sum(counts), f"a record without {sides}")
        self._first = np.cumsum([0, *counts])  # first record of each shard, and the total
        self._images, self._texts = (np.concatenate(parts)[: spec.limit] for parts in (images, texts))
        self._labels = np.concatenate(labels)[: spec.limit] if classes else None
        if classes and len(self) and self._labels.max() >= len(classes.names):
            raise DataError(
                f"{spec.classes}: expected more than {self._labels.max()} class names, since that is a label in "
                f"{spec.shards}; found {len(classes.names)}."
            )
        self.fingerprint = self._fingerprint(spec)

    def _fingerprint(self, spec: SourceSpec) -> str:
        content = hashlib.sha256(repr((self.classes, spec.text_normaliser, [p.name for p in self.paths])).encode())
        for part in (self._first, self._images, self._texts, self._labels):
            if part is not None:
                content.update(np.ascontiguousarray(part))
        return content.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        try:
            return open_image(self._read(index, self._images))
        except DataError as error:
            raise DataError(f"{self._name_of(index)}: {error}") from None

    def captions(self, index: int) -> Sequence[str]:
        if self.classes is not None:
            return self.classes.prompts(self.group(index))
        text = self._normalised(self._read(index, self._texts).decode("utf-8", "replace").strip())
        if not text:
            raise DataError(f"{self._name_of(index)}: empty caption.")
        return (text,)

    def group(self, index: int) -> int:
        return index if self._labels is None else int(self._labels[index])

    @property
    def num_captions(self) -> int:
        """Number of captions of all records."""
        return len(self) * (len(self.classes.templates) if self.classes else 1)

    def _shard(self, index: int) -> Path:
        return self.paths[int(np.searchsorted(self._first, index, side="right")) - 1]

    def _read(self, index: int, places: np.ndarray) -> bytes:
        offset, size = places[index].tolist()
        return bytes_at(self._shard(index), offset, size)

    def _name_of(self, index: int) -> str:
        """Return a record's name, from the header before its content."""
        shard, start = self._shard(index), int(self._images[index, 0]) - tarfile.BLOCKSIZE
        try:
            header = tarfile.TarInfo.frombuf(bytes_at(shard, start, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.TarError:
            return f"{shard}, which was modified after it was indexed"
        return f"{shard}, {header.name}"


def index_of(path: Path) -> dict[str, np.ndarray]:
    """Return the index of a shard's records, from the cache folder if possible.

    image and text: byte offset and size, int64 [N, 2], zeros if absent; label: int64 [N], -1 if absent; names: as read by
    `names_of`.
    """
    known = path.stat()
    identity = (VERSION, str(path.resolve()), known.st_size, known.st_mtime_ns)
    if (arrays := kept_index("shards", identity)) is None:
        arrays = build_index(path)
        keep_index("shards", identity, arrays)
    return arrays


class _Header(tarfile.TarInfo):
    """A tar header with a plausible size: tarfile trusts sizes, and would allocate them or walk backwards."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if not 0 <= header.size <= (MAX_EXTENDED if header.type in EXTENDED else math.inf):
            raise tarfile.ReadError(f"a header has size {header.size:,}")
        return header


def build_index(path: Path) -> dict[str, np.ndarray]:
    """Read a shard's headers and return its index, as `index_of` does."""
    records: list[dict[str, tuple[int, int]]] = []
    names: list[str] = []
    current, size = None, path.stat().st_size
    try:
        with tarfile.open(path, "r:", tarinfo=_Header) as tar:
            for member in tar:
                tar.members.clear()  # tarfile keeps every member
                if member.size < 0:  # from a pax record; tarfile would read the same header again
                    raise tarfile.ReadError(f"{member.name} has size {member.size:,}")
                match = _MEMBER.fullmatch(member.name)
                if match is None or not member.isreg() or _META.match(member.name):
                    continue
                key, suffix = match[1], match[2].lower()
                if key != current or suffix in records[-1]:
                    records.append({})
                    names.append(key)
                    current = key
                complete = member.offset_data + member.size <= size
                records[-1][suffix] = (member.offset_data, member.size) if complete else (0, 0)
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError) as error:
        if not records:
            raise DataError(f"{path} is not a readable tar file: {error}. Compressed ones are not supported.") from None
        # truncated: complete records are used, the rest counts as a record without an image
    nothing = (0, 0)
    images = [next((row[suffix] for suffix in IMAGES if suffix in row), nothing) for row in records]
    return {
        "image": np.asarray(images, np.int64).reshape(-1, 2),
        "text": np.asarray([row.get("txt", nothing) for row in records], np.int64).reshape(-1, 2),
        "label": np.asarray([_label(path, row.get("cls", nothing)) for row in records], np.int64),
        # one array of bytes: no member's name contains a zero byte
        "names": np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8),
    }


def names_of(members: dict[str, np.ndarray]) -> list[str]:
    """Return the names of an index's records: member names up to the first dot."""
    return members["names"].tobytes().decode("utf-8", "surrogateescape").split("\0") if len(members["image"]) else []


def _label(path: Path, place: tuple[int, int]) -> int:
    text = bytes_at(path, *place)[:20].decode("ascii", "replace").strip() if place[1] else ""
    return int(text) if text.isdecimal() and len(text) < 10 else -1
