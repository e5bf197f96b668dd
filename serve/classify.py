"""Inference with an export folder and ONNX Runtime, or OpenVINO, alone: embeddings, classification, segmentation, and what a BLIP says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipress.data.prompts import check_labels, prompts_by_class
from clipress.data.transforms import as_image
from clipress.errors import DataError, ExportError, RecipeError, nearest
from clipress.metrics.classify import softmax as over_all
from clipress.metrics.retrieval import finite
from clipress.metrics.windows import segmented
from clipress.metrics.zeroshot import embed_labels, label_probabilities
from clipress.runtime.export_folder import read_export
from clipress.runtime.graph import Graph
from clipress.runtime.sessions import ONNX_RUNTIME, RUNTIMES
from clipress.serve.blip import Blip
from clipress.serve.graphs import IMAGE, TEXT, classifier_graph, embedder, is_zero_shot, segmenter_graph
from clipress.serve.images import ImageLike, as_list, is_one, opened

TEMPLATES = ("a photo of a {}",)
BATCH = 32  # items per call of ONNX Runtime; limits memory


class LoadedModel(Blip):
    """An exported model; see `clipress.load`. A CLIP embeds, and classifies among any labels; a classifier among its own.

    A Segmenter finds its labels at every pixel. A BLIP does one of these: it writes captions, answers questions, judges statements
    about two images, or finds images for texts. A method that a model does not have raises ExportError, which says what it is for.

    Args:
        export: an export folder.
        threads: threads inside one operator; 0: one per core.
        runtime: "onnxruntime" or "openvino".

    Raises ArtifactError if the export is missing or damaged, and ExportError for another task.
    """

    def __init__(self, export: str | Path, threads: int = 0, runtime: str = ONNX_RUNTIME) -> None:
        if (opener := RUNTIMES.get(runtime)) is None:
            raise RecipeError(f"runtime '{runtime}' does not exist.{nearest(runtime, RUNTIMES)}")
        self.exported = exported = read_export(export)
        self._scores, self._masks = classifier_graph(exported), segmenter_graph(exported)
        if self._scores is None and self._masks is None and self.use is None and not is_zero_shot(exported):
            raise ExportError(
                f"{export}: expected the export of a CLIP, a BLIP, or of a classifier or Segmenter with labels, found a "
                f"{exported.task} with {', '.join(exported.graphs)}."
            )
        self.sessions = {graph: opener(exported.onnx(graph), threads) for graph in exported.graphs}
        self._tokenize = exported.tokenize()
        self._embedded: tuple[Any, np.ndarray] | None = None  # the last set of labels, and its embeddings

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes of a classifier or a Segmenter; None for a CLIP, which takes any labels."""
        return self.exported.labels

    @property
    def segments(self) -> bool:
        """Whether this is a Segmenter."""
        return self._masks is not None

    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """Return unit-length embeddings, float32 [N, D]; a single image gives [1, D].

        Raises DataError for an image that cannot be read, and ExportError for a model without embeddings.
        """
        return self._run(embedder(self.exported, IMAGE), as_list(images), self._pixels)

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Return unit-length embeddings, float32 [N, D]; a single text gives [1, D].

        Raises ExportError for a model without embeddings of texts.
        """
        return self._run(embedder(self.exported, TEXT), [texts] if isinstance(texts, str) else texts, self._tokenize)

    def classify(
        self,
        images: ImageLike | Sequence[ImageLike],
        labels: Sequence[str] | None = None,
        templates: str | Sequence[str] = TEMPLATES,
        softmax: bool = False,
    ) -> np.ndarray:
        """Return the probability of every label, float32 [N, C]. A single image gives [C].

        Rows sum to 1, but for a SigLIP, of which every label has a probability of its own.

        Args:
            images: one image or several.
            labels: names to choose from. A classifier chooses among its own labels, or some of them; None means all.
            templates: prompts with {} for the label; embeddings of several are averaged. A classifier has no use for them.
            softmax: make the rows of a SigLIP sum to 1 too.

        Raises DataError for an image that cannot be read, for empty, repeated or malformed labels and templates, and for
        labels that a classifier does not know.
        """
        if self._scores is not None:
            columns = label_columns(self.exported.labels, labels)
            found = over_all(self._run(self._scores, as_list(images), self._pixels)[:, columns])
        else:
            shapes = (templates,) if isinstance(templates, str) else tuple(templates)
            cosines = self.encode_image(images) @ self.label_embeddings(labels or (), shapes).T
            found = label_probabilities(cosines, self.exported.logit_scale, self.exported.logit_bias, softmax)
        return found[0] if is_one(images) else found

    def segment(self, images: ImageLike | Sequence[ImageLike]) -> list[np.ndarray]:
        """Return the place in `labels` of every pixel of every image, int64 [H, W] each, at its own size.

        A large image is seen in windows. Raises DataError for an image that cannot be read, and ExportError for another model.
        """
        graph = self._masks
        if graph is None:
            raise ExportError(f"{self.exported.folder}: expected a Segmenter, found a model that {self.use_in_words}.")

        session, takes, gives = self.sessions[graph.name], graph.inputs[0].name, graph.outputs[0].name

        def scores(pixels: np.ndarray) -> np.ndarray:
            return session.run([gives], {takes: pixels})[0]

        at_their_size = (as_image(opened(image)) for image in as_list(images))
        return [segmented(image, scores, self.exported.preprocess) for image in at_their_size]

    def label_embeddings(self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> np.ndarray:
        """Return one unit vector per label, float32 [C, D]: the mean over the templates. Raises DataError.

        The last result is kept, so that classifying with the same labels again costs no text encoding.
        """
        key = (tuple(labels), tuple(templates))
        if self._embedded is None or self._embedded[0] != key:
            check_labels(labels)
            check_templates(templates)
            self._embedded = key, embed_labels(self.encode_text, labels, templates)
        return self._embedded[1]

    def _run(self, graph: Graph, items: Sequence[Any], prepare: Callable[[Any], np.ndarray]) -> np.ndarray:
        """Run a graph of one input on all items, a batch at a time, and return its first output."""
        (takes,), gives = graph.inputs, graph.outputs[0]
        rows = [np.empty((0, *gives.shape), np.float32)]
        for start in range(0, len(items), BATCH):
            inputs = {takes.name: prepare(items[start : start + BATCH])}
            rows += self.sessions[graph.name].run([gives.name], inputs)
        return finite(np.concatenate(rows), graph.name, unit=graph.agrees)


def prompts_for(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every label in every template, a label's prompts together: C * T texts. Raises DataError."""
    check_labels(labels)
    check_templates(templates)
    return [prompt for _, prompts in prompts_by_class(labels, templates) for prompt in prompts]


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


def shares_among(probabilities: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """Return the probabilities [C] of some classes among these alone, as `softmax` of their logits gives them."""
    chosen = np.maximum(probabilities[columns], np.finfo(np.float32).tiny)  # All of them may have been rounded to 0.
    return chosen / chosen.sum()


def check_templates(templates: Sequence[str]) -> None:
    """Raise DataError for an empty list, and for a template without a place for the label."""
    if not templates:
        raise DataError(
            "templates: expected at least one prompt template, found none. Use one such as 'a photo of a {}'."
        )
    for template in templates:
        if "{}" not in template:
            raise DataError(f"Template '{template}' has no {{}} for the label. Write it like 'a photo of a {{}}'.")
