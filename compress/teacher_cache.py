"""Build teacher caches: embed the training data once with a teacher, for `data/teacher_cache.py` to read.

Images are decoded and texts tokenized ahead of the model, in a thread or in worker processes; another thread writes finished
shards, and the GPU is synchronized only once per shard. Batches never cross shards, so a build that was killed and resumed,
or split among processes, writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipress.compress.fabric import uses_bf16
from clipress.compress.loader import number_of_workers
from clipress.compress.plan import CompressPlan
from clipress.data.bad_records import refuse_too_many
from clipress.data.cache_files import (
    CacheSettings,
    Dtype,
    Manifest,
    Rows,
    row_from_view,
    unfinished_shards,
    write_manifest,
    write_shard,
)
from clipress.data.file_states import Check, image_states
from clipress.data.padding import without_padding
from clipress.data.prefetch import prefetched
from clipress.data.sources import Source, open_source, readable_captions
from clipress.data.teacher_cache import TeacherCache
from clipress.data.transforms import Augment, View, drawn_view, normalised, size_of, viewed
from clipress.errors import ArtifactError, DataError, RecipeError
from clipress.models.load import Model
from clipress.models.text_length import text_ends
from clipress.progress import Say, progress_bar
from clipress.storage import cache_folder, locked, sweep
from clipress.tasks import task_named
from clipress.version import __version__

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from clipress.compress.teachers import Teacher

HOME = "teacher-embeddings"
BATCH = 128
Precision = Literal["auto", "fp32", "bf16"]


def build_cache(
    model: Model,
    source: Source,
    augment: Augment,
    views: int,
    home: Path,
    *,
    teacher_hash: str,
    say: Say,
    dtype: Dtype = "fp16",
    precision: Precision = "auto",
    check: Check = "stat",
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    batch: int = BATCH,
    barrier: Callable[[], Any] = lambda: None,
    wait: Say | None = None,
) -> TeacherCache:
    """Embed a source with a teacher, unless the cache already exists, and open the cache.

    Shards of images that were replaced since are embedded again; `check` says how that is noticed. Each of `world` processes
    writes every world-th shard and then waits at `barrier`. `workers` processes decode images; 0 uses a thread of this
    process. The cache has its own folder under `home`. If another command is building the same cache, raises ArtifactError,
    or with `wait` passes a message to it and waits.
    """
    manifest = manifest_of(model, source, augment, views, teacher_hash, dtype, precision, check)
    folder = home / manifest.key
    shards = range(rank, manifest.shards, world)
    to_do, changed = unfinished_shards(folder, manifest, source, shards)
    if changed:
        checked = sum(len(manifest.items_of(shard)) for shard in shards)
        since = f"since teacher {teacher_hash} embedded them, the first is item {changed[0]}"
        say(f"{source.name}: {len(changed):,} of {checked:,} images changed {since}")
    elif not to_do:
        say(f"{source.name}: using the cached embeddings of teacher {teacher_hash} in {folder}")
    with locked(folder, wait) if rank == 0 and (to_do or world > 1) else nullcontext():  # others may have some to do
        if to_do:
            write_shards(model, source, manifest, home, say, to_do, rank, workers, batch)
        barrier()
    cache = TeacherCache.open(folder)
    if rank == 0:
        sweep(folder)  # all shards exist, so no other process writes into the folder
    return cache


def manifest_of(
    model: Model,
    source: Source,
    augment: Augment,
    views: int,
    teacher_hash: str,
    dtype: Dtype,
    precision: Precision,
    check: Check = "stat",
) -> Manifest:
    """Describe a cache before it is built; the folder name is derived from the description."""
    if not augment.is_view:
        raise RecipeError(
            "cache: expected an augmentation that a cache can repeat (shift, crop_scale, flip), found auto_augment, random_erase, "
            "mixup or cutmix. Leave them out, or leave out 'cache'."
        )
    if views > 1 and augment == Augment():
        raise RecipeError(
            f"cache: expected an augmentation for {views} views of {source.name}, found an empty 'data.augment', which makes "
            "all views identical. Set 'data.augment', or 'views: 1'."
        )
    device, task = next(model.module.parameters()).device, task_named(model.task)
    about, output = task.describe(model), task.graphs(model)[task.main_graph].outputs[0]
    return Manifest(
        teacher=teacher_hash,
        logit_scale=about.get("logit_scale"),
        logit_bias=about.get("logit_bias"),
        preprocess=model.preprocess,
        tokenizer=model.tokenizer,
        source=source.name,
        fingerprint=source.fingerprint,
        items=len(source),
        augment=augment,
        views=views if source.has_images else 0,
        dim=output.shape[0],
        dtype=dtype,
        precision="bf16" if uses_bf16(precision, device.type) else "fp32",
        check=check,
        made_with={
            "clipress": __version__,
            "torch": torch.__version__,
            "open_clip_torch": version("open_clip_torch"),
            "pillow": PIL.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    )


def write_shards(
    model: Model,
    source: Source,
    manifest: Manifest,
    home: Path,
    say: Say,
    shards: Iterable[int],
    rank: int = 0,
    workers: int = 0,
    batch: int = BATCH,
) -> Path:
    """Write those of some shards that are still unfinished. Returns the cache's folder."""
    folder = write_manifest(home, manifest)
    missing, _ = unfinished_shards(folder, manifest, source, shards)
    if not missing:
        return folder
    todo = sum(len(manifest.items_of(shard)) for shard in missing)
    say(f"{source.name}: embedding {todo:,} of {len(source):,} items, {manifest.views} view(s) each -> {folder}")
    failed: list[str] = []
    loads = DataLoader(
        _Loads(source, manifest, model),
        batch_size=None,
        sampler=_jobs(source, manifest, missing, batch),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        collate_fn=_unchanged,
        pin_memory=next(model.module.parameters()).device.type == "cuda",
    )
    shown = progress_bar(todo, f"embed {source.name}", "item", smoothing=0, disable=rank > 0)
    with ThreadPoolExecutor(1, "write") as writer, shown as bar:
        written: Future | None = None
        for shard, part in groupby(prefetched(loads), key=attrgetter("shard")):
            encoded = _encode(model, part, manifest.precision, bar.update)
            if written is not None:
                written.result()
            written = writer.submit(_finish, folder, shard, source, manifest, encoded, failed)
        written.result()
    if failed:
        say(f"{source.name}: {len(failed)} images could not be read and are skipped; the first: {failed[0]}")
    return folder


