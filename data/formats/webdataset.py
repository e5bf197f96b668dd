"""WebDataset shards by open_clip's conventions (as written by img2dataset), with random access to records.

A shard is a plain tar file. Consecutive members with the same name up to the first dot are one record: an image (the
first of `jpg`, `png`, `jpeg`, `webp` and `avif`) with its caption (`txt`, or a key of `json`) or, if the recipe sets `classes`,
with its label (`cls`). Suffixes are case-insensitive, and can be set; other members are ignored. Records that lack a side are
left out; those that are cut off are damaged.

The headers of a shard are read once, and the offsets of its records are kept in the cache folder. Records can then be
read in any order: workers, processes and exact epochs work as they do for files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipress.data.file_states import UNKNOWN, Check, content_state, file_states
from clipress.data.formats.files import decoded, report_skipped
from clipress.data.formats.index_files import bytes_at, keep_index, kept_index
from clipress.data.formats.text import NORMALISERS
from clipress.data.prompts import read_classes, read_templates
from clipress.data.sources import FORMATS, Classes
from clipress.data.spec import SourceSpec
from clipress.data.transforms import open_image
from clipress.errors import DataError

VERSION = 3  # Version of cached indices.
NOTHING, CUT_OFF = (0, 0), (0, -1)  # instead of a place
DEFAULT = SourceSpec(format="webdataset")
MAX_SHARDS, MAX_BRACES = 1_000_000, 100
MAX_EXTENDED = 1 << 13  # bytes of a long name or pax records; real ones are shorter, and parsing is quadratic
EXTENDED = {
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
}
log = logging.getLogger("clipress.data")
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
        self._normalised, self._encoding = NORMALISERS[spec.text_normaliser], spec.encoding
        self._caption_key = spec.caption_key
        images, texts, labels, counts, total, damaged = [], [], [], [], 0, 0
        for path in self.paths:
            members = index_of(path, spec)
            usable = members["image"][:, 1] > 0
            usable &= members["label"] >= 0 if classes else members["text"][:, 1] > 0
            images.append(members["image"][usable])
            texts.append(members["text"][usable])
            labels.append(members["label"][usable])
            counts.append(int(usable.sum()))
            total += len(usable)
            damaged += int(((members["image"][:, 1] < 0) | (members["text"][:, 1] < 0)).sum())
        what = "a label (cls)" if classes else f"a caption ({_captions_named(spec)})"
        report_skipped(spec.shards, total, damaged, "a record that is cut off", spec.max_skipped)
        incomplete = total - sum(counts) - damaged
        if total and incomplete == total:
            raise DataError(
                f"{spec.shards}: expected an image and {what} in every record; {total} of {total} lack one. Set 'image_suffixes', "
                "'caption_suffixes' or 'caption_key'."
            )
        if incomplete:
            log.warning("%s: left out %d of %d records without an image or %s", spec.shards, incomplete, total, what)
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
        if self._caption_key or spec.encoding != "utf-8":
            content.update(repr((self._caption_key, spec.encoding)).encode())
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

    def states(self, items: Sequence[int], check: Check) -> np.ndarray:
        """Return what tells whether images were replaced, as `record_states` does."""
        return record_states(self.paths, self._first, self._images, items, check)

    def captions(self, index: int) -> Sequence[str]:
        if self.classes is not None:
            return self.classes.prompts(self.group(index))
        found = self._read(index, self._texts)
        if self._caption_key is None:
            texts = [decoded(found, self._encoding, self._name_of(index))]
        else:
            texts = captions_in(found, self._caption_key)
        texts = [text for text in (self._normalised(text.strip()) for text in texts) if text]
        if not texts:
            raise DataError(f"{self._name_of(index)}: empty caption.")
        return tuple(texts)

    def group(self, index: int) -> int:
        return index if self._labels is None else int(self._labels[index])

    @property
    def num_captions(self) -> int | None:
        """Number of captions of all records; None if it takes reading them, since a JSON file may have several."""
        if self._caption_key and not self.classes:
            return None
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


def record_states(
    paths: Sequence[Path], first: np.ndarray, places: np.ndarray, items: Sequence[int], check: Check
) -> np.ndarray:
    """Return what tells whether records were replaced, see file_states.py: int64 [N, 2].

    Their shard's size and time stand for theirs. `first` is the first record of each shard, `places` as in `index_of`.
    """
    shards = np.searchsorted(first, items, side="right") - 1
    if check == "stat":
        distinct, shard = np.unique(shards, return_inverse=True)
        return file_states([paths[number] for number in distinct], check)[shard]

    def state(number: int, item: int) -> tuple[int, int]:
        try:
            return content_state(bytes_at(paths[number], *places[item].tolist()))
        except DataError:
            return UNKNOWN

    return np.asarray(list(map(state, shards.tolist(), items)), np.int64).reshape(-1, 2)


def captions_in(content: bytes, key: str) -> list[str]:
    """Return the captions under a key of a JSON mapping, a text or a list of texts; none if there are no such."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return []
    value = found.get(key) if isinstance(found, dict) else None
    texts = value if isinstance(value, list) else [value]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def _captions_named(spec: SourceSpec) -> str:
    suffixes = ", ".join(spec.caption_suffixes or (("json",) if spec.caption_key else ("txt",)))
    return f"'{spec.caption_key}' in {suffixes}" if spec.caption_key else suffixes


def index_of(path: Path, spec: SourceSpec = DEFAULT) -> dict[str, np.ndarray]:
    """Return the index of a shard's records, from the cache folder if possible.

    image and text: byte offset and size, int64 [N, 2], zeros if absent, a size of -1 if cut off; label: int64 [N], -1 if absent;
    names: as read by `names_of`.
    """
    known = path.stat()
    settings = (spec.image_suffixes, spec.caption_suffixes, spec.caption_key)
    identity = (VERSION, str(path.resolve()), known.st_size, known.st_mtime_ns, settings)
    if (arrays := kept_index("shards", identity)) is None:
        arrays = build_index(path, spec)
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


def build_index(path: Path, spec: SourceSpec = DEFAULT) -> dict[str, np.ndarray]:
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
                records[-1][suffix] = (member.offset_data, member.size) if complete else CUT_OFF
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError) as error:
        if not records:
            raise DataError(f"{path} is not a readable tar file: {error}. Compressed ones are not supported.") from None
        # truncated: complete records are used, the rest counts as a record without an image
    suffixes = spec.caption_suffixes or (("json",) if spec.caption_key else ("txt",))
    images, texts = (
        [next((row[suffix] for suffix in map(str.lower, wanted) if suffix in row), NOTHING) for row in records]
        for wanted in (spec.image_suffixes, suffixes)
    )
    if key := spec.caption_key:
        texts = [place if place[1] <= 0 or captions_in(bytes_at(path, *place), key) else NOTHING for place in texts]
    return {
        "image": np.asarray(images, np.int64).reshape(-1, 2),
        "text": np.asarray(texts, np.int64).reshape(-1, 2),
        "label": np.asarray([_label(path, row.get("cls", NOTHING)) for row in records], np.int64),
        # one array of bytes: no member's name contains a zero byte
        "names": np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8),
    }


def names_of(members: dict[str, np.ndarray]) -> list[str]:
    """Return the names of an index's records: member names up to the first dot."""
    return members["names"].tobytes().decode("utf-8", "surrogateescape").split("\0") if len(members["image"]) else []


def _label(path: Path, place: tuple[int, int]) -> int:
    text = bytes_at(path, *place)[:20].decode("ascii", "replace").strip() if place[1] > 0 else ""
    return int(text) if text.isdecimal() and len(text) < 10 else -1
