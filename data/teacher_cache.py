"""Read teacher embeddings from a cache on disk, so that training looks them up instead of running the teacher.

`cache_files.py` describes the files. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from clipress.data.cache_files import (
    ARRAYS,
    MANIFEST,
    MAX_SHARDS,
    MISSING,
    SCHEMA_VERSION,
    Manifest,
    Shard,
    as_float32,
    read_shard,
    shard_folder,
    shard_problem,
    view_from_row,
)
from clipress.data.transforms import View
from clipress.errors import ArtifactError
from clipress.recipe import digest, first_problem
from clipress.storage import read_json, sha256

CHECKED_ROWS = 500_000  # this many embeddings, evenly spaced, are checked when a cache is opened
NORM_TOLERANCE = 1e-2


class TeacherCache:
    """A reader of one cache. Arrays are memory-mapped; worker processes reopen the cache without checking it again."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._maps: dict[tuple[str, int], np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> TeacherCache:
        """Open a cache and check that it is complete.

        Counts and sizes are always checked, and so are the norms of up to 500,000 embeddings of each kind; `verify`
        reads everything and compares checksums. Raises ArtifactError.
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
    def shards(self) -> list[Shard]:
        """Return the descriptions of all shards."""
        return [read_shard(self.folder, number) for number in range(self.manifest.shards)]

    @cached_property
    def _first_captions(self) -> np.ndarray:
        """First caption of each shard, and the total: int64 [shards + 1]."""
        return np.cumsum([0, *(shard.captions for shard in self.shards)])

    @property
    def views_hash(self) -> str:
        """Return a hash of all views: caches with equal hashes have the same views and the same unreadable images."""
        stored = [(shard.files["views"].sha256, shard.files["ok"].sha256) for shard in self.shards]
        return digest(self.manifest.items_per_shard, stored)

    @property
    def failed(self) -> int:
        """Return the number of images that could not be read."""
        return sum(shard.failed for shard in self.shards)

    def ok(self, item: int) -> bool:
        """Return whether an item's image could be read."""
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
        """Return the row of one of an item's captions, counted over the whole source."""
        shard, place = divmod(item, self.manifest.items_per_shard)
        return int(self._first_captions[shard] + self._array("offsets", shard)[place]) + caption

    def images(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return unit image embeddings: float32 [B, D]."""
        return as_float32(
            self._gathered("image", *self._place(_checked(rows, self.manifest.items * self.manifest.views)))
        )

    def image_norms(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the norms of the raw image embeddings: float32 [B]."""
        return self._gathered("image_norm", *self._place(_checked(rows, self.manifest.items * self.manifest.views)))

    def texts(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return unit text embeddings: float32 [B, D]."""
        return as_float32(self._gathered("text", *self._text_place(rows)))

    def text_norms(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the norms of the raw text embeddings: float32 [B]."""
        return self._gathered("text_norm", *self._text_place(rows))

    def _place(self, rows: Any) -> tuple[Any, Any]:
        return divmod(rows, self.manifest.items_per_shard * self.manifest.views)

    def _text_place(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        captions = _checked(rows, int(self._first_captions[-1]))
        shards = np.searchsorted(self._first_captions, captions, side="right") - 1
        return shards, self._gathered("captions", shards, captions - self._first_captions[shards])

    def _gathered(self, name: str, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Copy rows out of the shards, one by one: a random batch rarely has two rows in the same shard."""
        arrays = {shard: self._array(name, shard) for shard in np.unique(shards).tolist()}
        first = next(iter(arrays.values()), self._array(name, 0))
        out = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for at, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            out[at] = arrays[shard][row]
        return out

    def _array(self, name: str, shard: int) -> np.ndarray:
        key = (name, shard)
        if key not in self._maps:
            path = shard_folder(self.folder, shard) / f"{name}.npy"
            try:
                self._maps[key] = np.load(path, mmap_mode="r").view(np.ndarray)
            except (OSError, ValueError, EOFError, ArithmeticError, TypeError) as error:
                raise self._damaged(shard, f"unreadable {path.name} ({error})") from None
        return self._maps[key]

    def _damaged(self, shard: int, what: str) -> ArtifactError:
        home = shard_folder(self.folder, shard)
        return ArtifactError(
            f"{self.folder}: shard {home.name}: {what}. Remove {home} and run: clipress embed RECIPE "
            "(finished shards are kept)."
        )

    def _check(self, verify: bool) -> None:
        problems = {n: shard_problem(self.folder, n, self.manifest) for n in range(self.manifest.shards)}
        found = {number: problem for number, problem in problems.items() if problem}
        missing = [number for number, problem in found.items() if problem == MISSING]
        if missing:
            raise ArtifactError(
                f"{self.folder} is incomplete: {len(missing)} of {self.manifest.shards} shards are missing, "
                f"the first is {missing[0]:05}. Run: clipress embed RECIPE (finished shards are kept)."
            )
        for number, problem in found.items():
            raise self._damaged(number, problem)
        images, texts = self.manifest.items * self.manifest.views, sum(shard.texts for shard in self.shards)
        steps = [1 if verify else max(total // CHECKED_ROWS, 1) for total in (images, texts)]
        for number, shard in enumerate(self.shards):
            if verify:
                self._check_sums(number, shard)
            self._check_layout(number, shard)
            self._check_rows(number, shard, *steps)
            for name in ARRAYS:  # what was read of a mapped file counts as memory until it is closed
                self._maps.pop((name, number), None)

    def _check_sums(self, number: int, shard: Shard) -> None:
        for name, file in shard.files.items():
            found = sha256(shard_folder(self.folder, number) / f"{name}.npy")
            if found != file.sha256:
                raise self._damaged(
                    number, f"{name}.npy: expected a sha256 that starts with {file.sha256[:12]}, found {found[:12]}"
                )

    def _check_layout(self, number: int, shard: Shard) -> None:
        rows = shard.items * self.manifest.views
        for name, dtype, shape in (
            ("ok", np.bool_, (shard.items,)),
            ("states", np.int64, (shard.items, 2)),
            ("views", np.int32, (rows, 7)),
            ("image_norm", np.float32, (rows,)),
            ("text_norm", np.float32, (shard.texts,)),
            ("captions", np.int64, (shard.captions,)),
            ("offsets", np.int64, (shard.items + 1,)),
        ):
            array = self._array(name, number)
            if (array.dtype, array.shape) != (np.dtype(dtype), shape):
                found, expected = f"{array.dtype} {list(array.shape)}", f"{np.dtype(dtype)} {list(shape)}"
                raise self._damaged(number, f"{name}.npy: expected {expected}, found {found}")
        captions, offsets = self._array("captions", number), self._array("offsets", number)
        if len(captions) and not 0 <= captions.min() <= captions.max() < shard.texts:
            raise self._damaged(number, f"captions.npy: expected indices of {shard.texts} texts, found others")
        if offsets[0] != 0 or offsets[-1] != shard.captions or (np.diff(offsets) < 0).any():
            raise self._damaged(
                number, f"offsets.npy: expected ascending offsets of {shard.captions} captions, found others"
            )

    def _check_rows(self, number: int, shard: Shard, image_step: int, text_step: int) -> None:
        ok = np.repeat(self._array("ok", number), self.manifest.views)
        stored = {"fp16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}[self.manifest.dtype]
        for name, count, step, used in (
            ("image", shard.items * self.manifest.views, image_step, ok),
            ("text", shard.texts, text_step, np.ones(shard.texts, bool)),
        ):
            array = self._array(name, number)
            if array.shape != (count, self.manifest.dim) or array.dtype != stored:
                raise self._damaged(
                    number,
                    f"{name}.npy: expected {stored} {[count, self.manifest.dim]}, "
                    f"found {array.dtype} {list(array.shape)}",
                )
            norms = np.linalg.norm(as_float32(array[::step]), axis=1)
            off = ~(np.abs(norms - used[::step]) <= NORM_TOLERANCE)  # NaN compares false
            if off.any():
                row = int(np.flatnonzero(off)[0])
                raise self._damaged(
                    number,
                    f"{name}.npy: expected norm {used[row * step]:d} in row {row * step}, found {norms[row]:.4g}",
                )


def _checked(rows: Sequence[int] | np.ndarray, total: int) -> np.ndarray:
    rows = np.asarray(rows, np.int64)
    if len(rows) and not (0 <= rows.min() and rows.max() < total):
        raise IndexError(f"rows: expected 0 to {total - 1}, found {rows.min()} to {rows.max()}.")
    return rows


def read_manifest(folder: str | Path) -> Manifest:
    """Read a cache's manifest and check that it matches the folder's name."""
    folder = Path(folder).resolve()
    path = folder / MANIFEST
    again = f"Remove {folder} and run: clipress embed RECIPE"
    try:
        raw = read_json(path)
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path} has schema_version {version!r}; this version of clipress reads {SCHEMA_VERSION}. {again}"
            )
        manifest = Manifest.model_validate(raw)
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} is not a teacher cache: it has no {MANIFEST}. Run: clipress embed RECIPE"
        ) from None
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged: {first_problem(error)}. {again}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}). {again}") from None
    if manifest.shards > MAX_SHARDS:
        raise ArtifactError(f"{path}: expected at most {MAX_SHARDS:,} shards, found {manifest.shards:,}. {again}")
    if manifest.key != folder.name:
        raise ArtifactError(
            f"{path} describes cache {manifest.key}, but its folder is {folder.name}: one of them was changed. {again}"
        )
    return manifest
