"""An embedding index that finds the images nearest to a text, by inner product, with faiss.

    <folder>/index.json               its description, with sizes and SHA-256 of the files it names
            /index-<hash>.faiss       the vectors; mapped into memory when opened, not loaded
            /keys-<hash>.jsonl        one JSON string per line: line i is the key of row i of the vectors
            /states-<hash>.npy        int64 [N, 2]: what the files of the images were, see data/file_states.py

The files of an index are never changed: new ones are written beside them, and index.json is then replaced in one step.
So a kill at any moment leaves the old index or the new one, and processes that have the old one open can keep using it.
A process that changes an index locks its folder; a second one is refused.

Kinds: `flat` compares with everything and is exact. `ivf` (inverted lists around k-means centres) and `hnsw` (a graph,
Malkov & Yashunin 2016, arXiv:1603.09320) look at a part only, and may miss some of the nearest. A graph takes longest to
build, and is rebuilt when entries are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clipress.data.file_states import Check
from clipress.errors import ArtifactError, DataError, import_extra, nearest
from clipress.recipe import Section, read_typed
from clipress.serve.index_files import Blocks, write_filled
from clipress.storage import flush, locked, sha256, write_bytes_whole, write_text_whole
from clipress.version import __version__

SCHEMA_VERSION = 1
DESCRIPTION = "index.json"
EXACT_UP_TO = 1_000_000  # vectors; beyond that, comparing with everything takes more than a second
PER_LIST, TRAINED_ON = 39, 64  # vectors per inverted list, at least, and per list in the training of k-means
AGAIN = "Make it again: clipress index IMAGES --run RUN --out {}"
LINKS, BUILD_BREADTH, SEARCH_BREADTH = 32, 100, 128  # Parameters of the graph: links per vector, candidates kept.

Kind = Literal["flat", "ivf", "hnsw"]


class File(Section):
    """One of the files, and what it must contain."""

    file: str = Field(pattern=r"^[^/\\]+$")
    bytes: int
    sha256: str


class Encoder(Section):
    """The model that made the vectors."""

    lineage: str
    """Hash of the artifact's lineage. Vectors of another model cannot be compared with these."""
    stage: str
    precision: str
    sha256: str
    """SHA-256 of the image encoder's file."""


class Description(Section):
    """The contents of index.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Kind
    count: int = Field(ge=1)
    dim: int = Field(ge=1)
    encoder: Encoder
    vectors: File
    keys: File
    states: File | None = None
    """None in an index of a version that did not write them."""
    check: Check = "stat"
    """What the states compare."""
    made_with: dict[str, str]

    @property
    def files(self) -> tuple[File, ...]:
        """All files."""
        return tuple(file for file in (self.vectors, self.keys, self.states) if file is not None)


class Index:
    """An open index, returned by `open_index`. Several threads may search it at once."""

    def __init__(self, folder: Path, description: Description, vectors: Any) -> None:
        self.folder, self.description = folder, description
        self._vectors = vectors
        self._keys = np.memmap(folder / description.keys.file, np.uint8, "r")
        self._ends = np.flatnonzero(self._keys == ord("\n"))

    def __len__(self) -> int:
        return self.description.count

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.description.dim

    @property
    def lineage(self) -> str:
        """The encoder's hash; queries must come from the text encoder of the same model."""
        return self.description.encoder.lineage

    def key(self, row: int) -> str:
        """Return the key of a row."""
        start = int(self._ends[row - 1]) + 1 if row else 0
        return json.loads(self._keys[start : int(self._ends[row])].tobytes())

    def states(self) -> np.ndarray:
        """Return what the files of the images were, int64 [N, 2]; zeros if that is not known."""
        if (known := self.description.states) is None:
            return np.zeros((len(self), 2), np.int64)
        return np.load(self.folder / known.file)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, list[list[str]]]:
        """Return inner products float32 [N, k] and keys [N][k] of the entries nearest to queries [N, D], nearest first.

        An index with fewer than k entries returns all. Raises DataError for queries of another shape, or not finite.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise DataError(f"{self.folder}: expected queries [N, {self.dim}], found {list(queries.shape)}.")
        if k < 1 or not np.isfinite(queries).all():
            raise DataError(f"{self.folder}: expected finite queries and a k of 1 or more, found k = {k}.")
        scores, rows = self._nearest(queries, min(k, len(self)))
        return scores, [[self.key(row) for row in found] for found in rows.tolist()]

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        few, everything = None, self._vectors
        if self.description.kind == "hnsw":
            few = faiss.SearchParametersHNSW(efSearch=max(SEARCH_BREADTH, 2 * k))
            everything = faiss.downcast_index(self._vectors.storage)
        scores, rows = self._vectors.search(queries, k, params=few)
        short = (rows < 0).any(1)  # the part it looked at has fewer than k
        if short.any():
            ivf = self.description.kind == "ivf"
            all_lists = faiss.SearchParametersIVF(nprobe=self._vectors.nlist) if ivf else None
            scores[short], rows[short] = everything.search(queries[short], k, params=all_lists)
        return scores, rows


def open_index(folder: str | Path, lineage: str | None = None, verify: bool = True) -> Index:
    """Open an index; its vectors stay on disk and are mapped into memory.

    Args:
        lineage: hash of the encoder that queries come from; it must be the index's.
        verify: also compare checksums, which reads all files; sizes are always compared.

    Raises ArtifactError if the index is damaged or of another encoder, and BackendMissing without faiss.
    """
    faiss = import_extra("faiss")
    folder = Path(folder)
    description = read_description(folder)
    if damage := _find_damage(folder, description, verify):
        if read_description(folder) != description:  # The index was replaced in the meantime.
            return open_index(folder, lineage, verify)
        raise ArtifactError(f"{folder}: {damage}. {AGAIN.format(folder)}")
    check_encoder(folder, description, lineage)
    vectors = _read(folder / description.vectors.file, faiss.IO_FLAG_MMAP_IFC)
    index = Index(folder, description, vectors)
    if (vectors.ntotal, vectors.d, len(index._ends)) != (len(index), index.dim, len(index)):
        raise ArtifactError(
            f"{folder}: expected {len(index)} x {index.dim} vectors and as many keys, as {DESCRIPTION} says; found "
            f"{vectors.ntotal} x {vectors.d} and {len(index._ends)} keys. {AGAIN.format(folder)}"
        )
    return index


def read_description(folder: Path) -> Description:
    """Read an index's description. Raises ArtifactError."""
    path = folder / DESCRIPTION
    try:
        return read_typed(Description, path, "Make the index again.")
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} is not an index: it has no {DESCRIPTION}. Run: clipress index IMAGES --run RUN --out {folder}"
        ) from None


