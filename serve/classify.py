"""Pictures and label names -> probabilities, from an export folder and ONNX Runtime alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipress.data.prompts import check_labels, prompts_by_class
from clipress.data.tokens import tokenizer_from_spec
from clipress.data.transforms import fitted, normalised, open_image
from clipress.errors import DataError
from clipress.metrics.classify import softmax
from clipress.metrics.retrieval import finite
from clipress.metrics.zeroshot import embed_labels
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import open_session

TEMPLATES = ("a photo of a {}",)
BATCH = 32  # what is held in memory at once


class Classifier:
    """Zero-shot classification with the two towers of one export folder.

    Args:
        export: holds image.onnx, text.onnx and export.json.
        threads: of ONNX Runtime, inside one operator; 0: one per core.
    """

    def __init__(self, export: str | Path, threads: int = 0) -> None:
        self._export = read_export(export)
        self._sessions = {tower: open_session(self._export.onnx(tower), threads) for tower in self._export.files}
        self._tokenize = tokenizer_from_spec(self._export.tokenizer.model_dump())

    def label_embeddings(self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> np.ndarray:
        """Return one unit vector per label, float32 [C, D]: the mean over the templates. Raises DataError."""
        check_labels(labels)
        check_templates(templates)
        return embed_labels(lambda prompts: self._embeddings("text", prompts, self._tokenize), labels, templates)

    def probabilities(
        self, images: Sequence[str | Path | bytes], labels: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> np.ndarray:
        """Return the probability of every label for every picture, [N, C]; rows sum to 1.

        Pictures are paths or the bytes of a file. Raises DataError for a picture that cannot be read, and for labels
        or templates that are empty, repeated or of the wrong form.
        """
        classes = self.label_embeddings(labels, templates)
        embeds = self._embeddings("image", images, self._pixels)
        return softmax(self._export.logit_scale * (embeds @ classes.T))

    def _pixels(self, images: Sequence[str | Path | bytes]) -> np.ndarray:
        preprocess = self._export.preprocess
        return normalised(np.stack([fitted(open_image(image), preprocess) for image in images]), preprocess)

    def _embeddings(self, tower: str, items: Sequence[Any], prepared: Callable[[Any], np.ndarray]) -> np.ndarray:
        session = self._sessions[tower]
        takes = session.get_inputs()[0].name
        batches = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
        none = np.empty((0, self._export.embed_dim), np.float32)
        found = np.concatenate([none, *(session.run(None, {takes: prepared(batch)})[0] for batch in batches)])
        return finite(found, tower)


def prompts_for(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every label in every template, a label's prompts together: C * T texts. Raises DataError."""
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


def labels_from(option: str | None, file: Path | None) -> list[str]:
    """Return the labels of a comma-separated text, or of a text file with one per line; blank ones are left out.

    Exactly one of both must be given. Raises DataError.
    """
    if (option is None) == (file is None):
        found = "none" if file is None else "both"
        raise DataError(f"Either --labels or --labels-file is asked for, found {found}. Give one of them.")
    parts = option.split(",") if file is None else _lines(file)
    labels = [part.strip() for part in parts if part.strip()]
    if not labels:
        where = f"'{option}'" if file is None else str(file)
        raise DataError(f"Labels were asked for, and {where} holds none. Give names, such as cat,dog or one per line.")
    check_labels(labels)
    return labels


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"Labels file {file} was asked for, and there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Labels file {file} cannot be read: {error}. Give a UTF-8 text, one label per line.") from None
