"""What a teacher says about a source, kept on disk: training looks it up instead of running the teacher.

A cache holds one teacher's embeddings of one source: of `views` fixed views per picture, whose parameters are stored as
plain numbers (MobileCLIP's reinforced data sets do the same), and of every caption. Row = item * views + view, always:
a picture that cannot be read keeps its row, so rows never shift.

    <home>/<key>/manifest.json            what decides the content; `key` is its digest
    <home>/<key>/00000/shard.json         counts; bytes and SHA-256 of each array. A shard is whole or not there
                      /image.npy          unit rows [items * views, D], float16 or bfloat16's bits as uint16
                      /image_norm.npy     their lengths, float32: raw embedding = unit row * length
                      /text.npy, text_norm.npy   the same for texts; a text that comes twice is there once
                      /captions.npy       int64: the text of every caption, items one after the other
                      /offsets.npy        int64 [items + 1]: where an item's captions begin
                      /views.npy          int32 [items * views, 7]: left, top, right, bottom (0: no crop), down, right, flip
                      /ok.npy             bool [items]

Nothing here needs torch. `compress/teacher_cache.py` makes caches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, ValidationError

from clipress.data.transforms import Augment, Preprocess, View
from clipress.errors import ArtifactError, ClipressError
from clipress.recipe import Section, digest, first_problem
from clipress.storage import read_json, sha256, write_text_whole, write_whole

SCHEMA_VERSION = 1
MANIFEST, SHARD = "manifest.json", "shard.json"
ITEMS_PER_SHARD = 4096  # what a killed build loses at most, per process
MAX_ITEMS, MAX_SHARDS = 1 << 40, 1 << 20
CHECKED_ROWS = 500_000  # so many embeddings, evenly spread, are looked at when a cache is opened
NORM_TOLERANCE = 1e-2
_INFORMATION = {"source", "logit_scale", "logit_bias", "made_with"}  # follows from the rest, or decides nothing

Dtype = Literal["fp16", "bf16"]


class CacheSettings(Section):
    """The `cache` section of a teacher: embed the training data once instead of running the teacher at every step."""

    views: int = Field(1, ge=1, le=64)
    """Augmented views stored per picture; training draws among them."""
    dtype: Dtype = "fp16"
    """Of the stored unit rows. fp16 is the more exact one: 1 - cosine is about 2e-7, bf16's 2e-6."""


