"""Sources of image-text pairs, and the training batches made of them.

A source is anything with the five members of `Source`; one file under `formats/` reads one on-disk format, the
embedded sets are in `scenes.py` and `digits.py`. Which item is drawn when, and how it is augmented, depends only on
(seed, step), never on a worker or on what was drawn before: so a run can stop at any step and go on exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from clipress.data import digits, scenes
from clipress.data.teacher_cache import TeacherCache
from clipress.data.tokens import Tokenize
from clipress.data.transforms import Augment, Preprocess, augmented, normalised, viewed
from clipress.errors import DataError, nearest
from clipress.recipe import Section, digest


class Source(Protocol):
    """Image-text pairs. Items with the same `group` are right answers to one another."""

    name: str
    fingerprint: str

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image | np.ndarray: ...
    def captions(self, index: int) -> Sequence[str]: ...
    def group(self, index: int) -> int: ...


@dataclass(frozen=True)
class Classes:
    """What zero-shot classification needs: names and prompt templates with one `{}`."""

    names: tuple[str, ...]
    templates: tuple[str, ...]


class SourceSpec(Section):
    """One source in a recipe."""

    format: str
    """scenes, digits, csv, karpathy or folder."""
    split: Literal["train", "val", "test"] = "train"
    """Of an embedded set."""
    annotations: Path | None = None
    images: Path | None = None
    separator: str = "\t"
    """Of a csv file."""
    templates: tuple[str, ...] = ("a photo of a {}",)
    """Prompts of a class folder."""
    share: float = 1.0
    """This source's part of each training batch, relative to the others'."""
    name: str | None = None
    """Used in results; default: the format."""
    limit: int | None = None
    """Use only the first so many images."""


class DataSpec(Section):
    """The `data` section: sources to train on, to validate on while compressing and to test on in bench."""

    train: tuple[SourceSpec, ...]
    val: tuple[SourceSpec, ...] = ()
    test: tuple[SourceSpec, ...] = ()
    augment: Augment = Augment()
    workers: int = 0
    """Processes that decode; 0 decodes in the training process."""


@dataclass(frozen=True)
class Arrays:
    """A source held in memory, with pictures uint8 [N, S, S, 3]; classes are set for labelled pictures."""

    name: str
    fingerprint: str
    pictures: np.ndarray
    texts: tuple[tuple[str, ...], ...]
    groups: np.ndarray
    classes: Classes | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, index: int) -> np.ndarray:
        return self.pictures[index]

    def captions(self, index: int) -> Sequence[str]:
        return self.texts[index]

    def group(self, index: int) -> int:
        return int(self.groups[index])


def _scenes(spec: SourceSpec) -> Arrays:
    chosen = scenes.scenes(0)[spec.split]
    return _arrays(spec, scenes.pictures(spec.split, 0), tuple(map(scenes.captions, chosen)), np.arange(len(chosen)))


def _digits(spec: SourceSpec) -> Arrays:
    pictures, labels = digits.digits(spec.split)
    prompts = {label: tuple(t.format(name) for t in digits.TEMPLATES) for label, name in enumerate(digits.CLASSES)}
    texts = tuple(prompts[int(label)] for label in labels)
    return _arrays(spec, pictures, texts, labels, Classes(digits.CLASSES, digits.TEMPLATES))


def _arrays(spec: SourceSpec, pictures: np.ndarray, texts: tuple, groups: np.ndarray, classes: Any = None) -> Arrays:
    stop = spec.limit
    content = hashlib.sha256(pictures[:stop].tobytes() + repr(texts[:stop]).encode()).hexdigest()[:16]
    return Arrays(spec.name or spec.format, content, pictures[:stop], texts[:stop], groups[:stop], classes)


def _formats() -> dict[str, Any]:
    from clipress.data.formats import classfolder, csv, karpathy

    return {
        "scenes": _scenes,
        "digits": _digits,
        "csv": csv.read,
        "karpathy": karpathy.read,
        "folder": classfolder.read,
    }


@lru_cache(maxsize=16)
def open_source(spec: SourceSpec) -> Source:
    """Open a source; it is an error when it holds nothing."""
    formats = _formats()
    if spec.format not in formats:
        raise DataError(f"data: format '{spec.format}' is not known.{nearest(spec.format, formats)}")
    source = formats[spec.format](spec)
    if len(source) == 0:
        raise DataError(f"data: source '{source.name}' has no usable pairs.")
    return source


@dataclass(frozen=True)
class Draw:
    """One item of a batch: which source, which item, which pass over the source."""

    source: int
    index: int
    epoch: int


class Batches:
    """Yield batches of `Draw`s, step by step; batch t is a function of (seed, t) alone.

    Every source fills its share of each batch and walks through its own permutations. With several processes each
    takes every `world`-th item, so the global batch is the same for any number of processes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[float],
        batch: int,
        steps: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch % world:
            raise DataError(f"batch_size {batch} cannot be split evenly over {world} processes.")
        self.sizes, self.steps, self.seed, self.start = list(sizes), steps, seed, start
        self.rank, self.world = rank, world
        exact = np.asarray(shares, float) / sum(shares) * batch
        counts = np.floor(exact).astype(int)
        for source in np.argsort(counts - exact, kind="stable")[: batch - counts.sum()]:
            counts[source] += 1
        self.counts = counts.tolist()
        self._order = lru_cache(maxsize=2 * len(self.sizes))(self._permutation)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, source, epoch]).permutation(self.sizes[source])

    def at(self, step: int) -> list[Draw]:
        """Return the global batch of a step."""
        draws = []
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            for position in range(step * count, (step + 1) * count):
                epoch, place = divmod(position, size)
                draws.append(Draw(source, int(self._order(source, epoch)[place]), epoch))
        return draws

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.steps):
            yield self.at(step)[self.rank :: self.world]

    def __len__(self) -> int:
        return self.steps - self.start


