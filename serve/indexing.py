"""Pictures -> an embedding index, in parts: a run that was killed goes on where it was.

    <index>/.parts/<hash of the encoder>/00000-<stamp>.npz    embeddings of 4096 pictures; gone when the index is there

The stamp follows from the pictures' names, sizes and times of change, so that a part is taken up only while its pictures
are the same. Batches never cross parts: an index that was resumed holds the same numbers. Pictures that cannot be read
are left out, counted, and named in <index>/skipped.tsv.
"""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from pathlib import Path

import numpy as np

from clipress.data.bad_records import FEW, SHOWN, refuse_too_many
from clipress.data.image_list import ImageList, open_images
from clipress.data.prefetch import map_ahead
from clipress.data.transforms import fitted, normalised
from clipress.errors import ArtifactError, DataError
from clipress.metrics.retrieval import finite
from clipress.progress import progress_bar
from clipress.recipe import digest
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.onnx_session import open_session
from clipress.serve.index import (
    DESCRIPTION,
    Description,
    Encoder,
    Kind,
    change_index,
    check_encoder,
    kind_for,
    need_faiss,
    read_description,
    write_index,
)
from clipress.storage import write_bytes_whole, write_text_whole

log = logging.getLogger("clipress.serve")
PART, BATCH = 4096, 32
AHEAD = 3  # batches that are decoded while the encoder works
PARTS, SKIPPED = ".parts", "skipped.tsv"

Say = Callable[[str], None]


class ImageTower:
    """The image tower of an export folder, in ONNX Runtime. `threads` as in `LoadedModel`."""

    def __init__(self, exported: Exported, threads: int) -> None:
        self.exported = exported
        self._session = open_session(exported.onnx("image"), threads)
        self._takes = self._session.get_inputs()[0].name

    @property
    def encoder(self) -> Encoder:
        """What an index keeps of it."""
        known = self.exported
        return Encoder(
            lineage=known.lineage_hash, stage=known.stage, precision=known.precision, sha256=known.files["image"].sha256
        )

    def __call__(self, views: np.ndarray) -> np.ndarray:
        """Embed uint8 [B, S, S, 3]: unit rows float32 [B, D]."""
        pixels = normalised(views, self.exported.preprocess)
        return finite(self._session.run(None, {self._takes: pixels})[0], "image")


@dataclass(frozen=True)
class Part:
    """Embeddings of some pictures in a row."""

    embeds: np.ndarray
    """float32 [n, D]"""
    items: np.ndarray
    """int64 [n]: which pictures they are."""
    unread: dict[int, str]
    """Pictures that could not be read, and why."""


def index_pictures(
    where: str, export: Path, out: Path, kind: Kind | None = None, threads: int = 0, add: bool = False, say: Say = print
) -> Description:
    """Embed pictures and write an index of them, or put them into the one that is there.

    Args:
        where: a folder of pictures, or shards; see `open_images`.
        kind: default: exact up to a million pictures, then ivf.
        threads: of decoding, of ONNX Runtime and of faiss; 0: one per core.
        add: keep what the index holds; pictures that it has already are embedded and replaced.

    Raises DataError when there is nothing to read or more than a fifth cannot be read, ArtifactError when the index or
    the export is missing, damaged, or of another encoder.
    """
    faiss = need_faiss()
    exported = read_export(export)
    if add:
        check_encoder(out, read_description(out), exported.lineage_hash)
    else:
        _check_free(out)
    if threads:
        faiss.omp_set_num_threads(threads)
    pictures = open_images(where)
    tower = ImageTower(exported, threads)
    home = out / PARTS / digest(tower.encoder.sha256, exported.preprocess.model_dump(), PART, BATCH)
    paths = _parts(pictures, tower, home, threads, say)
    names, chosen, skipped = _chosen(pictures, paths)
    if not names:
        raise DataError(f"{where}: none of its {len(pictures)} pictures can be read (first: {skipped[0][1]}).")
    _tell(out, skipped, len(pictures), say)

    def blocks() -> Iterator[np.ndarray]:
        for path, rows in zip(paths, chosen, strict=True):
            if len(rows):
                yield _read(path).embeds[rows]

    if add:
        made = change_index(out, (), blocks(), names)
    else:
        made = write_index(out, kind or kind_for(len(names)), blocks, names, tower.encoder)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    return made