def check_encoder(folder: Path, description: Description, lineage: str | None) -> None:
    """Raise ArtifactError if vectors of this encoder cannot be compared with the index's."""
    if lineage is not None and lineage != description.encoder.lineage:
        raise ArtifactError(
            f"{folder}: expected the encoder {description.encoder.lineage} (stage {description.encoder.stage}), found "
            f"{lineage}. Embeddings of two encoders cannot be compared: use that one, or make the index again."
        )


def _find_damage(folder: Path, description: Description, verify: bool) -> str | None:
    for file in description.files:
        path = folder / file.file
        size = path.stat().st_size if path.is_file() else None
        if size != file.bytes:
            return f"{file.file} has {size} bytes; {DESCRIPTION} says {file.bytes}" if size else f"no {file.file} in it"
        if verify and (found := sha256(path)) != file.sha256:
            return f"{file.file} was changed: its sha256 starts with {found[:12]}, not {file.sha256[:12]}"
    return None


def _read(path: Path, flags: int) -> Any:
    faiss = import_extra("faiss")
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:  # faiss's own
        reason = str(error).strip().splitlines()[-1]
        raise ArtifactError(f"{path} cannot be opened by faiss {faiss.__version__}: {reason}.") from None


def kind_for(count: int) -> Kind:
    """Return the default kind for a number of vectors."""
    return "flat" if count <= EXACT_UP_TO else "ivf"


