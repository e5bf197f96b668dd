"""Inference with an export folder and ONNX Runtime alone: embeddings, and classification among named labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from clipress.data.prompts import check_labels, prompts_by_class
from clipress.data.tokens import tokenizer_from_spec
from clipress.data.transforms import as_rgb, fitted, normalised, open_image
from clipress.errors import DataError
from clipress.metrics.classify import softmax
from clipress.metrics.retrieval import finite
from clipress.metrics.zeroshot import embed_labels
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import open_session

TEMPLATES = ("a photo of a {}",)
BATCH = 32  # items per call of ONNX Runtime; limits memory
ImageLike = str | Path | bytes | Image.Image | np.ndarray
"""A path, the content of an image file, a Pillow image, or uint8 pixels [H, W, 3] in RGB."""


class LoadedModel:
    """An exported CLIP model; see `clipress.load`.

    Args:
        export: folder with image.onnx, text.onnx and export.json.
        threads: ONNX Runtime threads inside one operator; 0: one per core.

    Raises ArtifactError if the export is missing or damaged.
    """

    def __init__(self, export: str | Path, threads: int = 0) -> None:
        self.exported = read_export(export)
        self.sessions = {tower: open_session(self.exported.onnx(tower), threads) for tower in self.exported.files}
        self._tokenize = tokenizer_from_spec(self.exported.tokenizer.model_dump())
        self._labels: tuple[Any, np.ndarray] | None = None  # the last set of labels, and its embeddings

    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """Return unit-length embeddings, float32 [N, D]; a single image gives [1, D]. Raises DataError."""
        return self._encode("image", _as_list(images), self.pixels)

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Return unit-length embeddings, float32 [N, D]; a single text gives [1, D]."""
        return self._encode("text", [texts] if isinstance(texts, str) else list(texts), self._tokenize)

    def classify(
        self,
        images: ImageLike | Sequence[ImageLike],
        labels: Sequence[str],
        templates: str | Sequence[str] = TEMPLATES,
    ) -> np.ndarray:
        """Return the probability of every label, float32 [N, C]; rows sum to 1. A single image gives [C].

        Args:
            images: one image or several.
            labels: names to choose from.
            templates: prompts with {} for the label; embeddings of several are averaged.

        Raises DataError for an image that cannot be read, and for empty, repeated or malformed labels and templates.
        """
        shapes = (templates,) if isinstance(templates, str) else tuple(templates)
        classes = self.label_embeddings(labels, shapes)
        found = softmax(self.exported.logit_scale * (self.encode_image(images) @ classes.T))
        return found[0] if _is_one(images) else found

    def label_embeddings(self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> np.ndarray:
        """Return one unit vector per label, float32 [C, D]: the mean over the templates. Raises DataError.

        The last result is kept, so that classifying with the same labels again costs no text encoding.
        """
        key = (tuple(labels), tuple(templates))
        if self._labels is None or self._labels[0] != key:
            check_labels(labels)
            check_templates(templates)
            self._labels = key, embed_labels(self.encode_text, labels, templates)
        return self._labels[1]

    def pixels(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Return the image encoder's input, float32 [N, 3, S, S]. Raises DataError."""
        preprocess = self.exported.preprocess
        return normalised(np.stack([fitted(_opened(image), preprocess) for image in images]), preprocess)

    def _encode(self, tower: str, items: Sequence[Any], prepare: Callable[[Any], np.ndarray]) -> np.ndarray:
        session = self.sessions[tower]
        name = session.get_inputs()[0].name
        batches = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
        empty = np.empty((0, self.exported.embed_dim), np.float32)
        found = np.concatenate([empty, *(session.run(None, {name: prepare(batch)})[0] for batch in batches)])
        return finite(found, tower)


def _is_one(images: ImageLike | Sequence[ImageLike]) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    return isinstance(images, str | Path | bytes | Image.Image)


def _as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    return [images] if _is_one(images) else list(images)


def _opened(image: ImageLike) -> Image.Image | np.ndarray:
    if isinstance(image, Image.Image):
        return as_rgb(ImageOps.exif_transpose(image))
    if not isinstance(image, np.ndarray):
        return open_image(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DataError(
            f"Image array: expected uint8 [H, W, 3] in RGB, found {image.dtype} {list(image.shape)}. Convert it first."
        )
    return image


def prompts_for(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every label in every template, the prompts of a label together: C * T texts. Raises DataError."""
    check_labels(labels)
    check_templates(templates)
    return [prompt for _, prompts in prompts_by_class(labels, templates) for prompt in prompts]


def check_templates(templates: Sequence[str]) -> None:
    """Raise DataError for an empty list, and for a template without a place for the label."""
    if not templates:
        raise DataError(
            "templates: expected at least one prompt template, found none. Use one such as 'a photo of a {}'."
        )
    for template in templates:
        if "{}" not in template:
            raise DataError(f"Template '{template}' has no {{}} for the label. Write it as 'a photo of a {{}}'.")