class Manifest(Section):
    """What a cache holds, and all that decides it."""

    schema_version: int = SCHEMA_VERSION
    teacher: str
    """The teacher's hash."""
    logit_scale: float
    """exp(logit_scale) of the teacher; losses on logits need it."""
    logit_bias: float | None = None
    preprocess: Preprocess
    tokenizer: dict[str, Any]
    source: str
    fingerprint: str
    """Of the source."""
    items: int = Field(ge=0, le=MAX_ITEMS)
    augment: Augment
    views: int = Field(ge=0, le=64)
    """0: the source has texts alone."""
    view_seed: int = 0
    """View k of item i was drawn from (view_seed, i, k)."""
    dim: int = Field(ge=1, le=1 << 16)
    dtype: Dtype
    precision: Literal["fp32", "bf16"]
    """In which the teacher computed."""
    items_per_shard: int = Field(ITEMS_PER_SHARD, ge=1)
    made_with: dict[str, str]

    @property
    def key(self) -> str:
        """Name of the cache's folder: a digest of everything that decides the content."""
        return digest(self.model_dump(mode="json", exclude=_INFORMATION))

    @property
    def shards(self) -> int:
        return -(-self.items // self.items_per_shard)

    def items_of(self, shard: int) -> range:
        """Return the items that a shard holds."""
        start = shard * self.items_per_shard
        return range(start, min(start + self.items_per_shard, self.items))


class File(Section):
    """An array's size and checksum."""

    bytes: int
    sha256: str


class Shard(Section):
    """What `shard.json` says."""

    items: NonNegativeInt
    captions: NonNegativeInt
    texts: NonNegativeInt
    failed: NonNegativeInt
    """Pictures that could not be read."""
    files: dict[str, File]


@dataclass(frozen=True)
class Rows:
    """One shard in memory, embeddings as the teacher gave them; T texts, C captions, N items."""

    image: np.ndarray
    """float32 [N * views, D]"""
    text: np.ndarray
    """float32 [T, D]"""
    captions: np.ndarray
    """int64 [C]"""
    offsets: np.ndarray
    """int64 [N + 1]"""
    views: np.ndarray
    """int32 [N * views, 7]"""
    ok: np.ndarray
    """bool [N]"""


_ARRAYS = ("image", "image_norm", "text", "text_norm", "captions", "offsets", "views", "ok")


def row_from_view(view: View) -> tuple[int, ...]:
    """Return a view as a row of `views.npy`."""
    return (*(view.box or (0, 0, 0, 0)), *view.shift, int(view.flip))


def view_from_row(row: np.ndarray) -> View:
    """Return the view that a row of `views.npy` means."""
    left, top, right, bottom, down, moved, flip = row.tolist()
    return View((left, top, right, bottom) if right else None, (down, moved), bool(flip))


def write_manifest(home: Path, manifest: Manifest) -> Path:
    """Write a cache's manifest unless it is there; returns the cache's folder."""
    folder = home / manifest.key
    if not (folder / MANIFEST).is_file():
        write_text_whole(folder / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")
    return folder


def write_shard(folder: Path, number: int, manifest: Manifest, rows: Rows) -> None:
    """Write one shard of a cache: whole, or not at all."""
    image, image_norm = _unit(rows.image, np.repeat(rows.ok, manifest.views), manifest)
    text, text_norm = _unit(rows.text, np.ones(len(rows.text), bool), manifest)
    made = {"image": image, "image_norm": image_norm, "text": text, "text_norm": text_norm}
    arrays = {name: made[name] if name in made else getattr(rows, name) for name in _ARRAYS}

    def fill(aside: Path) -> None:
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        files = {path.stem: File(bytes=path.stat().st_size, sha256=sha256(path)) for path in sorted(aside.iterdir())}
        counts = {"items": len(rows.ok), "captions": len(rows.captions), "texts": len(rows.text)}
        shard = Shard(**counts, failed=int((~rows.ok).sum()), files=files)
        (aside / SHARD).write_text(json.dumps(shard.model_dump(), indent=1) + "\n", encoding="utf-8")

    write_whole(_shard_folder(folder, number), fill)


def _unit(raw: np.ndarray, ok: np.ndarray, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Split raw embeddings into unit rows, as they are stored, and their lengths; what is not ok becomes zero."""
    norm = np.linalg.norm(raw, axis=1, keepdims=True)
    if not np.all(np.isfinite(norm[ok]) & (norm[ok] > 0)):
        raise ClipressError(
            f"The teacher {manifest.teacher} gives embeddings of {manifest.source} that are not finite, or zero. "
            "They were not stored. Look at the teacher's weights, or embed in fp32."
        )
    unit = np.divide(raw, norm, out=np.zeros_like(raw), where=ok[:, None])
    return _stored(unit, manifest.dtype), np.where(ok, norm[:, 0], 0).astype(np.float32)


def _stored(unit: np.ndarray, dtype: Dtype) -> np.ndarray:
    if dtype == "fp16":
        return unit.astype(np.float16)
    bits = unit.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to the nearest, ties to even


def _loaded(stored: np.ndarray) -> np.ndarray:
    if stored.dtype == np.float16:
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def finished_shards(folder: Path, manifest: Manifest) -> set[int]:
    """Return the shards of a cache that are there in full size."""
    return {number for number in range(manifest.shards) if not _shard_trouble(folder, number, manifest)}


def _shard_folder(folder: Path, number: int) -> Path:
    return folder / f"{number:05}"


def _read_shard(folder: Path, number: int) -> Shard:
    return Shard.model_validate_json((_shard_folder(folder, number) / SHARD).read_bytes())


def _shard_trouble(folder: Path, number: int, manifest: Manifest) -> str | None:
    """Say what is wrong with a shard, without reading its arrays."""
    home = _shard_folder(folder, number)
    try:
        shard = _read_shard(folder, number)
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"has an unreadable {SHARD} ({str(error).splitlines()[0]})"
    wanted = len(manifest.items_of(number))
    if shard.items != wanted or shard.files.keys() != set(_ARRAYS):
        return f"holds {shard.items} items in {sorted(shard.files)}; {wanted} in {sorted(_ARRAYS)} are asked for"
    for name, file in shard.files.items():
        path = home / f"{name}.npy"
        size = path.stat().st_size if path.is_file() else None
        if size != file.bytes:
            return f"has a {path.name} of {size} bytes; {SHARD} says {file.bytes}"
    return None


class TeacherCache:
    """Reads a cache. Arrays are mapped, not loaded; worker processes open it anew, without checking it again."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._maps: dict[tuple[str, int], np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> TeacherCache:
        """Open a cache and check that it is whole.

        Counts, sizes, and finiteness and length of up to 500,000 embeddings of each kind are always looked at; `verify`
        reads everything and compares checksums. Raises ArtifactError, which says what differs.
        """
        cache = cls(Path(folder), read_manifest(folder))
        cache._check(verify)
        return cache

    def __reduce__(self) -> tuple:
        return TeacherCache, (self.folder, self.manifest)

    def __len__(self) -> int:
        """Return the number of items."""
        return self.manifest.items

    @cached_property
    def _shards(self) -> list[Shard]:
        return [_read_shard(self.folder, number) for number in range(self.manifest.shards)]

    @cached_property
    def _first_captions(self) -> np.ndarray:
        """Where each shard's captions begin, and the number of all: int64 [shards + 1]."""
        return np.cumsum([0, *(shard.captions for shard in self._shards)])

    @property
    def views_hash(self) -> str:
        """Return a hash of all views: caches that share it show the same pixels, and miss the same pictures."""
        stored = [(shard.files["views"].sha256, shard.files["ok"].sha256) for shard in self._shards]
        return digest(self.manifest.items_per_shard, stored)

    @property
    def failed(self) -> int:
        """Return how many pictures could not be read."""
        return sum(shard.failed for shard in self._shards)

    def ok(self, item: int) -> bool:
        """Tell whether an item's picture could be read."""
        shard, place = divmod(item, self.manifest.items_per_shard)
        return bool(self._array("ok", shard)[place])

    def view(self, item: int, k: int) -> View:
        """Return the parameters of an item's k-th view."""
        shard, row = self._place(self.image_row(item, k))
        return view_from_row(self._array("views", shard)[row])

    def image_row(self, item: int, k: int = 0) -> int:
        """Return the row of an item's k-th view."""
        return item * self.manifest.views + k

    def text_row(self, item: int, caption: int = 0) -> int:
        """Return the row of one of an item's captions, counted through the whole source."""
        shard, place = divmod(item, self.manifest.items_per_shard)
        return int(self._first_captions[shard] + self._array("offsets", shard)[place]) + caption

    def images(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return unit image embeddings: float32 [B, D]."""
        return _loaded(self._gathered("image", *self._place(_checked(rows, self.manifest.items * self.manifest.views))))

    def image_norms(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the lengths the image embeddings had: float32 [B]."""
        return self._gathered("image_norm", *self._place(_checked(rows, self.manifest.items * self.manifest.views)))

    def texts(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return unit text embeddings: float32 [B, D]."""
        return _loaded(self._gathered("text", *self._text_place(rows)))

    def text_norms(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the lengths the text embeddings had: float32 [B]."""
        return self._gathered("text_norm", *self._text_place(rows))

    def _place(self, rows: Any) -> tuple[Any, Any]:
        return divmod(rows, self.manifest.items_per_shard * self.manifest.views)

    def _text_place(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        captions = _checked(rows, int(self._first_captions[-1]))
        shards = np.searchsorted(self._first_captions, captions, side="right") - 1
        return shards, self._gathered("captions", shards, captions - self._first_captions[shards])

    def _gathered(self, name: str, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Copy rows out of the shards. One by one: a random batch finds hardly two of them in one shard."""
        arrays = {shard: self._array(name, shard) for shard in np.unique(shards).tolist()}
        first = next(iter(arrays.values()), self._array(name, 0))
        out = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for at, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            out[at] = arrays[shard][row]
        return out

    def _array(self, name: str, shard: int) -> np.ndarray:
        key = (name, shard)
        if key not in self._maps:
            path = _shard_folder(self.folder, shard) / f"{name}.npy"
            try:
                self._maps[key] = np.load(path, mmap_mode="r").view(np.ndarray)
            except (OSError, ValueError, EOFError, ArithmeticError, TypeError) as error:
                raise self._damaged(shard, f"has an unreadable {path.name} ({error})") from None
        return self._maps[key]

    def _damaged(self, shard: int, what: str) -> ArtifactError:
        home = _shard_folder(self.folder, shard)
        return ArtifactError(
            f"{self.folder}: shard {home.name} {what}. Remove {home} and do: clipress embed RECIPE "
            "(finished shards are kept)."
        )

    def _check(self, verify: bool) -> None:
        troubles = {n: _shard_trouble(self.folder, n, self.manifest) for n in range(self.manifest.shards)}
        found = {number: trouble for number, trouble in troubles.items() if trouble}
        missing = [number for number, trouble in found.items() if trouble == "is missing"]
        if missing:
            raise ArtifactError(
                f"{self.folder} is not whole: {len(missing)} of {self.manifest.shards} shards are missing, "
                f"the first is {missing[0]:05}. Do: clipress embed RECIPE (finished shards are kept)."
            )
        for number, trouble in found.items():
            raise self._damaged(number, trouble)
        for number, shard in enumerate(self._shards):
            if verify:
                self._check_sums(number, shard)
            self._check_layout(number, shard)
            self._check_rows(number, shard, verify)

    def _check_sums(self, number: int, shard: Shard) -> None:
        for name, file in shard.files.items():
            found = sha256(_shard_folder(self.folder, number) / f"{name}.npy")
            if found != file.sha256:
                raise self._damaged(
                    number, f"has a changed {name}.npy: its sha256 starts with {found[:12]}, not {file.sha256[:12]}"
                )

    def _check_layout(self, number: int, shard: Shard) -> None:
        rows = shard.items * self.manifest.views
        for name, dtype, shape in (
            ("ok", np.bool_, (shard.items,)),
            ("views", np.int32, (rows, 7)),
            ("image_norm", np.float32, (rows,)),
            ("text_norm", np.float32, (shard.texts,)),
            ("captions", np.int64, (shard.captions,)),
            ("offsets", np.int64, (shard.items + 1,)),
        ):
            array = self._array(name, number)
            if (array.dtype, array.shape) != (np.dtype(dtype), shape):
                found, asked = f"{array.dtype} {list(array.shape)}", f"{np.dtype(dtype)} {list(shape)}"
                raise self._damaged(number, f"has a {name}.npy of {found}; {asked} is asked for")
        captions, offsets = self._array("captions", number), self._array("offsets", number)
        if len(captions) and not 0 <= captions.min() <= captions.max() < shard.texts:
            raise self._damaged(number, f"has a captions.npy that points outside its {shard.texts} texts")
        if offsets[0] != 0 or offsets[-1] != shard.captions or (np.diff(offsets) < 0).any():
            raise self._damaged(number, f"has an offsets.npy that does not split its {shard.captions} captions")

    def _check_rows(self, number: int, shard: Shard, verify: bool) -> None:
        ok = np.repeat(self._array("ok", number), self.manifest.views)
        stored = {"fp16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}[self.manifest.dtype]
        for name, count, total, used in (
            ("image", shard.items * self.manifest.views, self.manifest.items * self.manifest.views, ok),
            ("text", shard.texts, sum(other.texts for other in self._shards), np.ones(shard.texts, bool)),
        ):
            array = self._array(name, number)
            if array.shape != (count, self.manifest.dim) or array.dtype != stored:
                raise self._damaged(
                    number,
                    f"has a {name}.npy of {array.dtype} {list(array.shape)}; "
                    f"{stored} {[count, self.manifest.dim]} is asked for",
                )
            step = 1 if verify else max(total // CHECKED_ROWS, 1)
            lengths = np.linalg.norm(_loaded(array[::step]), axis=1)
            off = ~(np.abs(lengths - used[::step]) <= NORM_TOLERANCE)  # a NaN compares false
            if off.any():
                row = int(np.flatnonzero(off)[0])
                raise self._damaged(
                    number,
                    f"has a {name}.npy whose row {row * step} has length {lengths[row]:.4g}, not {used[row * step]:d}",
                )


def _checked(rows: Sequence[int] | np.ndarray, total: int) -> np.ndarray:
    rows = np.asarray(rows, np.int64)
    if len(rows) and not (0 <= rows.min() and rows.max() < total):
        raise IndexError(f"Rows {rows.min()} to {rows.max()} were asked for; there are {total}.")
    return rows


def read_manifest(folder: str | Path) -> Manifest:
    """Read a cache's manifest and check that it belongs to its folder."""
    folder = Path(folder).resolve()
    path = folder / MANIFEST
    again = f"Remove {folder} and do: clipress embed RECIPE"
    try:
        raw = read_json(path)
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ArtifactError(f"{path} has schema_version {version!r}; this clipress reads {SCHEMA_VERSION}. {again}")
        manifest = Manifest.model_validate(raw)
    except FileNotFoundError:
        raise ArtifactError(
            f"Teacher embeddings were asked for at {folder}; there is no {MANIFEST} in it. Do: clipress embed RECIPE"
        ) from None
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged: {first_problem(error)}. {again}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}). {again}") from None
    if manifest.shards > MAX_SHARDS:
        raise ArtifactError(f"{path} speaks of {manifest.shards:,} shards; at most {MAX_SHARDS:,} are read. {again}")
    if manifest.key != folder.name:
        raise ArtifactError(f"{path} describes {manifest.key}, and lies in {folder.name}: one was changed. {again}")
    return manifest