def write_index(
    folder: Path,
    kind: Kind,
    blocks: Blocks,
    keys: Sequence[str],
    encoder: Encoder,
    states: np.ndarray | None = None,
    check: Check = "stat",
) -> Description:
    """Make an index of vectors and replace the folder's index with it. Only a graph is held in memory meanwhile.

    Args:
        blocks: yields the vectors, float32 [n, D] each; it may be called more than once.
        keys: names of all vectors, in order.
        states: what the files of the images were, int64 [N, 2] by `check`; None if that is not known.

    The caller holds the folder's lock.
    """
    states = _known(states, len(keys))
    faiss = import_extra("faiss")
    dim = next(iter(blocks())).shape[1]
    if kind == "hnsw":
        vectors = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
        vectors.hnsw.efConstruction = BUILD_BREADTH
        for block in blocks():
            vectors.add(block)
        return _write(folder, kind, vectors, keys, encoder, states, check)
    if kind == "flat":
        vectors = faiss.IndexFlatIP(dim)
    else:
        lists = max(min(round(4 * len(keys) ** 0.5), len(keys) // PER_LIST), 1)
        vectors = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        vectors.nprobe = max(lists // 16, min(lists, 8))
        vectors.train(_sample(blocks(), len(keys), lists * TRAINED_ON, dim))
    return _write(folder, kind, vectors, keys, encoder, states, check, blocks)


def _known(states: np.ndarray | None, count: int) -> np.ndarray:
    return np.zeros((count, 2), np.int64) if states is None else states


def _sample(blocks: Iterable[np.ndarray], count: int, wanted: int, dim: int) -> np.ndarray:
    """Draw distinct rows, the same ones every time."""
    rows = np.sort(np.random.default_rng(0).choice(count, min(wanted, count), replace=False))
    sample, start = np.empty((len(rows), dim), np.float32), 0
    for block in blocks:
        first, last = np.searchsorted(rows, [start, start + len(block)])
        sample[first:last] = block[rows[first:last] - start]
        start += len(block)
    return sample


def change_index(
    index: Index,
    remove: Iterable[str] = (),
    blocks: Iterable[np.ndarray] = (),
    keys: Sequence[str] = (),
    states: np.ndarray | None = None,
) -> Description:
    """Remove entries from an open index, then add others. Its kind, and the centres of an `ivf`, do not change.

    A new entry replaces an old one of the same key; `states` as in `write_index`. All vectors are held in memory meanwhile.
    The caller holds the folder's lock. Raises DataError for keys to remove that the index does not have, and if nothing would be left.
    """
    folder, old = index.folder, [index.key(row) for row in range(len(index))]
    removed = set(remove)
    if missing := sorted(removed.difference(old)):
        raise DataError(f"{folder} has no entry '{missing[0]}'.{nearest(missing[0], old) if len(old) < 10_000 else ''}")
    removed.update(keys)
    kept = np.asarray([key not in removed for key in old], bool)
    if not kept.any() and not len(keys):
        raise DataError(f"{folder}: nothing would be left. To delete the index, remove the folder.")
    vectors = _read(folder / index.description.vectors.file, 0)
    if not kept.all():  # faiss removes nothing from a graph, and leaves holes in the numbering of lists
        _keep_rows(vectors, kept)
    for block in blocks:
        vectors.add(block)
    names = [key for key, one in zip(old, kept, strict=True) if one] + list(keys)
    states = np.concatenate([index.states()[kept], _known(states, len(keys))])
    known = index.description
    return _write(folder, known.kind, vectors, names, known.encoder, states, known.check)


def remove_entries(folder: Path, keys: Sequence[str]) -> Description:
    """Remove entries from an index. Raises what `change_index` does, and ArtifactError if another process writes this index."""
    read_description(folder)  # A folder without an index is not locked, which would write into it.
    with locked(folder):
        return change_index(open_index(folder), keys)


def _keep_rows(vectors: Any, kept: np.ndarray) -> None:
    import faiss

    lists = isinstance(vectors, faiss.IndexIVF)
    if lists:
        vectors.make_direct_map()
    rows = vectors.reconstruct_n(0, vectors.ntotal)[kept]
    if lists:
        vectors.set_direct_map_type(faiss.DirectMap.NoMap)
    vectors.reset()
    vectors.add(rows)


def _write(
    folder: Path,
    kind: Kind,
    vectors: Any,
    keys: Sequence[str],
    encoder: Encoder,
    states: np.ndarray,
    check: Check,
    blocks: Blocks | None = None,
) -> Description:
    """Write the files beside the old ones, replace index.json, then remove the files it no longer names.

    Without `blocks`, faiss's index `vectors` holds the vectors already.
    """
    faiss = import_extra("faiss")
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".vectors.{os.getpid()}.tmp"
    try:
        if blocks is None:
            faiss.write_index(vectors, str(aside))
        else:
            write_filled(aside, vectors, len(keys), blocks)
        flush(aside)
        found = sha256(aside)
        vectors_file = File(file=f"index-{found[:12]}.faiss", bytes=aside.stat().st_size, sha256=found)
        aside.replace(folder / vectors_file.file)
    except (OSError, RuntimeError) as error:  # the latter is faiss's
        raise ArtifactError(f"{folder} could not be written: {error}. The old index is kept.") from error
    finally:
        aside.unlink(missing_ok=True)
    lines, array = "".join(json.dumps(key) + "\n" for key in keys), BytesIO()
    np.save(array, np.ascontiguousarray(states, np.int64))
    description = Description(
        kind=kind,
        count=len(keys),
        dim=vectors.d,
        encoder=encoder,
        vectors=vectors_file,
        keys=_written(folder, "keys-{}.jsonl", lines.encode("ascii")),
        states=_written(folder, "states-{}.npy", array.getvalue()),
        check=check,
        made_with={"clipress": __version__, "faiss": faiss.__version__},
    )
    flush(folder)  # all files must be on disk before index.json names them
    write_text_whole(folder / DESCRIPTION, json.dumps(description.model_dump(), indent=1) + "\n")
    flush(folder)
    named = {file.file for file in description.files}
    for pattern in ("index-*.faiss", "keys-*.jsonl", "states-*.npy", ".*.tmp"):
        for path in folder.glob(pattern):
            if path.name not in named:
                path.unlink(missing_ok=True)
    return description


def _written(folder: Path, name: str, content: bytes) -> File:
    """Write a file under a name with its hash in it."""
    found = hashlib.sha256(content).hexdigest()
    file = File(file=name.format(found[:12]), bytes=len(content), sha256=found)
    write_bytes_whole(folder / file.file, content)
    return file
