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
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from clipress.data.bad_records import NAMED
from clipress.data.formats.files import MAX_SKIPPED
from clipress.data.image_list import Pictures, open_pictures
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
FEW = 20  # so many may be unreadable whatever their share, as in training
PARTS, SKIPPED = ".parts", "skipped.tsv"

Say = Callable[[str], None]


class ImageTower:
    """The image tower of an export folder, in ONNX Runtime. `threads` as in `Classifier`."""

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
        where: a folder of pictures, or shards; see `open_pictures`.
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
    pictures = open_pictures(where)
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


def _parts(pictures: Pictures, tower: ImageTower, home: Path, threads: int, say: Say) -> list[Path]:
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
    batches = [
        (number, items[start : start + BATCH])
        for number, items in ((number, ranges[number]) for number in missing)
        for start in range(0, len(items), BATCH)
    ]
    with progress_bar(len(pictures), "index", "picture", initial=done, smoothing=0.05) as bar:
        for number, group in groupby(_decoded(pictures, tower, batches, threads), key=itemgetter(0)):
            embeds, items, failed = [], [], {}
            for _, wanted, views in group:
                whole = [view for view in views if isinstance(view, np.ndarray)]
                embeds += [tower(np.stack(whole))] if whole else []
                items += [item for item, view in zip(wanted, views, strict=True) if isinstance(view, np.ndarray)]
                failed |= {item: view for item, view in zip(wanted, views, strict=True) if isinstance(view, str)}
                bar.update(len(views))
            empty = np.empty((0, tower.exported.embed_dim), np.float32)
            _write(paths[number], Part(np.concatenate([empty, *embeds]), np.asarray(items, np.int64), failed))
            done += len(ranges[number])
            unread += failed.values()
            if len(unread) > max(FEW, MAX_SKIPPED * done):
                raise DataError(
                    f"{pictures.where}: {len(unread)} of {done} pictures looked at cannot be read (first: {unread[0]}). "
                    f"At most {MAX_SKIPPED:.0%} are left out; are the pictures still there?"
                )
    return paths


def _decoded(
    pictures: Pictures, tower: ImageTower, batches: list[tuple[int, range]], threads: int
) -> Iterator[tuple[int, range, list[np.ndarray | str]]]:
    """Decode batches in order, some ahead: views uint8 [S, S, 3], or why there is none."""

    def look(item: int) -> np.ndarray | str:
        try:
            return fitted(pictures.image(item), tower.exported.preprocess)
        except DataError as error:
            return str(error)

    waiting: deque[tuple[int, range, list[Future]]] = deque()
    with ThreadPoolExecutor(threads or None, "decode") as pool:
        for number, items in batches:
            waiting.append((number, items, [pool.submit(look, item) for item in items]))
            if len(waiting) > AHEAD:
                number, items, views = waiting.popleft()
                yield number, items, [view.result() for view in views]
        for number, items, views in waiting:
            yield number, items, [view.result() for view in views]


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


def _chosen(pictures: Pictures, paths: list[Path]) -> tuple[list[str], list[np.ndarray], list[tuple[str, str]]]:
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
    for _, reason in skipped[:NAMED]:
        log.warning("left out: %s", reason)
    lines = ("\t".join(" ".join(cell.split()) for cell in pair) for pair in skipped)
    write_text_whole(out / SKIPPED, "\n".join(["key\treason", *lines]) + "\n")
    say(f"{len(skipped)} of {total:,} pictures are left out; they are named in {out / SKIPPED}")
