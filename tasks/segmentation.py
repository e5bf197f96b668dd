"""Semantic segmentation with a Segmenter: one graph, `image` -> scores of patches; mean IoU.

task: segmentation
student: {width: 64, layers: 4, heads: 4, patch_size: 8, image_size: 32, labels: [background, circle, square]}

Published models come from `clipress import`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from clipress.data.prompts import check_labels
from clipress.data.transforms import Preprocess
from clipress.errors import RecipeError
from clipress.metrics.outcomes import Outcomes
from clipress.metrics.segment import confusion, score_masks
from clipress.metrics.windows import Scores, segmented
from clipress.models import segmenter
from clipress.models.load import Model
from clipress.models.weights_file import Which
from clipress.recipe import Section, checked
from clipress.runtime.graph import Arrays, Graph, Input, Output, Run
from clipress.tasks import TASKS, Task, Tokenize, default_losses, sample_images
from clipress.tasks.training import Batch, Features, Gather, Lesson, Outputs, TrainingJob, TrainingModule

if TYPE_CHECKING:
    from clipress.data.eval_sets import EvalSet


class Student(Section):
    """The `student` section of a Segmenter: the sizes of its encoder and its decoder."""

    width: int = Field(384, ge=1)
    layers: int = Field(12, ge=1)
    heads: int = Field(6, ge=1)
    patch_size: int = Field(16, ge=1)
    image_size: int = Field(512, ge=1)
    """Image size in pixels; larger images are seen in windows of this size."""
    decoder_layers: int = Field(2, ge=1)
    labels: tuple[str, ...] | None = None
    """Class names, in the order of the masks' labels. Default: the teacher's."""

    def model_post_init(self, _: Any) -> None:
        if self.width % self.heads:
            raise RecipeError(f"student.width: expected a multiple of heads ({self.heads}), found {self.width}.")
        if self.image_size % self.patch_size:
            raise RecipeError(
                f"student.image_size: expected a multiple of patch_size ({self.patch_size}), found {self.image_size}."
            )
        if self.labels is not None:
            check_labels(self.labels)

    def architecture(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the sizes in timm's words, and the labels."""
        sizes = {"img_size": self.image_size, "patch_size": self.patch_size, "embed_dim": self.width}
        sizes |= {"depth": self.layers, "num_heads": self.heads}
        return {"sizes": sizes, "labels": list(labels), segmenter.DECODER: self.decoder_layers}


