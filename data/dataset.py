"""Turn draws into training arrays: read, augment and tokenise records, and look up their teacher embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from clipress.data.auto_augment import auto_augmented
from clipress.data.bad_records import Record, read_record
from clipress.data.sampler import Draw
from clipress.data.sources import Source
from clipress.data.tokens import Tokenize
from clipress.data.transforms import (
    IGNORED,
    Augment,
    Library,
    Preprocess,
    View,
    drawn_view,
    size_of,
    viewed,
    viewed_mask,
)
from clipress.errors import DataError

if TYPE_CHECKING:
    from clipress.data.teacher_cache import TeacherCache


MOST, TRIES = 0.75, 10  # the largest share of one class in a window, and how often one is drawn


@dataclass(frozen=True)
class Chosen:
    """The record read for a draw, and which of its views and captions is used."""

    source: int
    record: Record
    view: int
    caption: int
    pixels: np.ndarray | None  # uint8 [S, S, 3]
    others: tuple[np.ndarray, ...] = ()
    """The same view for each of the other preprocessings."""
    mask: np.ndarray | None = None  # uint8 [S, S]
    other_pixels: np.ndarray | None = None  # uint8 [S, S, 3], the second image of a pair


class TrainingSet:
    """Turn lists of `Draw`s into arrays: pixels uint8 [B,S,S,3], ids int64 [B,L], group and label int64 [B].

    Labels number the classes of all labelled sources, one source after the other; they are -1 for a source without
    classes. `pixels` is absent if a source has no images, `ids` if one has no texts. `bad` lists the records that could
    not be read and were replaced. Where all sources have masks, `mask` has the label of every pixel, uint8 [B,S,S]. Where all have
    pairs, `other_pixels` are the second images, in views of their own, and labels say whether the statements are true. Where all have
    answers, `ids` are questions, and every answer that differs has a row: `answers` int64 [A,L], `answer_weight` float32 [A], and
    `owner` int64 [A], the place of its question in the batch.

    With `caches`, one per teacher for each source, images are shown in the views the teachers have embedded, and teacher t
    adds teacher_image_t and teacher_text_t, unit rows float32 [B,D], and their norms teacher_image_norm_t and
    teacher_text_norm_t, float32 [B]. `needed_ids` cuts a batch's ids to what is read of them.

    `of_teachers` are the preprocessings of teachers that run: where teacher t has another one, teacher_pixels_t are the same
    views in its size.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        preprocess: Preprocess,
        tokenize: Tokenize | None,
        augment: Augment,
        seed: int,
        caches: Sequence[Sequence[TeacherCache]] = (),
        library: Library = "pillow",
        needed_ids: Callable[[np.ndarray], np.ndarray] | None = None,
        of_teachers: Sequence[Preprocess] = (),
    ) -> None:
        self.others = {t: one for t, one in enumerate(of_teachers) if one != preprocess}
        if augment.shift and (sizes := [one.size for one in self.others.values() if one.size != preprocess.size]):
            raise DataError(
                f"data.augment.shift is in pixels, so the teacher and the student must have one image size; found {sizes[0]} "
                f"and {preprocess.size}. Use 'augment.crop_scale' instead."
            )
        if self.others and not augment.is_view:
            raise DataError(
                "data.augment: auto_augment, random_erase, mixup and cutmix change pixels, so teacher and student must have the same "
                "preprocessing, found others. Leave them out."
            )
        self.library, self.needed_ids = library, needed_ids
        self.sources, self.preprocess, self.augment, self.seed = list(sources), preprocess, augment, seed
        self.caches = [list(row) for row in caches]
        self.has_images = all(source.has_images for source in self.sources)
        self.has_masks = self.has_images and all(getattr(source, "has_masks", False) for source in self.sources)
        self.has_pairs = self.has_images and all(getattr(source, "has_pairs", False) for source in self.sources)
        self.has_texts = tokenize is not None and all(source.has_texts for source in self.sources)
        self.has_answers = self.has_texts and all(getattr(source, "has_answers", False) for source in self.sources)
        if self.has_pairs and (self.caches or self.others):
            raise DataError(
                "data.train: pairs of images require a teacher that runs and has the student's preprocessing. Leave 'teacher.cache' "
                "out, or use another teacher."
            )
        if tokenize is None and not self.has_images:
            lacking = next(number for number, source in enumerate(self.sources) if not source.has_images)
            raise DataError(
                f"data.train.{lacking}: expected images, found texts only, which this model does not read. Use data with "
                "images."
            )
        if not (self.has_images or self.has_texts):
            raise DataError(
                "data.train: some sources have images only and others texts only. Train on one kind at a time."
            )
        self._tokenize = tokenize
        self._ids: dict[str, np.ndarray] = {}  # every caption is tokenised once
        classes = [len(source.classes.names) if getattr(source, "classes", None) else 0 for source in self.sources]
        self._first_label = [sum(classes[:place]) if count else None for place, count in enumerate(classes)]
        if self.caches:
            _check_caches(self.sources, self.caches, preprocess, augment)

    @property
    def forms(self) -> dict[str, Preprocess]:
        """The preprocessing of all pixels in a batch, by their names."""
        names = ("pixels", "other_pixels") if self.has_pairs else ("pixels",)
        of_teachers = {teacher_pixels(t): other for t, other in self.others.items()}
        return {**dict.fromkeys(names, self.preprocess), **of_teachers}

    def ids(self, texts: Sequence[str]) -> np.ndarray:
        """Tokenise texts: int64 [N, L]."""
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if new:
            known = self._tokenize(new).astype(np.int32)
            if len(self._ids) > 500_000:
                self._ids.clear()
            self._ids.update(zip(new, known, strict=True))
        return np.stack([self._ids[text] for text in texts]).astype(np.int64)

    def _cut_ids(self, texts: Sequence[str]) -> np.ndarray:
        ids = self.ids(texts)
        return ids if self.needed_ids is None else self.needed_ids(ids)

    def _answer_rows(self, rows: Sequence[Chosen]) -> dict[str, np.ndarray]:
        """Return a row for every answer to the questions that differs."""
        weights = [self.sources[row.source].answer_weights(row.record.index) for row in rows]
        if not any(weights):
            raise DataError(
                "data.train: expected answers to the questions of a batch, found none. Use data with answers."
            )
        return {
            "answers": self._cut_ids([text for one in weights for text in one]),
            "answer_weight": np.asarray([weight for one in weights for weight in one.values()], np.float32),
            "owner": np.repeat(np.arange(len(rows)), [len(one) for one in weights]),
        }

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        rows = [self._chosen(draw) for draw in draws]
        groups = [self.sources[row.source].group(row.record.index) for row in rows]
        firsts = [self._first_label[row.source] for row in rows]
        arrays: dict[str, Any] = {
            "group": np.asarray([row.source << 40 | group for row, group in zip(rows, groups, strict=True)], np.int64),
            "label": np.asarray(
                [-1 if first is None else first + group for first, group in zip(firsts, groups, strict=True)], np.int64
            ),
            "bad": [bad for row in rows for bad in row.record.bad],
        }
        if self.has_images:
            arrays["pixels"] = np.stack([row.pixels for row in rows])
            if self.has_masks:
                arrays["mask"] = np.stack([row.mask for row in rows])
            if self.has_pairs:
                arrays["other_pixels"] = np.stack([row.other_pixels for row in rows])
                labels = [self.sources[row.source].label(row.record.index) for row in rows]
                arrays["label"] = np.asarray(labels, np.int64)
            for place, teacher in enumerate(self.others):
                arrays[teacher_pixels(teacher)] = np.stack([row.others[place] for row in rows])
        if self.has_texts:
            arrays["ids"] = self._cut_ids([row.record.captions[row.caption] for row in rows])
            if self.has_answers:
                arrays |= self._answer_rows(rows)
        return arrays | (self._teacher_rows(rows) if self.caches else {})

    def _chosen(self, draw: Draw) -> Chosen:
        """Read the record of a draw; every choice follows from (seed, draw)."""
        source, key = self.sources[draw.source], [self.seed, draw.source, draw.epoch, draw.index]
        rng = np.random.default_rng(key)
        sides = (self.has_images, self.has_texts)
        record, view = read_record(source, draw.index, key, *sides), 0
        if self.caches:
            cache = self.caches[draw.source][0]
            while not cache.ok(record.index):  # the teacher could not read this image: another item replaces it
                record = read_record(source, int(rng.integers(len(source))), key, *sides)
            view = int(rng.integers(cache.manifest.views)) if self.has_images else 0
        if self.has_pairs and self.augment.exchange and rng.integers(2):
            record = exchanged(record)
        pixels, others, mask, other_pixels = None, (), None, None
        if self.has_images:
            whole = source.mask(record.index) if self.has_masks else None
            cached = cache.view(record.index, view) if self.caches else None
            shown, mask = self._seen(size_of(record.image), whole, cached, rng)
            forms = (self.preprocess, *self.others.values())
            pixels, *others = (viewed(record.image, form, shown, self.library) for form in forms)
            pixels = self._augmented(pixels, rng)
        if self.has_pairs:
            shown = drawn_view(size_of(record.other_image), self.augment, rng)
            other_pixels = self._augmented(viewed(record.other_image, self.preprocess, shown, self.library), rng)
        caption = int(rng.integers(len(record.captions))) if self.has_texts else 0
        return Chosen(draw.source, record, view, caption, pixels, tuple(others), mask, other_pixels)

    def _augmented(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        policy = self.augment.auto_augment
        return pixels if policy is None else auto_augmented(pixels, policy, self.preprocess, rng)

    def _seen(
        self, size: tuple[int, int], whole: np.ndarray | None, cached: View | None, rng: np.random.Generator
    ) -> tuple[View, np.ndarray | None]:
        """Return the view of a cache, or one that is drawn, with the labels in it.

        A window in an image with a mask is drawn again while one class fills most of it, as in mmseg.
        """
        tries = TRIES if self.augment.zoom is not None and whole is not None and cached is None else 1
        for _ in range(tries):
            view = drawn_view(size, self.augment, rng) if cached is None else cached
            mask = None if whole is None else viewed_mask(whole, self.preprocess, view)
            if tries > 1 and _is_varied(mask):
                break
        return view, mask

    def _teacher_rows(self, rows: Sequence[Chosen]) -> dict[str, np.ndarray]:
        """Look up every teacher's embeddings of the chosen views and captions."""
        sources, arrays = np.asarray([row.source for row in rows]), {}
        for teacher, first in enumerate(self.caches[0]):
            for side in ("image",) * self.has_images + ("text",) * self.has_texts:
                unit, norm = np.empty((len(rows), first.manifest.dim), np.float32), np.empty(len(rows), np.float32)
                for source in np.unique(sources):
                    here = np.flatnonzero(sources == source)
                    unit[here], norm[here] = _look_up(self.caches[source][teacher], side, [rows[at] for at in here])
                arrays |= {f"teacher_{side}_{teacher}": unit, f"teacher_{side}_norm_{teacher}": norm}
        return arrays

    def __len__(self) -> int:
        return sum(map(len, self.sources))


def _is_varied(mask: np.ndarray) -> bool:
    """Return whether a mask has several classes, and none that fills most of it."""
    counts = np.bincount(mask[mask != IGNORED], minlength=2)
    return np.count_nonzero(counts) > 1 and counts.max() < MOST * counts.sum()


def exchanged(record: Record) -> Record:
    """Return a pair with its images exchanged, and with them the words left and right of its statements."""
    words = {"left": "right", "right": "left"}
    captions = tuple(" ".join(words.get(word, word) for word in text.split(" ")) for text in record.captions)
    return replace(record, image=record.other_image, other_image=record.image, captions=captions)


def teacher_pixels(teacher: int) -> str:
    """Return the name of a batch's pixels for a teacher whose preprocessing is not the student's."""
    return f"teacher_pixels_{teacher}"


def _look_up(cache: TeacherCache, side: str, rows: Sequence[Chosen]) -> tuple[np.ndarray, np.ndarray]:
    """Return one teacher's embeddings: unit rows [n, D] and their norms [n]."""
    if side == "image":
        places = [cache.image_row(row.record.index, row.view) for row in rows]
        return cache.images(places), cache.image_norms(places)
    places = [cache.text_row(row.record.index, row.caption) for row in rows]
    return cache.texts(places), cache.text_norms(places)


def _check_caches(
    sources: Sequence[Source], caches: Sequence[Sequence[TeacherCache]], preprocess: Preprocess, augment: Augment
) -> None:
    """Raise DataError for caches of other data, of other augmentations, or with views that differ between teachers."""
    if len(caches) != len(sources) or len({len(row) for row in caches}) != 1 or not caches[0]:
        raise DataError(
            f"Teacher embeddings: expected caches of the same teachers for each of {len(sources)} sources, "
            f"found {list(map(len, caches))} caches."
        )
    for source, row in zip(sources, caches, strict=True):
        for cache, leader in zip(row, caches[0], strict=True):
            known = cache.manifest
            for what, found, expected in (
                ("content of the source", known.fingerprint, source.fingerprint),
                ("number of items", len(cache), len(source)),
                ("augmentation", known.augment, augment),
                ("teacher", known.teacher, leader.manifest.teacher),
                ("views", cache.views_hash, row[0].views_hash),
            ):
                if found != expected:
                    raise DataError(
                        f"Teacher embeddings in {cache.folder} do not fit {source.name}: expected {what} {expected}, "
                        f"found {found}. Run: clipress embed RECIPE"
                    )
            if augment.shift and known.preprocess.size != preprocess.size:
                raise DataError(
                    f"Teacher embeddings in {cache.folder}: 'augment.shift' is in pixels, so the teacher and the student "
                    f"must have one image size; found {known.preprocess.size} and {preprocess.size}. Use "
                    "'augment.crop_scale' instead."
                )
        if row[0].failed == len(source):
            raise DataError(
                f"Teacher embeddings in {row[0].folder}: no image of {source.name} could be read. Check its paths."
            )
