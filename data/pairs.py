"""Sources of image-text pairs, and the training batches made of them.

A source is anything with the members of `Source`; one file under `formats/` reads one on-disk format, the
embedded sets are in `scenes.py` and `digits.py`. Which item is drawn when, and how it is augmented, depends only on
(seed, step), never on a worker or on what was drawn before: so a run can stop at any step and go on exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from PIL import Image
from pydantic import Field

from clipress.data import digits, scenes
from clipress.data.transforms import Augment, Library
from clipress.errors import DataError, nearest
from clipress.recipe import Section, digest


class Source(Protocol):
    """Image-text pairs. Items with the same `group` are right answers to one another.

    A source may hold one side only: without texts `captions` returns none, without images `image` raises DataError.
    A record that cannot be read raises DataError from `image` or `captions`; `broken.py` puts another in its place.
    """

    name: str
    fingerprint: str
    has_images: bool
    has_texts: bool

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image | np.ndarray: ...
    def captions(self, index: int) -> Sequence[str]: ...
    def group(self, index: int) -> int: ...


@dataclass(frozen=True)
class Classes:
    """What zero-shot classification needs: names and prompt templates with one `{}`."""

    names: tuple[str, ...]
    templates: tuple[str, ...]

    def prompts(self, label: int) -> tuple[str, ...]:
        """Return the prompts of one class."""
        return tuple(template.format(self.names[label]) for template in self.templates)


class SourceSpec(Section):
    """One source in a recipe."""

    format: str
    """Pairs: csv, karpathy, coco, webdataset. Labelled: folder. One-sided: images, captions. Embedded: scenes, digits."""
    split: Literal["train", "val", "test"] = "train"
    """Of an embedded set."""
    annotations: Path | None = None
    """The file that lists the records."""
    images: Path | None = None
    """The folder that paths in it start from; default: the file's own."""
    shards: str | None = None
    """Of a webdataset: tar files as `dir/{00000..00003}.tar`, several split by `::`, or a folder of them."""
    separator: str = Field("\t", min_length=1)
    """Of a csv file; a comma means that cells are quoted where needed, any other that nothing is."""
    image_key: str = "filepath"
    """Column of a csv file."""
    caption_key: str = "title"
    """Column of a csv file."""
    text_normaliser: Literal["none", "blip"] = "none"
    """blip: captions as BLIP and UPop see them, lower-case and without most punctuation."""
    classes: Path | None = None
    """Class list of labelled pictures: names or `WNID name`, one per line, or `imagenet` for open_clip's names."""
    templates: str | tuple[str, ...] = ("a photo of a {}",)
    """Prompts of labelled pictures, with `{}`, `{c}` or `{label}`; `openai` (80) and `simple` (7) are open_clip's."""
    check: bool = False
    """Look for every file when the source is opened, not only for the first 50,000."""
    share: float = Field(1.0, gt=0)
    """This source's part of each training batch, relative to the others'."""
    name: str | None = None
    """Used in results; default: the format."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many records."""
    seen: tuple[str, ...] = ()
    """Of a set with classes: names of those that training saw. Accuracy is then also told for seen and unseen ones."""


class DataSpec(Section):
    """The `data` section: sources to train on, to validate on while compressing and to test on in bench."""

    train: tuple[SourceSpec, ...]
    val: tuple[SourceSpec, ...] = ()
    test: tuple[SourceSpec, ...] = ()
    augment: Augment = Augment()
    workers: int = Field(0, ge=0, le=1 << 10)
    """Processes that decode; 0 decodes in the training process."""
    resize: Library = "pillow"
    """For training only: pillow gives open_clip's pixels, torch is nearly twice as fast and at most one level off."""


@dataclass(frozen=True)
class Arrays:
    """A source held in memory, with pictures uint8 [N, S, S, 3]; classes are set for labelled pictures."""

    name: str
    fingerprint: str
    pictures: np.ndarray
    texts: tuple[tuple[str, ...], ...]
    groups: np.ndarray
    classes: Classes | None = None
    has_images: ClassVar[bool] = True
    has_texts: ClassVar[bool] = True

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
    from clipress.data.formats import captions, classfolder, coco, csv, images, karpathy, webdataset

    return {
        "scenes": _scenes,
        "digits": _digits,
        "csv": csv.read,
        "karpathy": karpathy.read,
        "coco": coco.read,
        "webdataset": webdataset.read,
        "folder": classfolder.read,
        "images": images.read,
        "captions": captions.read,
    }


@lru_cache(maxsize=16)
def open_source(spec: SourceSpec) -> Source:
    """Open a source; it is an error when it holds nothing."""
    formats = _formats()
    if spec.format not in formats:
        raise DataError(f"data: format '{spec.format}' is not known.{nearest(spec.format, formats)}")
    source = formats[spec.format](spec)
    if len(source) == 0:
        raise DataError(f"data: source '{source.name}' has no usable records.")
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


def fingerprint(specs: Sequence[SourceSpec]) -> str:
    """Return one hash of what the sources hold."""
    return digest([open_source(spec).fingerprint for spec in specs])
