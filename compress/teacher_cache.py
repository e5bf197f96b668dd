"""Run a teacher over its training data once, and keep what it says: the caches that `data/teacher_cache.py` reads.

Pictures are decoded and texts tokenised ahead of the model, by a thread or by processes; finished shards are written by
a thread behind it, and nothing waits for a GPU before a shard is full. Batches never cross shards, so a build that was
killed and taken up again, or shared among processes, leaves the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clipress import __version__
from clipress.compress.fabric import start_fabric, uses_bf16
from clipress.data.formats.files import MAX_SKIPPED
from clipress.data.sources import Source, open_source
from clipress.data.teacher_cache import (
    CacheSettings,
    Dtype,
    Manifest,
    Rows,
    TeacherCache,
    finished_shards,
    row_from_view,
    write_manifest,
    write_shard,
)
from clipress.data.tokens import Tokenize
from clipress.data.transforms import Augment, View, drawn_view, normalised, size_of, viewed
from clipress.errors import ArtifactError, DataError, RecipeError
from clipress.models.load import Model, TeacherSpec
from clipress.progress import progress_bar
from clipress.storage import cache_folder, locked, sweep

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from clipress.compress.plan import Plan
    from clipress.compress.teachers import Teacher

HOME = "teacher-embeddings"
Say = Callable[[str], None]
Precision = Literal["auto", "fp32", "bf16"]
T = TypeVar("T")


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
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    batch: int = 128,
    barrier: Callable[[], Any] = lambda: None,
    wait: Say | None = None,
) -> TeacherCache:
    """Embed a source with a teacher, unless that has been done, and open the result.

    Of `world` processes each writes every world-th shard, and all meet at `barrier`. `workers` processes decode; with 0
    a thread of this one does. The cache lies in a folder of its own under `home`. When others are making the same one,
    ArtifactError is raised, or `wait` is told and they are waited for.
    """
    manifest = manifest_of(model, source, augment, views, teacher_hash, dtype, precision)
    folder = home / manifest.key
    to_do = len(finished_shards(folder, manifest)) < manifest.shards
    with locked(folder, wait) if to_do and rank == 0 else nullcontext():
        write_shards(model, source, manifest, home, say, rank, world, workers, batch)
        barrier()
    cache = TeacherCache.open(folder)
    if rank == 0:
        sweep(folder)  # what killed builds left; all shards are there, so nobody writes now
    return cache


def manifest_of(
    model: Model, source: Source, augment: Augment, views: int, teacher_hash: str, dtype: Dtype, precision: Precision
) -> Manifest:
    """Describe a cache before it is made; the description decides where it lies."""
    if views > 1 and augment == Augment():
        raise RecipeError(
            f"cache: {views} views of {source.name} were asked for, and 'data.augment' is empty: "
            "they would all be the same. Ask for one view, or augment."
        )
    device, module = next(model.module.parameters()).device, model.module
    bias = getattr(module, "logit_bias", None)
    return Manifest(
        teacher=teacher_hash,
        logit_scale=float(module.logit_scale.detach().double().exp()),
        logit_bias=None if bias is None else float(bias),
        preprocess=model.preprocess,
        tokenizer=model.tokenizer,
        source=source.name,
        fingerprint=source.fingerprint,
        items=len(source),
        augment=augment,
        views=views if source.has_images else 0,
        dim=model.architecture["embed_dim"],
        dtype=dtype,
        precision="bf16" if uses_bf16(precision, device.type) else "fp32",
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
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    batch: int = 128,
) -> Path:
    """Write those of this process's shards that are not there yet; returns the cache's folder."""
    folder = write_manifest(home, manifest)
    mine = range(rank, manifest.shards, world)
    missing = sorted(set(mine) - finished_shards(folder, manifest))
    if not missing:
        say(f"{source.name}: embeddings by teacher {manifest.teacher} are there already ({folder})")
        return folder
    todo = sum(len(manifest.items_of(shard)) for shard in missing)
    say(f"{source.name}: embedding {todo:,} of {len(source):,} pictures, {manifest.views} view(s) each -> {folder}")
    failed: list[str] = []
    loads = DataLoader(
        _Loads(source, manifest, model.tokenize()),
        batch_size=None,
        sampler=_jobs(source, manifest, missing, batch),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        collate_fn=_as_it_is,
        pin_memory=next(model.module.parameters()).device.type == "cuda",
    )
    shown = progress_bar(todo, f"embed {source.name}", "picture", smoothing=0, disable=rank > 0)
    with ThreadPoolExecutor(1, "write") as writer, shown as bar:
        written: Future | None = None
        for shard, part in groupby(_ahead(loads), key=attrgetter("shard")):
            encoded = _encoded(model, part, manifest.precision, bar)
            if written is not None:
                written.result()
            written = writer.submit(_finish, folder, shard, source, manifest, encoded, failed)
        written.result()
    if failed:
        say(f"{source.name}: {len(failed)} pictures could not be read and will be left out; the first: {failed[0]}")
    return folder


@dataclass(frozen=True)
class _Job:
    """One batch to be: pictures of some items, all their views, or texts."""

    shard: int
    items: Sequence[int] = ()
    texts: Sequence[str] = ()


class _Load(NamedTuple):
    """One batch, ready for the model; a NamedTuple, since DataLoader can pin the memory of that."""

    shard: int
    pixels: Tensor | None = None
    ids: Tensor | None = None
    views: Tensor | None = None
    """int32 [B, 7]: rows of views.npy."""
    errors: Sequence[str] = ()
    """Per item: why it could not be read, or nothing."""


@dataclass(frozen=True)
class _Encoded:
    """A shard's embeddings, still where the model is."""

    image: list[Tensor]
    text: list[Tensor]
    views: list[Tensor]
    errors: list[str]