@TASKS.register("segmentation")
class Segmentation(Task):
    """A Segmenter."""

    name = "segmentation"
    towers = ("image", "decoder")
    main_graph = "image"
    figures = ("/miou",)
    provides = frozenset({"teacher", "masks", "logits", "tokens"})
    stage_defaults = default_losses(["segmentation"], quantize=["logits"])

    def build(self, architecture: dict[str, Any], seed: int | None = None) -> nn.Module:
        return segmenter.build(architecture, seed)

    def check_student(self, section: Mapping[str, Any], has_teacher: bool) -> None:
        if checked(Student, section, "student").labels is None and not has_teacher:
            raise RecipeError("student: expected class names in labels, found none.")

    def student_from(self, section: Mapping[str, Any], teacher: Model | None, seed: int) -> Model:
        self.check_student(section, teacher is not None)
        student = checked(Student, section, "student")
        labels = student.labels or tuple(teacher.architecture["labels"])
        if teacher is not None and list(labels) != teacher.architecture["labels"]:
            raise RecipeError("student.labels: expected the teacher's labels, found others. Leave labels out.")
        architecture = student.architecture(labels)
        preprocess = Preprocess(size=student.image_size, **segmenter.PREPROCESS)
        if teacher is not None:
            preprocess = teacher.preprocess.model_copy(update={"size": student.image_size})
        return Model(self.build(architecture, seed), architecture, preprocess, None, task=self.name)

    def load_pretrained(self, name: str, checkpoint: str | None, where: str, which: Which | None = None) -> Model:
        raise RecipeError(
            f"{where}: no library has Segmenters by name, found '{name}'. Import a published file with clipress import, and "
            "use its artifact."
        )

    def graphs(self, model: Model) -> dict[str, Graph]:
        size, patch = model.preprocess.size, model.architecture["sizes"]["patch_size"]
        pixels = Input(name="pixel_values", dtype="float32", shape=(3, size, size))
        scores = Output(name="scores", shape=(len(model.architecture["labels"]), size // patch, size // patch))
        return {"image": Graph(name="image", inputs=(pixels,), outputs=(scores,), agrees="masks")}

    def graph_of(self, tower: str) -> str:
        return self.main_graph

    def call(self, module: nn.Module, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": module(inputs["pixel_values"])}

    def inputs_of(self, arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"image": {"pixel_values": arrays["pixels"]}}

    def cached_rows(self, module: nn.Module, name: str, rows: Tensor) -> Tensor:
        raise RecipeError("teacher.cache: a Segmenter's scores of every patch are not cached. Leave it out.")

    def samples(self, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None) -> dict[str, Arrays]:
        return {"image": {"pixel_values": np.concatenate(sample_images(sets, preprocess))}}

    def evaluate(
        self, run: Mapping[str, Run], sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None
    ) -> dict[str, Outcomes]:
        results: dict[str, Outcomes] = {}
        for one in sets:
            if not getattr(one.source, "has_masks", False):
                raise RecipeError(
                    f"data: {one.name} has no masks. Evaluating a Segmenter requires the label of every pixel; use data with masks."
                )
            scores, classes = _scores_of(run["image"], one), len(one.classes.names)
            counts = [confusion(mask, segmented(image, scores, preprocess), classes) for image, mask in one.masks()]
            results |= {f"{one.name}/{metric}": outcomes for metric, outcomes in score_masks(counts).items()}
        return results

    def lesson(self, job: TrainingJob) -> SegmenterLesson:
        return SegmenterLesson(job)

    def describe(self, model: Model) -> dict[str, Any]:
        return {"labels": tuple(model.architecture["labels"])}


def _scores_of(run: Run, one: EvalSet) -> Scores:
    """Return the scores of patches by pixels; calling it raises RecipeError for a model of another number of classes than a set."""

    def scores(pixels: np.ndarray) -> np.ndarray:
        found, classes = run({"pixel_values": pixels})["scores"], len(one.classes.names)
        if found.shape[1] != classes:
            raise RecipeError(f"data: expected the model's {found.shape[1]} classes, found {classes} in {one.name}.")
        return found

    return scores


class SegmenterModule(TrainingModule):
    """The forward pass of a training step."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Score images [B, 3, S, S]. Returns scores [B, C, h, w], and token features if they are hooked."""
        return {"scores": self.model(pixels).float()} | self.take_tokens()


class SegmenterLesson(Lesson):
    """Supervised training on masks, and distillation of the scores of patches and of token features."""

    def __init__(self, job: TrainingJob) -> None:
        self.needs, self.learning = job.needs, Segmentation.towers
        self.tokens = self.learning if "tokens" in job.needs else ()
        for teacher in job.teachers:
            job.refuse_other_inputs(teacher)
            job.refuse_other_labels(teacher)
        if not job.sources_have("images"):
            raise RecipeError(f"{job.title}: a Segmenter requires images, but the training data has none.")
        if "masks" in job.needs:
            _refuse_without_masks(job)
        self.sizes = job.sizes(lambda model: len(model.architecture["labels"]), self.learning)

    def module(self, module: nn.Module) -> SegmenterModule:
        return SegmenterModule(module, self.tokens)

    def inputs(self, arrays: Mapping[str, Tensor], mask: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
        return {"pixels": arrays["pixels"]}

    def cached_outputs(self, arrays: Mapping[str, Tensor], teacher: int, scale: float | None) -> Outputs:
        raise RecipeError("teacher.cache: a Segmenter's scores of every patch are not cached. Leave it out.")

    def batch(
        self,
        outputs: Outputs,
        teachers: Sequence[Outputs],
        arrays: Mapping[str, Tensor],
        projections: Mapping[str, nn.Module],
        gather: Gather,
    ) -> Batch:
        found = Batch(
            _features(outputs, gather), tuple(_features(one, gather) for one in teachers), sides=self.learning
        )
        if "masks" not in self.needs:
            return found
        masks = arrays["mask"].long()
        return replace(found, masks=gather.own(masks), all_masks=gather.rows(masks))


def _features(outputs: Outputs, gather: Gather) -> Features:
    scores = gather.own(outputs["scores"])
    logits = scores.flatten(2).transpose(1, 2).flatten(0, 1)
    return Features(scores=scores, logits=logits, tokens=gather.own_tokens(outputs))


def _refuse_without_masks(job: TrainingJob) -> None:
    for source in job.sources:
        if not getattr(source, "has_masks", False):
            raise RecipeError(
                f"{job.title}: losses on masks require the label of every pixel, but {source.name} has no masks. Use data with masks, or "
                "losses such as logits."
            )
        job.refuse_other_classes(source)