class TrainingSet:
    """Turn lists of `Draw`s into arrays: pixels float32 [B,3,S,S], ids int64 [B,L], group int64 [B].

    With `caches`, one per teacher for each source, pictures are seen only as teachers have seen them, and for teacher t
    there are teacher_image_t and teacher_text_t, unit rows float32 [B,D], and their lengths teacher_image_norm_t and
    teacher_text_norm_t, float32 [B].
    """

    def __init__(
        self,
        sources: Sequence[Source],
        preprocess: Preprocess,
        tokenize: Tokenize,
        augment: Augment,
        seed: int,
        caches: Sequence[Sequence[TeacherCache]] = (),
    ) -> None:
        self.sources, self.preprocess, self.augment, self.seed = list(sources), preprocess, augment, seed
        self.caches = [list(row) for row in caches]
        self._tokenize = tokenize
        self._ids: dict[str, np.ndarray] = {}  # a caption is tokenised once
        if self.caches:
            _check_caches(self.sources, self.caches, preprocess, augment)

    def ids(self, texts: Sequence[str]) -> np.ndarray:
        """Tokenise texts: int64 [N, L]."""
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if new:
            known = self._tokenize(new).astype(np.int32)
            if len(self._ids) > 500_000:
                self._ids.clear()
            self._ids.update(zip(new, known, strict=True))
        return np.stack([self._ids[text] for text in texts]).astype(np.int64)

    def __getitems__(self, draws: list[Draw]) -> dict[str, np.ndarray]:
        pictures, texts, groups, rows = [], [], [], []
        for draw in draws:
            source = self.sources[draw.source]
            rng = np.random.default_rng([self.seed, draw.source, draw.epoch, draw.index])
            item, k = self._stored(draw, rng) if self.caches else (draw.index, 0)
            if self.caches:
                view = self.caches[draw.source][0].view(item, k)
                pictures.append(viewed(source.image(item), self.preprocess, view))
            else:
                pictures.append(augmented(source.image(item), self.preprocess, self.augment, rng))
            captions = source.captions(item)
            caption = int(rng.integers(len(captions)))
            texts.append(captions[caption])
            groups.append(draw.source << 40 | source.group(item))
            rows.append((draw.source, item, k, caption))
        arrays = {
            "pixels": normalised(np.stack(pictures), self.preprocess),
            "ids": self.ids(texts),
            "group": np.asarray(groups, np.int64),
        }
        return arrays | (self._taught(rows) if self.caches else {})

    def _stored(self, draw: Draw, rng: np.random.Generator) -> tuple[int, int]:
        """Draw a stored view of an item; for an item that could not be read another one stands in."""
        cache, item = self.caches[draw.source][0], draw.index
        while not cache.ok(item):
            item = int(rng.integers(len(cache)))
        return item, int(rng.integers(cache.manifest.views))

    def _taught(self, rows: Sequence[tuple[int, int, int, int]]) -> dict[str, np.ndarray]:
        """Look up what every teacher says about (source, item, view, caption)s."""
        sources, arrays = np.asarray([row[0] for row in rows]), {}
        for teacher, first in enumerate(self.caches[0]):
            image, text = (np.empty((len(rows), first.manifest.dim), np.float32) for _ in range(2))
            image_norm, text_norm = (np.empty(len(rows), np.float32) for _ in range(2))
            for source in np.unique(sources):
                cache, here = self.caches[source][teacher], np.flatnonzero(sources == source)
                images = [cache.image_row(rows[at][1], rows[at][2]) for at in here]
                texts = [cache.text_row(rows[at][1], rows[at][3]) for at in here]
                image[here], image_norm[here] = cache.images(images), cache.image_norms(images)
                text[here], text_norm[here] = cache.texts(texts), cache.text_norms(texts)
            arrays |= {
                f"teacher_image_{teacher}": image,
                f"teacher_text_{teacher}": text,
                f"teacher_image_norm_{teacher}": image_norm,
                f"teacher_text_norm_{teacher}": text_norm,
            }
        return arrays

    def __len__(self) -> int:
        return sum(map(len, self.sources))