def _jobs(source: Source, manifest: Manifest, shards: Iterable[int], batch: int) -> Iterator[_Job]:
    several = max(batch // max(manifest.views, 1), 1)
    for shard in shards:
        items = manifest.items_of(shard)
        for start in range(0, len(items) if manifest.views else 0, several):
            yield _Job(shard, items=items[start : start + several])
        texts = list(_captions(source, items)[0])
        for start in range(0, len(texts), batch):
            yield _Job(shard, texts=texts[start : start + batch])


def _captions(source: Source, items: Iterable[int]) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """Return the different texts of some items with their places, the place of every caption, and where items begin."""
    places: dict[str, int] = {}
    captions, offsets = [], [0]
    for item in items:
        captions += [places.setdefault(text, len(places)) for text in source.captions(item)]
        offsets.append(len(captions))
    return places, np.asarray(captions, np.int64), np.asarray(offsets, np.int64)


class _Loads(Dataset):
    """Decodes, augments and tokenises: what a job asks for."""

    def __init__(self, source: Source, manifest: Manifest, tokenize: Tokenize) -> None:
        self.source, self.manifest, self.tokenize = source, manifest, tokenize

    def __getitem__(self, job: _Job) -> _Load:
        if job.texts:
            return _Load(job.shard, ids=torch.from_numpy(self.tokenize(job.texts).astype(np.int64)))
        pictures, views, errors = [], [], []
        for item in job.items:
            try:
                image = self.source.image(item)
            except DataError as error:
                errors.append(str(error))
                views += [View()] * self.manifest.views
                # blank pictures keep the rows, and keep the other rows' batch as it is
                pictures += [np.zeros((self.manifest.preprocess.size,) * 2 + (3,), np.uint8)] * self.manifest.views
                continue
            errors.append("")
            for k in range(self.manifest.views):
                rng = np.random.default_rng([self.manifest.view_seed, item, k])
                views.append(drawn_view(size_of(image), self.manifest.augment, rng))
                pictures.append(viewed(image, self.manifest.preprocess, views[-1]))
        pixels = normalised(np.stack(pictures), self.manifest.preprocess)
        rows = np.asarray([row_from_view(view) for view in views], np.int32)
        return _Load(job.shard, pixels=torch.from_numpy(pixels), views=torch.from_numpy(rows), errors=errors)


def _as_it_is(load: _Load) -> _Load:
    return load


def _ahead(batches: Iterable[T], depth: int = 4) -> Iterator[T]:
    """Yield batches in order while a thread fetches the next ones."""
    iterator = iter(batches)
    with ThreadPoolExecutor(1, "ahead") as thread:
        waiting = deque(thread.submit(next, iterator, None) for _ in range(depth))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, iterator, None))
            yield batch


def _encoded(model: Model, loads: Iterable[_Load], precision: str, bar: tqdm) -> _Encoded:
    """Run the model over a shard's batches."""
    model.module.eval()
    done = _Encoded([], [], [], [])
    for load in loads:
        if load.ids is not None:
            done.text.append(_raw(model, "text", load.ids, precision))
            continue
        done.image.append(_raw(model, "image", load.pixels, precision))
        done.views.append(load.views)
        done.errors.extend(load.errors)
        bar.update(len(load.errors))
    return done


def _raw(model: Model, tower: Literal["image", "text"], batch: Tensor, precision: str) -> Tensor:
    """Return embeddings as the model gives them, not normalised: float32 [B, D]."""
    device = next(model.module.parameters()).device
    encode = model.module.encode_image if tower == "image" else model.module.encode_text
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return encode(batch.to(device, non_blocking=True), normalize=False).float()