@dataclass(frozen=True)
class _Job:
    """A batch to load: all views of the images of some items, or some texts."""

    shard: int
    items: Sequence[int] = ()
    texts: Sequence[str] = ()


class _Load(NamedTuple):
    """A batch ready for the model; a NamedTuple, so that DataLoader can pin its memory."""

    shard: int
    pixels: Tensor | None = None
    ids: Tensor | None = None
    views: Tensor | None = None
    """int32 [B, 7]: rows of views.npy."""
    states: Tensor | None = None
    """int64 [B, 2]: rows of states.npy."""
    errors: Sequence[str] = ()
    """Per item, the reason it could not be read, or an empty string."""


@dataclass(frozen=True)
class _Encoded:
    """A shard's embeddings, still on the model's device."""

    image: list[Tensor]
    text: list[Tensor]
    views: list[Tensor]
    states: list[Tensor]
    errors: list[str]


def _jobs(source: Source, manifest: Manifest, shards: Iterable[int], batch: int) -> Iterator[_Job]:
    per_batch = max(batch // max(manifest.views, 1), 1)
    for shard in shards:
        items = manifest.items_of(shard)
        for start in range(0, len(items) if manifest.views else 0, per_batch):
            yield _Job(shard, items=items[start : start + per_batch])
        texts = list(_captions(source, manifest, items)[0])
        for start in range(0, len(texts), batch):
            yield _Job(shard, texts=texts[start : start + batch])


def _captions(
    source: Source, manifest: Manifest, items: Iterable[int]
) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """Return the distinct texts of some items with their rows, the row of every caption, and each item's first caption.

    A teacher that reads no texts has none.
    """
    rows: dict[str, int] = {}
    captions, offsets = [], [0]
    for item in items:
        texts = readable_captions(source, item) if manifest.tokenizer is not None else ()
        captions += [rows.setdefault(text, len(rows)) for text in texts]
        offsets.append(len(captions))
    return rows, np.asarray(captions, np.int64), np.asarray(offsets, np.int64)


class _Loads(Dataset):
    """A dataset that maps jobs to loads: decodes and augments images, or tokenizes texts."""

    def __init__(self, source: Source, manifest: Manifest, model: Model) -> None:
        self.source, self.manifest = source, manifest
        self.tokenize, self.ends = model.tokenize(), text_ends(model)

    def __getitem__(self, job: _Job) -> _Load:
        if job.texts:
            ids = without_padding(self.tokenize(job.texts).astype(np.int64), self.ends)
            return _Load(job.shard, ids=torch.from_numpy(ids))
        images, views, errors = [], [], []
        states = torch.from_numpy(image_states(self.source, job.items, self.manifest.check))  # before they are read
        for item in job.items:
            try:
                image = self.source.image(item)
            except DataError as error:
                errors.append(str(error))
                views += [View()] * self.manifest.views
                # Blank images keep the row numbering, and the other images of the batch unaffected.
                images += [np.zeros((self.manifest.preprocess.size,) * 2 + (3,), np.uint8)] * self.manifest.views
                continue
            errors.append("")
            for k in range(self.manifest.views):
                rng = np.random.default_rng([self.manifest.view_seed, item, k])
                views.append(drawn_view(size_of(image), self.manifest.augment, rng))
                images.append(viewed(image, self.manifest.preprocess, views[-1]))
        pixels = normalised(np.stack(images), self.manifest.preprocess)
        rows = np.asarray([row_from_view(view) for view in views], np.int32)
        return _Load(job.shard, torch.from_numpy(pixels), None, torch.from_numpy(rows), states, errors)


def _unchanged(load: _Load) -> _Load:
    return load


def _encode(model: Model, loads: Iterable[_Load], precision: str, advance: Callable[[int], Any]) -> _Encoded:
    """Run the model on a shard's batches; calls `advance` with the number of items in each."""
    model.module.eval()
    done = _Encoded([], [], [], [], [])
    for load in loads:
        if load.ids is not None:
            done.text.append(_raw(model, "ids", load.ids, precision))
            continue
        done.image.append(_raw(model, "pixels", load.pixels, precision))
        done.views.append(load.views)
        done.states.append(load.states)
        done.errors.extend(load.errors)
        advance(len(load.errors))
    return done


def _raw(model: Model, name: str, batch: Tensor, precision: str) -> Tensor:
    """Return a teacher's raw outputs for `pixels` or `ids`: float32 [B, D]."""
    device, task = next(model.module.parameters()).device, task_named(model.task)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return task.cached_rows(model.module, name, batch.to(device, non_blocking=True)).float()


def _finish(folder: Path, shard: int, source: Source, manifest: Manifest, encoded: _Encoded, failed: list[str]) -> None:
    """Copy a shard's embeddings to the CPU and write them; runs in the writer thread."""
    bad = [error for error in encoded.errors if error]
    if bad:
        refuse_too_many(source.name, len(bad), len(encoded.errors), bad[0])
    failed += bad
    _, captions, offsets = _captions(source, manifest, manifest.items_of(shard))
    ok = np.ones(len(offsets) - 1, bool)
    ok[: len(encoded.errors)] = [not error for error in encoded.errors]
    no_rows = {
        **dict.fromkeys(("image", "text"), torch.zeros(0, manifest.dim)),
        "views": torch.zeros(0, 7, dtype=torch.int32),
        "states": torch.zeros(0 if manifest.views else len(ok), 2, dtype=torch.int64),
    }
    image, text, views, states = (
        torch.cat([*(rows.cpu() for rows in getattr(encoded, name)), empty]).numpy() for name, empty in no_rows.items()
    )
    write_shard(folder, shard, manifest, Rows(image, text, captions, offsets, views, ok, states))


def check_cache(cache: TeacherCache, model: Model, source: Source, count: int = 32) -> None:
    """Embed a few views and captions again. Raises ArtifactError if the embeddings differ from the cached ones."""
    manifest = cache.manifest
    chosen = np.random.default_rng(0).choice(len(cache), min(count, len(cache)), replace=False).tolist()
    items = [item for item in chosen if cache.ok(item)]
    rows: list[tuple[str, Tensor, np.ndarray]] = []
    if source.has_images:
        images = [viewed(source.image(item), model.preprocess, cache.view(item, 0)) for item in items]
        pixels = torch.from_numpy(normalised(np.stack(images), model.preprocess))
        rows.append(("pixels", pixels, cache.images([cache.image_row(item) for item in items])))
    if source.has_texts and model.tokenizer is not None:
        first = {item: texts[0] for item in items if (texts := readable_captions(source, item))}
        ids = without_padding(model.tokenize()(list(first.values())), text_ends(model))
        rows.append(("ids", torch.from_numpy(ids), cache.texts([cache.text_row(item) for item in first])))
    model.module.eval()
    for name, batch, kept in rows:
        found = _raw(model, name, batch, manifest.precision).cpu().numpy()
        cosines = (found * kept).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(kept, axis=1))
        if not cosines.min() > 0.999:
            worst = items[int(cosines.argmin())]
            raise ArtifactError(
                f"{cache.folder}: expected cosine 1 between the teacher's output for the {name} of item {worst} and the cached one, "
                f"found {cosines.min():.4f}: {source.name} or the teacher changed. Remove the folder and run: clipress embed RECIPE"
            )


def caches_of(
    teacher: Teacher,
    settings: CacheSettings,
    plan: CompressPlan,
    fabric: Fabric,
    say: Say,
    home: Path | None = None,
    wait: Say | None = None,
) -> list[TeacherCache]:
    """Open the caches of a recipe's training sources, and build the missing ones. `wait` as in `build_cache`."""
    teacher.model.module.to(fabric.device)
    batch_bytes = BATCH * teacher.model.preprocess.size**2 * 3 * 8  # float32, and twice the batches in advance
    workers = number_of_workers(plan.data.workers, fabric.device, batch_bytes)
    caches = []
    for source in map(open_source, plan.data.train):
        cache = build_cache(
            teacher.model,
            source,
            plan.data.augment,
            settings.views,
            home or cache_folder() / HOME,
            teacher_hash=teacher.hash,
            say=say,
            dtype=settings.dtype,
            precision=plan.runtime.precision,
            check=settings.check,
            rank=fabric.global_rank,
            world=fabric.world_size,
            workers=workers,
            barrier=fabric.barrier,
            wait=wait,
        )
        check_cache(cache, teacher.model, source, 8)  # neither names nor sizes and times cover the bytes of images
        caches.append(cache)
    return caches
