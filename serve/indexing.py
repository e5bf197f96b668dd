"""Embed images into an index, in parts, so that a killed run resumes where it stopped.

    <index>/.parts/<hash of the encoder>/00000-<stamp>.npz    embeddings of 4096 images; removed when the index is complete

The stamp is a hash of the images' names and states (size and time, or content, see data/file_states.py), so that a part is
reused only while its images are the same. Batches never cross parts: a resumed index holds the same numbers. The index keeps
the states, and images that it has are embedded again only if theirs have changed. Images that cannot be read are skipped,
counted, and named in <index>/skipped.tsv.
"""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from pathlib import Path

import numpy as np

from clipress.data.bad_records import FEW, SHOWN, refuse_too_many
from clipress.data.file_states import Check, State
from clipress.data.image_list import ImageList, open_images
from clipress.data.prefetch import map_ahead
from clipress.data.transforms import fitted, normalised
from clipress.errors import ArtifactError, DataError, import_extra
from clipress.metrics.retrieval import finite
from clipress.progress import Say, progress_bar
from clipress.recipe import digest
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.onnx_session import open_session
from clipress.serve.graphs import IMAGE, embedder
from clipress.serve.index import (
    DESCRIPTION,
    Description,
    Encoder,
    Index,
    Kind,
    change_index,
    check_encoder,
    kind_for,
    open_index,
    read_description,
    write_index,
)
from clipress.storage import LOCK, locked, write_bytes_whole, write_text_whole

log = logging.getLogger("clipress.serve")
PART, BATCH = 4096, 32
AHEAD = 3  # batches decoded while the encoder works
PARTS, SKIPPED = ".parts", "skipped.tsv"


class ImageEncoder:
    """The image encoder of an export folder, in ONNX Runtime. `threads` as in `LoadedModel`.

    Raises ExportError for an export whose images have no embeddings.
    """

    def __init__(self, exported: Exported, threads: int) -> None:
        self.exported, self.graph = exported, embedder(exported, IMAGE)
        self._session = open_session(exported.onnx(self.graph.name), threads)

    @property
    def description(self) -> Encoder:
        """The encoder's entries in an index."""
        known = self.exported
        file = known.files[self.graph.name]
        return Encoder(lineage=known.lineage_hash, stage=known.stage, precision=known.precision, sha256=file.sha256)

    def __call__(self, views: np.ndarray) -> np.ndarray:
        """Embed uint8 [B, S, S, 3]: unit rows float32 [B, D]."""
        inputs = {self.graph.inputs[0].name: normalised(views, self.exported.preprocess)}
        return finite(self._session.run([self.graph.outputs[0].name], inputs)[0], self.graph.name)


@dataclass(frozen=True)
class Part:
    """Embeddings of consecutive images."""

    embeds: np.ndarray
    """float32 [n, D]"""
    items: np.ndarray
    """int64 [n]: the images' numbers."""
    unread: dict[int, str]
    """Images that could not be read, by number, and the reason."""


def index_images(
    where: str,
    export: Path,
    out: Path,
    kind: Kind | None = None,
    threads: int = 0,
    add: bool = False,
    say: Say = print,
    check: Check = "stat",
) -> Description:
    """Embed images and write an index of them, or add them to an existing one.

    Args:
        where: a folder of images, or shards; see data/image_list.py.
        kind: default: exact up to a million images, then ivf.
        threads: threads of decoding, of ONNX Runtime and of faiss; 0 uses one per core.
        add: keep the entries of the index; images that it already has are embedded again only if they have changed.
        check: how a changed image is noticed; with `add` it is the index's own.

    Raises DataError if there are no images or more than a fifth cannot be read, ArtifactError if the index or the export is
    missing, damaged, or of another encoder, or if another process writes this index, and ExportError if the export has no
    image encoder.
    """
    faiss = import_extra("faiss")
    exported = read_export(export)
    if add:
        check_encoder(out, read_description(out), exported.lineage_hash)
    else:
        _check_free(out)
    if threads:
        faiss.omp_set_num_threads(threads)
    images = open_images(where)
    with locked(out):
        return _embed_and_write(images, ImageEncoder(exported, threads), out, kind, threads, add, check, say)


def _embed_and_write(
    images: ImageList,
    encoder: ImageEncoder,
    out: Path,
    kind: Kind | None,
    threads: int,
    add: bool,
    check: Check,
    say: Say,
) -> Description:
    """Do what `index_images` does, in a folder that is locked."""
    index = open_index(out) if add else None
    states = images.states(check if index is None else index.description.check)
    items, known = _to_embed(images, states, index)
    home = out / PARTS / digest(encoder.description.sha256, encoder.exported.preprocess.model_dump(), PART, BATCH)
    if changed := sum(images.name(item) in known for item in items):
        say(f"{images.where}: {changed:,} images changed since they were indexed, and are embedded again")
    paths = _embed_parts(images, items, states, encoder, home, threads, say)
    chosen, rows_of_parts, skipped = _choose(images, paths)
    if not chosen and len(items) == len(images):
        raise DataError(f"{images.where}: none of its {len(items)} images can be read (first: {skipped[0][1]}).")
    _report_skipped(out, skipped, len(images), say)
    if gone := {name for name, _ in skipped if name in known} - chosen.keys():
        say(f"{len(gone):,} images that can no longer be read leave the index")

    def blocks() -> Iterator[np.ndarray]:
        for path, rows in zip(paths, rows_of_parts, strict=True):
            if len(rows):
                yield _read(path).embeds[rows]

    names, states = list(chosen), states[list(chosen.values())]
    if index is None:
        made = write_index(out, kind or kind_for(len(names)), blocks, names, encoder.description, states, check)
    elif chosen or gone:
        made = change_index(index, gone, blocks(), names, states)
    else:
        made = index.description
    shutil.rmtree(out / PARTS, ignore_errors=True)
    return made