def _check_caches(
    sources: Sequence[Source], caches: Sequence[Sequence[TeacherCache]], preprocess: Preprocess, augment: Augment
) -> None:
    """Refuse caches of other data, of views that are not what the recipe asks for, or of teachers that saw others."""
    if len(caches) != len(sources) or len({len(row) for row in caches}) != 1 or not caches[0]:
        raise DataError(
            f"Teacher embeddings: {len(sources)} sources need caches of the same teachers; "
            f"found {list(map(len, caches))}."
        )
    for source, row in zip(sources, caches, strict=True):
        for cache, leader in zip(row, caches[0], strict=True):
            known = cache.manifest
            for what, found, wanted in (
                ("content of the source", known.fingerprint, source.fingerprint),
                ("number of items", len(cache), len(source)),
                ("augmentation", known.augment, augment),
                ("teacher", known.teacher, leader.manifest.teacher),
                ("views", cache.views_hash, row[0].views_hash),
            ):
                if found != wanted:
                    raise DataError(
                        f"Teacher embeddings in {cache.folder} do not fit {source.name}: {what} {found}; "
                        f"{wanted} is asked for. Do: clipress embed RECIPE"
                    )
            if augment.shift and known.preprocess.size != preprocess.size:
                raise DataError(
                    f"Teacher embeddings in {cache.folder}: 'augment.shift' counts pixels, and the teacher's "
                    f"pictures are {known.preprocess.size} wide, the student's {preprocess.size}. "
                    "Use 'augment.crop_scale' instead."
                )
        if row[0].failed == len(source):
            raise DataError(f"Teacher embeddings in {row[0].folder}: no picture of {source.name} could be read.")


def fingerprint(specs: Sequence[SourceSpec]) -> str:
    """Return one hash of what the sources hold."""
    return digest([open_source(spec).fingerprint for spec in specs])