def _check_free(out: Path) -> None:
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or (found and not found & {DESCRIPTION, PARTS}):
        raise ArtifactError(f"{out} was asked for; it is there and is no index. Nothing was changed: choose another.")


def _parts(pictures: ImageList, tower: ImageTower, home: Path, threads: int, say: Say) -> list[Path]:
    """Embed what is not embedded yet; returns the files of all parts in order."""
    ranges = [range(start, min(start + PART, len(pictures))) for start in range(0, len(pictures), PART)]
    paths = [home / f"{number:05}-{pictures.stamp(items)}.npz" for number, items in enumerate(ranges)]
    missing, unread, done = [], [], 0
    for number, path in enumerate(paths):
        if (part := _read(path)) is None:
            missing.append(number)
        else:
            unread += part.unread.values()
            done += len(ranges[number])
    say(f"{pictures.where}: {len(pictures):,} pictures, {done:,} of them embedded already")
    decoded = _decoded(pictures, tower, chain.from_iterable(ranges[number] for number in missing), threads)
    with progress_bar(len(pictures), "index", "image", initial=done, smoothing=0.05) as bar:
        for number in missing:
            part = _embed(tower, ranges[number], decoded, bar.update)
            _write(paths[number], part)
            done += len(ranges[number])
            unread += part.unread.values()
            if unread:
                refuse_too_many(pictures.where, len(unread), done, unread[0], least=FEW)
    return paths


def _decoded(pictures: ImageList, tower: ImageTower, items: Iterable[int], threads: int) -> Iterator[np.ndarray | str]:
    """Decode images in order, some ahead of the encoder: a view uint8 [S, S, 3] each, or why it cannot be read."""

    def decode(item: int) -> np.ndarray | str:
        try:
            return fitted(pictures.image(item), tower.exported.preprocess)
        except DataError as error:
            return str(error)

    return map_ahead(decode, items, threads, AHEAD * BATCH)


def _embed(
    tower: ImageTower, items: range, decoded: Iterator[np.ndarray | str], advance: Callable[[int], object]
) -> Part:
    """Embed the next `items` of the decoded images, batch by batch."""
    embeds, kept, unread = [np.empty((0, tower.exported.embed_dim), np.float32)], [], {}
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        views = dict(zip(batch, islice(decoded, len(batch)), strict=True))
        good = {item: view for item, view in views.items() if isinstance(view, np.ndarray)}
        embeds += [tower(np.stack(list(good.values())))] if good else []
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
    """Read a part; None when it is not there, or not whole: a zip has checksums of its own."""
    try:
        with np.load(path) as arrays:
            unread = {int(item): reason for item, reason in json.loads(arrays["unread"].tobytes()).items()}
            return Part(arrays["embeds"], arrays["items"], unread)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _chosen(pictures: ImageList, paths: list[Path]) -> tuple[list[str], list[np.ndarray], list[tuple[str, str]]]:
    """Return the names to index, the rows of each part they belong to, and (name, reason) of what is left out."""
    seen: dict[str, None] = {}
    rows, skipped = [], []
    for path in paths:
        part = _read(path)
        taken = []
        for row, item in enumerate(part.items.tolist()):
            name = pictures.name(item)
            if name in seen:
                skipped.append((name, f"{name} is there twice; the first one is taken."))
            else:
                seen[name] = None
                taken.append(row)
        rows.append(np.asarray(taken, np.int64))
        skipped += [(pictures.name(item), reason) for item, reason in part.unread.items()]
    return list(seen), rows, skipped


def _tell(out: Path, skipped: list[tuple[str, str]], total: int, say: Say) -> None:
    """Name what is left out: the first ones on the screen, all in a file."""
    (out / SKIPPED).unlink(missing_ok=True)
    if not skipped:
        return
    for _, reason in skipped[:SHOWN]:
        log.warning("left out: %s", reason)
    lines = ("\t".join(" ".join(cell.split()) for cell in pair) for pair in skipped)
    write_text_whole(out / SKIPPED, "\n".join(["key\treason", *lines]) + "\n")
    say(f"{len(skipped)} of {total:,} pictures are left out; they are named in {out / SKIPPED}")