def _to_embed(images: ImageList, states: np.ndarray, index: Index | None) -> tuple[Sequence[int], dict[str, State]]:
    """Return the images that an index does not have as they are now, and the states of all that it has."""
    if index is None:
        return range(len(images)), {}
    known = {index.key(row): (size, mark) for row, (size, mark) in enumerate(index.states().tolist())}
    found: dict[str, State] = {}
    for item, (size, mark) in enumerate(states.tolist()):
        found.setdefault(images.name(item), (size, mark))  # of a name that occurs twice, the first one counts
    return [item for item in range(len(images)) if known.get(name := images.name(item)) != found[name]], known


def _check_free(out: Path) -> None:
    found = {path.name for path in out.iterdir()} - {LOCK} if out.is_dir() else set()
    if out.is_file() or (found and not found & {DESCRIPTION, PARTS}):
        raise ArtifactError(f"{out} exists and is not an index. Nothing was changed: choose another folder with --out.")


def _embed_parts(
    images: ImageList,
    items: Sequence[int],
    states: np.ndarray,
    encoder: ImageEncoder,
    home: Path,
    threads: int,
    say: Say,
) -> list[Path]:
    """Embed those of some images that are in no part yet; return the files of all parts in order."""
    ranges = [items[start : start + PART] for start in range(0, len(items), PART)]
    stamps = [digest([images.name(item) for item in part], states[part].tolist()) for part in ranges]
    paths = [home / f"{number:05}-{stamp}.npz" for number, stamp in enumerate(stamps)]
    missing, unread, done = [], [], len(images) - len(items)
    for number, path in enumerate(paths):
        if (part := _read(path)) is None:
            missing.append(number)
        else:
            unread += part.unread.values()
            done += len(ranges[number])
    say(f"{images.where}: {len(images):,} images, {done:,} of them already embedded")
    decoded = _decoded(images, encoder, chain.from_iterable(ranges[number] for number in missing), threads)
    with progress_bar(len(images), "index", "image", initial=done, smoothing=0.05) as bar:
        for number in missing:
            part = _embed(encoder, ranges[number], decoded, bar.update)
            _write(paths[number], part)
            done += len(ranges[number])
            unread += part.unread.values()
            if unread:
                refuse_too_many(images.where, len(unread), done, unread[0], least=FEW)
    return paths


def _decoded(
    images: ImageList, encoder: ImageEncoder, items: Iterable[int], threads: int
) -> Iterator[np.ndarray | str]:
    """Decode images in order, some ahead of the encoder: a view uint8 [S, S, 3] each, or why it cannot be read."""

    def decode(item: int) -> np.ndarray | str:
        try:
            return fitted(images.image(item), encoder.exported.preprocess)
        except DataError as error:
            return str(error)

    return map_ahead(decode, items, threads, AHEAD * BATCH)


def _embed(
    encoder: ImageEncoder, items: Sequence[int], decoded: Iterator[np.ndarray | str], advance: Callable[[int], object]
) -> Part:
    """Embed the next `items` of the decoded images, batch by batch."""
    embeds, kept, unread = [np.empty((0, encoder.exported.embed_dim), np.float32)], [], {}
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        views = dict(zip(batch, islice(decoded, len(batch)), strict=True))
        good = {item: view for item, view in views.items() if isinstance(view, np.ndarray)}
        embeds += [encoder(np.stack(list(good.values())))] if good else []
        kept += good
        unread |= {item: view for item, view in views.items() if isinstance(view, str)}
        advance(len(batch))
    return Part(np.concatenate(embeds), np.asarray(kept, np.int64), unread)


def _write(path: Path, part: Part) -> None:
    file = BytesIO()
    unread = np.frombuffer(json.dumps(part.unread).encode(), np.uint8)
    np.savez(file, embeds=part.embeds, items=part.items, unread=unread)
    write_bytes_whole(path, file.getvalue())


def _read(path: Path) -> Part | None:
    """Read a part; None if it is missing or damaged: a zip has checksums of its own."""
    try:
        with np.load(path) as arrays:
            unread = {int(item): reason for item, reason in json.loads(arrays["unread"].tobytes()).items()}
            return Part(arrays["embeds"], arrays["items"], unread)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _choose(images: ImageList, paths: list[Path]) -> tuple[dict[str, int], list[np.ndarray], list[tuple[str, str]]]:
    """Return the images to index by name, their rows in each part, and (name, reason) of every skipped image."""
    seen: dict[str, int] = {}
    rows, skipped = [], []
    for path in paths:
        part = _read(path)
        taken = []
        for row, item in enumerate(part.items.tolist()):
            name = images.name(item)
            if name in seen:
                skipped.append((name, f"{name} occurs twice; the first one is used."))
            else:
                seen[name] = item
                taken.append(row)
        rows.append(np.asarray(taken, np.int64))
        skipped += [(images.name(item), reason) for item, reason in part.unread.items()]
    return seen, rows, skipped


def _report_skipped(out: Path, skipped: list[tuple[str, str]], total: int, say: Say) -> None:
    """Name the skipped images: the first ones in the log, all of them in a file."""
    (out / SKIPPED).unlink(missing_ok=True)
    if not skipped:
        return
    for _, reason in skipped[:SHOWN]:
        log.warning("skipped: %s", reason)
    lines = ("\t".join(" ".join(cell.split()) for cell in pair) for pair in skipped)
    write_text_whole(out / SKIPPED, "\n".join(["key\treason", *lines]) + "\n")
    say(f"{len(skipped)} of {total:,} images are skipped; {out / SKIPPED} names them")
