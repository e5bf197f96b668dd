"""Classify images with an export folder and ONNX Runtime alone: a CLIP among any labels, a classifier among its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipress.data.prompts import check_labels, prompts_by_class
from clipress.data.transforms import fitted, normalised, open_image
from clipress.errors import DataError, ExportError, nearest
from clipress.metrics.classify import softmax
from clipress.metrics.retrieval import finite
from clipress.metrics.zeroshot import embed_labels
from clipress.runtime.export_folder import read_export
from clipress.runtime.graph import Graph
from clipress.runtime.onnx_session import open_session
from clipress.serve.graphs import IMAGE, TEXT, classifier_graph, embedder, is_zero_shot

TEMPLATES = ("a photo of a {}",)
BATCH = 32  # images or texts held in memory at once
ImageFile = str | Path | bytes


class Classifier:
    """Classification with the ONNX files of one export folder.

    Args:
        export: the export folder of a CLIP or of a classifier.
        threads: threads of ONNX Runtime inside one operator; 0 uses one per core.

    Raises ArtifactError for a missing or damaged export, and ExportError for a task that does not classify.
    """

    def __init__(self, export: str | Path, threads: int = 0) -> None:
        self.exported = exported = read_export(export)
        self._scores = classifier_graph(exported)
        if self._scores is None and not is_zero_shot(exported):
            raise ExportError(
                f"{export}: expected the export of a CLIP or of a classifier with labels, found a {exported.task} with "
                f"{', '.join(exported.graphs)}."
            )
        self.sessions = {graph: open_session(exported.onnx(graph), threads) for graph in exported.graphs}
        self._tokenize = exported.tokenize()

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes of a classifier; None for a CLIP, which takes any labels."""
        return self.exported.labels

    def probabilities(
        self,
        images: Sequence[ImageFile],
        labels: Sequence[str] | None = None,
        templates: Sequence[str] = TEMPLATES,
    ) -> np.ndarray:
        """Return the probability of every label for every image, float32 [N, C]; rows sum to 1.

        Args:
            images: paths, or the bytes of image files.
            labels: names to choose from. A classifier chooses among its own labels, or some of them; None means all.
            templates: prompts with `{}` for the label; a classifier has no use for them.

        Raises DataError for an image that cannot be read, for labels or templates that are empty, repeated or malformed,
        and for labels that a classifier does not know.
        """
        if self._scores is not None:
            columns = label_columns(self.exported.labels, labels)
            return softmax(self._run(self._scores, images, self._pixels)[:, columns])
        classes = self.label_embeddings(labels or (), templates)
        return softmax(zero_shot_logits(self.exported.logit_scale, self.embed_images(images), classes))

    def label_embeddings(self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> np.ndarray:
        """Return one unit vector per label, float32 [C, D]: the mean over the templates. Raises DataError."""
        check_labels(labels)
        check_templates(templates)
        return embed_labels(self.embed_texts, labels, templates)

    def embed_images(self, images: Sequence[ImageFile]) -> np.ndarray:
        """Return unit embeddings of images, float32 [N, D]. Raises DataError, and ExportError if this is no CLIP."""
        return self._run(embedder(self.exported, IMAGE), images, self._pixels)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit embeddings of texts, float32 [N, D]. Raises ExportError if this is no CLIP."""
        return self._run(embedder(self.exported, TEXT), texts, self._tokenize)

    def _pixels(self, images: Sequence[ImageFile]) -> np.ndarray:
        preprocess = self.exported.preprocess
        return normalised(np.stack([fitted(open_image(image), preprocess) for image in images]), preprocess)

    def _run(self, graph: Graph, items: Sequence[Any], prepare: Callable[[Any], np.ndarray]) -> np.ndarray:
        """Run a graph of one input on all items, a batch at a time, and return its first output."""
        (takes,), gives = graph.inputs, graph.outputs[0]
        rows = [np.empty((0, *gives.shape), np.float32)]
        for start in range(0, len(items), BATCH):
            inputs = {takes.name: prepare(items[start : start + BATCH])}
            rows += self.sessions[graph.name].run([gives.name], inputs)
        return finite(np.concatenate(rows), graph.name)


def prompts_for(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every label in every template, a label's prompts together: C * T texts. Raises DataError."""
    check_labels(labels)
    check_templates(templates)
    return [prompt for _, prompts in prompts_by_class(labels, templates) for prompt in prompts]


def zero_shot_logits(logit_scale: float, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return logits [N, C] from unit vectors [N, D] and [C, D]. A logit bias would shift all classes alike."""
    return logit_scale * (images @ classes.T)


def label_columns(known: Sequence[str], labels: Sequence[str] | None) -> list[int]:
    """Return where a classifier's output has the given labels; None means all. Raises DataError for unknown labels."""
    if labels is None:
        return list(range(len(known)))
    check_labels(labels)
    columns = {label: column for column, label in enumerate(known)}
    if unknown := [label for label in labels if label not in columns]:
        raise DataError(
            f"labels: expected some of the classifier's own {len(known)} labels, found '{unknown[0]}'."
            f"{nearest(unknown[0], known)}"
        )
    return [columns[label] for label in labels]


def check_templates(templates: Sequence[str]) -> None:
    """Raise DataError for an empty list, and for a template without a place for the label."""
    if not templates:
        raise DataError(
            "templates: expected at least one prompt template, found none. Use one such as 'a photo of a {}'."
        )
    for template in templates:
        if "{}" not in template:
            raise DataError(f"Template '{template}' has no {{}} for the label. Write it like 'a photo of a {{}}'.")


def labels_from(option: str | None, file: Path | None) -> list[str]:
    """Return the labels of a comma-separated text, or of a text file with one per line; blank ones are skipped.

    Exactly one of the two must be given. Raises DataError.
    """
    if (option is None) == (file is None):
        found = "none" if file is None else "both"
        raise DataError(f"Expected either --labels or --labels-file, found {found}. Set one of them.")
    parts = option.split(",") if file is None else _lines(file)
    labels = [part.strip() for part in parts if part.strip()]
    if not labels:
        where = f"--labels '{option}'" if file is None else f"Labels file {file}"
        raise DataError(f"{where} holds no label. Name some, such as cat,dog or one per line.")
    check_labels(labels)
    return labels


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"Labels file {file} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Labels file {file} cannot be read: {error}. Use UTF-8 text, one label per line.") from None
