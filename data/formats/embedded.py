"""The embedded sets, *scenes*, *statements* and *questions* about them, and *digits*, as sources held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from clipress.data import digits, scene_texts, scenes
from clipress.data.formats.vqa import weights_of
from clipress.data.sources import FORMATS, Classes
from clipress.data.spec import SourceSpec


@dataclass(frozen=True)
class Arrays:
    """A source held in memory, with images uint8 [N, S, S, 3]; labelled images have classes."""

    name: str
    fingerprint: str
    images: np.ndarray
    texts: tuple[tuple[str, ...], ...]
    groups: np.ndarray
    classes: Classes | None = None
    masks: np.ndarray | None = None
    """uint8 [N, S, S], the label of every pixel."""
    others: np.ndarray | None = None
    """uint8 [N, S, S, 3], the second images of pairs, with `labels`."""
    labels: np.ndarray | None = None
    """int64 [N], whether a statement is true."""
    said: tuple[tuple[str, ...], ...] | None = None
    """The answers to every question, with `candidates`."""
    candidates: tuple[str, ...] | None = None
    has_texts: bool = True
    has_images: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        return self.images[index]

    def captions(self, index: int) -> Sequence[str]:
        return self.texts[index]

    def group(self, index: int) -> int:
        return int(self.groups[index])

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def mask(self, index: int) -> np.ndarray:
        return self.masks[index]

    @property
    def has_pairs(self) -> bool:
        return self.others is not None

    def other_image(self, index: int) -> np.ndarray:
        return self.others[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])

    @property
    def has_answers(self) -> bool:
        return self.said is not None

    def answers(self, index: int) -> Sequence[str]:
        return self.said[index]

    def answer_weights(self, index: int) -> dict[str, float]:
        return weights_of(self.said[index])


@FORMATS.register("scenes")
def read_scenes(spec: SourceSpec) -> Arrays:
    """Return a split of *scenes*: five captions per image, all of them unique."""
    chosen = scenes.scenes(0)[spec.split]
    return _limited(spec, scenes.images(spec.split, 0), tuple(map(scenes.captions, chosen)), np.arange(len(chosen)))


@FORMATS.register("shapes")
def read_shapes(spec: SourceSpec) -> Arrays:
    """Return a split of *scenes* with the shape at every pixel instead of captions, in five classes."""
    labels = scenes.masks(spec.split, 0)
    classes = Classes(scenes.MASK_CLASSES, ("a photo of a {}",))
    texts, groups = ((),) * len(labels), np.arange(len(labels))
    return replace(
        _limited(spec, scenes.images(spec.split, 0), texts, groups, classes),
        masks=labels[: spec.limit],
        has_texts=False,
    )


@FORMATS.register("statements")
def read_statements(spec: SourceSpec) -> Arrays:
    """Return a split of statements about two images of *scenes*; half of them are true."""
    said, images = scene_texts.statements(spec.split)[: spec.limit], scenes.images(spec.split, 0)
    left, right, labels = (np.asarray([getattr(one, name) for one in said]) for name in ("left", "right", "is_true"))
    source = _limited(spec, images[left], tuple((one.text,) for one in said), np.arange(len(said)))
    return _with(source, others=images[right], labels=labels.astype(np.int64))


@FORMATS.register("questions")
def read_questions(spec: SourceSpec) -> Arrays:
    """Return a split of questions about *scenes*; all ten annotators agree."""
    drawn = scene_texts.questions(spec.split)[: spec.limit]
    images = scenes.images(spec.split, 0)[[one.image for one in drawn]]
    source = _limited(spec, images, tuple((one.text,) for one in drawn), np.arange(len(drawn)))
    return _with(source, said=tuple((one.answer,) * 10 for one in drawn), candidates=scene_texts.ANSWERS)


@FORMATS.register("digits")
def read_digits(spec: SourceSpec) -> Arrays:
    """Return a split of *digits*, with ten classes."""
    images, labels = digits.digits(spec.split)
    prompts = {label: tuple(t.format(name) for t in digits.TEMPLATES) for label, name in enumerate(digits.CLASSES)}
    texts = tuple(prompts[int(label)] for label in labels)
    return _limited(spec, images, texts, labels, Classes(digits.CLASSES, digits.TEMPLATES))


def _limited(
    spec: SourceSpec, images: np.ndarray, texts: tuple, groups: np.ndarray, classes: Classes | None = None
) -> Arrays:
    """Return the first `spec.limit` records as a source."""
    stop = spec.limit
    content = hashlib.sha256(images[:stop].tobytes() + repr(texts[:stop]).encode()).hexdigest()[:16]
    return Arrays(spec.name or spec.format, content, images[:stop], texts[:stop], groups[:stop], classes)


def _with(source: Arrays, **more: Any) -> Arrays:
    """Return a source that has more than images and texts, with a fingerprint of all of it."""
    content = hashlib.sha256(source.fingerprint.encode())
    for value in more.values():
        content.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return replace(source, fingerprint=content.hexdigest()[:16], **more)
