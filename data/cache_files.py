"""The files of a teacher cache: what is in them, how shards are written, and how they are checked.

A cache holds one teacher's raw outputs for one source, embeddings or a classifier's logits: of `views` fixed views per image, whose parameters are stored as
plain numbers (as in MobileCLIP's reinforced data sets), and of every caption. Row = item * views + view, always: an
image that cannot be read keeps its row, so rows never shift.

    <home>/<key>/manifest.json            everything that decides the content; `key` is its digest
    <home>/<key>/00000/shard.json         counts; size and SHA-256 of each array. A shard is written whole or not at all
                      /image.npy          unit rows [items * views, D], float16, or bfloat16 bits as uint16
                      /image_norm.npy     their norms, float32: raw embedding = unit row * norm
                      /text.npy, text_norm.npy   the same for texts; each distinct text is stored once
                      /captions.npy       int64: the text of every caption, item by item
                      /offsets.npy        int64 [items + 1]: where an item's captions begin
                      /views.npy          int32 [items * views, 7]: left, top, right, bottom (0: no crop), down, right, flip
                      /ok.npy             bool [items]
                      /states.npy         int64 [items, 2]: what the image files were, see file_states.py

A shard whose images have been replaced since is written again as a whole: batches never cross shards, so it then has the
bytes that a new cache would have. States are compared when a cache is opened to train with, and are not part of its key: a
source is opened without looking at its files, and one touched image must not cost a whole cache.

Nothing here needs torch. `teacher_cache.py` reads caches, `compress/teacher_cache.py` builds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from clipress.data.file_states import Check, image_states
from clipress.data.transforms import Augment, Preprocess, View
from clipress.errors import ClipressError, first_line
from clipress.recipe import Section, digest
from clipress.storage import sha256, write_text_whole, write_whole

if TYPE_CHECKING:
    from clipress.data.sources import Source

SCHEMA_VERSION = 2
MANIFEST, SHARD = "manifest.json", "shard.json"
MISSING = "missing"  # the problem of a shard that does not exist
ITEMS_PER_SHARD = 4096  # the most a killed build loses, per process
MAX_ITEMS, MAX_SHARDS = 1 << 40, 1 << 20
ARRAYS = ("image", "image_norm", "text", "text_norm", "captions", "offsets", "views", "ok", "states")
_NOT_IN_KEY = {"source", "logit_scale", "logit_bias", "made_with"}  # implied by the other fields, or without effect

Dtype = Literal["fp16", "bf16"]


class CacheSettings(Section):
    """The `cache` section of a teacher: embed the training data once instead of running the teacher at every step."""

    views: int = Field(1, ge=1, le=64)
    """Augmented views stored per image; training samples from them."""
    dtype: Dtype = "fp16"
    """Type of the stored unit rows. fp16 is more accurate: 1 - cosine is about 2e-7, against 2e-6 for bf16."""
    check: Check = "stat"
    """How replaced images are noticed when the cache is opened; they are then embedded again. stat: by the sizes and modification
    times of their files, or of their tar shards. content: by their bytes, which reads all of them."""


class Manifest(Section):
    """Description of a cache: everything that determines its content."""

    schema_version: int = SCHEMA_VERSION
    teacher: str
    """The teacher's hash."""
    logit_scale: float | None = None
    """exp(logit_scale) of the teacher, for losses on logits; None for a teacher without one."""
    logit_bias: float | None = None
    preprocess: Preprocess
    tokenizer: dict[str, Any] | None
    """None for a teacher that reads no texts."""
    source: str
    fingerprint: str
    """Fingerprint of the source."""
    items: int = Field(ge=0, le=MAX_ITEMS)
    augment: Augment
    views: int = Field(ge=0, le=64)
    """Views per image; 0 for a source without images."""
    view_seed: int = 0
    """View k of item i is drawn from (view_seed, i, k)."""
    dim: int = Field(ge=1, le=1 << 16)
    dtype: Dtype
    precision: Literal["fp32", "bf16"]
    """Precision of the teacher's forward pass."""
    check: Check = "stat"
    items_per_shard: int = Field(ITEMS_PER_SHARD, ge=1)
    made_with: dict[str, str]

    @property
    def key(self) -> str:
        """Return the name of the cache's folder: a digest of everything that decides its content."""
        return digest(self.model_dump(mode="json", exclude=_NOT_IN_KEY))

    @property
    def shards(self) -> int:
        return -(-self.items // self.items_per_shard)

    def items_of(self, shard: int) -> range:
        """Return the items in a shard."""
        start = shard * self.items_per_shard
        return range(start, min(start + self.items_per_shard, self.items))


class File(Section):
    """An array's size and checksum."""

    bytes: int
    sha256: str


class Shard(Section):
    """The content of `shard.json`."""

    items: NonNegativeInt
    captions: NonNegativeInt
    texts: NonNegativeInt
    failed: NonNegativeInt
    """Number of images that could not be read."""
    files: dict[str, File]


@dataclass(frozen=True)
class Rows:
    """One shard in memory, with raw embeddings; T texts, C captions, N items."""

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
    states: np.ndarray
    """int64 [N, 2], taken before the images were read"""


def row_from_view(view: View) -> tuple[int, ...]:
    """Return a view as a row of `views.npy`."""
    return (*(view.box or (0, 0, 0, 0)), *view.shift, int(view.flip))


def view_from_row(row: np.ndarray) -> View:
    """Return the view stored in a row of `views.npy`."""
    left, top, right, bottom, down, moved, flip = row.tolist()
    return View((left, top, right, bottom) if right else None, (down, moved), bool(flip))


def write_manifest(home: Path, manifest: Manifest) -> Path:
    """Write a cache's manifest unless it exists; returns the cache's folder."""
    folder = home / manifest.key
    if not (folder / MANIFEST).is_file():
        write_text_whole(folder / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")
    return folder


def write_shard(folder: Path, number: int, manifest: Manifest, rows: Rows) -> None:
    """Write one shard of a cache, whole or not at all."""
    image, image_norm = _unit(rows.image, np.repeat(rows.ok, manifest.views), manifest)
    text, text_norm = _unit(rows.text, np.ones(len(rows.text), bool), manifest)
    made = {"image": image, "image_norm": image_norm, "text": text, "text_norm": text_norm}
    arrays = {name: made[name] if name in made else getattr(rows, name) for name in ARRAYS}

    def fill(aside: Path) -> None:
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        files = {path.stem: File(bytes=path.stat().st_size, sha256=sha256(path)) for path in sorted(aside.iterdir())}
        counts = {"items": len(rows.ok), "captions": len(rows.captions), "texts": len(rows.text)}
        shard = Shard(**counts, failed=int((~rows.ok).sum()), files=files)
        (aside / SHARD).write_text(json.dumps(shard.model_dump(), indent=1) + "\n", encoding="utf-8")

    write_whole(shard_folder(folder, number), fill)


def _unit(raw: np.ndarray, ok: np.ndarray, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Split raw embeddings into stored unit rows and their norms; rows that are not ok become zero."""
    norm = np.linalg.norm(raw, axis=1, keepdims=True)
    if not np.all(np.isfinite(norm[ok]) & (norm[ok] > 0)):
        raise ClipressError(
            f"{manifest.source}: expected finite embeddings from teacher {manifest.teacher}, found some that are not finite, or "
            "zero. They were not stored. Check the teacher's weights, or embed in fp32."
        )
    unit = np.divide(raw, norm, out=np.zeros_like(raw), where=ok[:, None])
    return _stored(unit, manifest.dtype), np.where(ok, norm[:, 0], 0).astype(np.float32)


def _stored(unit: np.ndarray, dtype: Dtype) -> np.ndarray:
    if dtype == "fp16":
        return unit.astype(np.float16)
    bits = unit.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # round to nearest, ties to even


def as_float32(stored: np.ndarray) -> np.ndarray:
    """Return stored unit rows as float32."""
    if stored.dtype == np.float16:
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def unfinished_shards(
    folder: Path, manifest: Manifest, source: Source, shards: Iterable[int]
) -> tuple[list[int], list[int]]:
    """Return which of some shards must be written, and the items that are among them because their images changed.

    A finished shard has all files in full size, and its images are still the ones it was made from.
    """
    unfinished, changed = [], []
    for number in shards:
        if shard_problem(folder, number, manifest):
            unfinished.append(number)
        elif found := _changed_items(folder, number, manifest, source):
            unfinished.append(number)
            changed += found
    return unfinished, changed


def _changed_items(folder: Path, number: int, manifest: Manifest, source: Source) -> list[int]:
    items = manifest.items_of(number)
    states = image_states(source, items, manifest.check)
    try:
        known = np.load(shard_folder(folder, number) / "states.npy")
    except (OSError, ValueError, EOFError):
        return list(items)
    if known.shape != states.shape:
        return list(items)
    return [items[at] for at in np.flatnonzero((known != states).any(1))]


def shard_folder(folder: Path, number: int) -> Path:
    """Return the folder of one shard."""
    return folder / f"{number:05}"


def read_shard(folder: Path, number: int) -> Shard:
    """Read a shard's `shard.json`. Raises OSError or ValueError."""
    return Shard.model_validate_json((shard_folder(folder, number) / SHARD).read_bytes())


def shard_problem(folder: Path, number: int, manifest: Manifest) -> str | None:
    """Return what is wrong with a shard, if anything, without reading its arrays."""
    home = shard_folder(folder, number)
    try:
        shard = read_shard(folder, number)
    except FileNotFoundError:
        return MISSING
    except (OSError, ValueError) as error:
        return f"unreadable {SHARD} ({first_line(error)})"
    wanted = len(manifest.items_of(number))
    if shard.items != wanted or shard.files.keys() != set(ARRAYS):
        return f"expected {wanted} items in {sorted(ARRAYS)}, found {shard.items} in {sorted(shard.files)}"
    for name, file in shard.files.items():
        path = home / f"{name}.npy"
        size = path.stat().st_size if path.is_file() else None
        if size != file.bytes:
            return f"{path.name}: expected {file.bytes} bytes, found {size}"
    return None