def _finish(folder: Path, shard: int, source: Source, manifest: Manifest, encoded: _Encoded, failed: list[str]) -> None:
    """Bring a shard's embeddings home and write them; runs in a thread."""
    broken = [error for error in encoded.errors if error]
    if len(broken) > MAX_SKIPPED * max(len(encoded.errors), 1):
        raise DataError(
            f"{source.name}: {len(broken)} of {len(encoded.errors)} pictures in a row cannot be read "
            f"(first: {broken[0]}). At most {MAX_SKIPPED:.0%} are left out; are the pictures still there?"
        )
    failed += broken
    _, captions, offsets = _captions(source, manifest.items_of(shard))
    ok = np.ones(len(offsets) - 1, bool)
    ok[: len(encoded.errors)] = [not error for error in encoded.errors]
    nothing = {
        "image": torch.zeros(0, manifest.dim),
        "text": torch.zeros(0, manifest.dim),
        "views": torch.zeros(0, 7, dtype=torch.int32),
    }
    image, text, views = (torch.cat([*getattr(encoded, name), empty]).cpu().numpy() for name, empty in nothing.items())
    write_shard(folder, shard, manifest, Rows(image, text, captions, offsets, views, ok))


def check_cache(cache: TeacherCache, model: Model, source: Source, count: int = 32) -> None:
    """Embed a few stored views and captions again; ArtifactError when the teacher or the pictures have changed."""
    manifest = cache.manifest
    chosen = np.random.default_rng(0).choice(len(cache), min(count, len(cache)), replace=False).tolist()
    items = [item for item in chosen if cache.ok(item)]
    sides: list[tuple[Literal["image", "text"], Tensor, np.ndarray]] = []
    if source.has_images:
        pictures = [viewed(source.image(item), model.preprocess, cache.view(item, 0)) for item in items]
        pixels = torch.from_numpy(normalised(np.stack(pictures), model.preprocess))
        sides.append(("image", pixels, cache.images([cache.image_row(item) for item in items])))
    if source.has_texts:
        ids = torch.from_numpy(model.tokenize()([source.captions(item)[0] for item in items]))
        sides.append(("text", ids, cache.texts([cache.text_row(item) for item in items])))
    model.module.eval()
    for tower, batch, kept in sides:
        found = _raw(model, tower, batch, manifest.precision).cpu().numpy()
        cosines = (found * kept).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(kept, axis=1))
        if not cosines.min() > 0.999:
            worst = items[int(cosines.argmin())]
            raise ArtifactError(
                f"{cache.folder}: the {tower} embedding of item {worst} has cosine {cosines.min():.4f} with "
                f"what the teacher says now. The pictures of {source.name} or the teacher have changed. "
                "Remove the folder and do: clipress embed RECIPE"
            )


def embed_recipe(
    plan: Plan, home: Path | None, views: int | None, dtype: Dtype | None, artifacts: Sequence[Path], say: Say
) -> list[Path]:
    """Embed a recipe's training sources with its teachers, or with the given artefacts; returns the caches' folders."""
    from clipress.compress.pipeline import load_teacher  # which itself builds caches

    specs = [TeacherSpec(artifact=path) for path in artifacts] or plan.teachers
    if not specs:
        raise RecipeError("The recipe names no 'teacher' to embed with. Name an artefact with --teacher.")
    asked = next((spec.cache for spec in plan.teachers if spec.cache), CacheSettings())
    fabric = start_fabric(plan.runtime)
    say = say if fabric.is_global_zero else (lambda _: None)
    folders = []
    for spec in specs:
        settings = spec.cache or asked
        given = CacheSettings(views=views or settings.views, dtype=dtype or settings.dtype)
        caches = caches_of(load_teacher(spec, plan.recipe.task, say), given, plan, fabric, say, home)
        folders += [cache.folder for cache in caches]
    return folders


def caches_of(
    teacher: Teacher,
    settings: CacheSettings,
    plan: Plan,
    fabric: Fabric,
    say: Say,
    home: Path | None = None,
    wait: Say | None = None,
) -> list[TeacherCache]:
    """Open the cache of every training source of a recipe, after building those that are not there yet.

    With `wait`, another process that builds the same one is waited for; else that is an error.
    """
    teacher.model.module.to(fabric.device)
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
            rank=fabric.global_rank,
            world=fabric.world_size,
            workers=plan.data.workers,
            barrier=fabric.barrier,
            wait=wait,
        )
        check_cache(cache, teacher.model, source, 8)  # a source's fingerprint does not cover the bytes of its pictures
        caches.append(cache)
    return caches
