"""Image classification with a vision transformer: one graph, `image` -> logits; top-1 and top-5 accuracy.

task: classification
student: {width: 64, layers: 4, heads: 4, patch_size: 8, image_size: 32, labels: [cat, dog]}
student: {model: deit_tiny_patch16_224, labels_file: imagenet}       a plain ViT from timm
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from clipress.data.prompts import check_labels, read_classes
from clipress.data.transforms import Preprocess, preprocess_from_open_clip
from clipress.errors import ArtifactError, RecipeError, first_line
from clipress.metrics.classify import score_logits
from clipress.metrics.outcomes import Outcomes
from clipress.models import anatomy, surgery, vit
from clipress.models.load import Model
from clipress.models.weights_file import Which
from clipress.recipe import Section, checked
from clipress.runtime.graph import Arrays, Graph, Input, Output, Run
from clipress.tasks import TASKS, Task, Tokenize, default_losses, sample_images
from clipress.tasks.training import Batch, Gather, Lesson, Outputs, TrainingJob, TrainingModule, features_of_logits

if TYPE_CHECKING:
    from clipress.data.eval_sets import EvalSet


class Student(Section):
    """The `student` section of a classifier: a timm name, or the sizes of a ViT."""

    model: str | None = None
    """Name of a plain ViT in timm, such as deit_tiny_patch16_224, with random weights."""
    width: int | None = Field(None, ge=1)
    layers: int = Field(12, ge=1)
    heads: int | None = Field(None, ge=1)
    """Number of heads. Default: one per 64 dims."""
    patch_size: int = Field(16, ge=1)
    image_size: int | None = Field(None, ge=1)
    """Image size in pixels. Default: the teacher's; without a teacher the timm model's, or 224."""
    labels: tuple[str, ...] | None = None
    """Class names, in the same order as in the data. Default: the teacher's."""
    labels_file: Path | None = None
    """Text file with one class name per line, or `imagenet`."""

    def model_post_init(self, _: Any) -> None:
        if (self.model is None) == (self.width is None):
            found = "neither" if self.model is None else "both"
            raise RecipeError(f"student: expected either model (a timm name) or width (a ViT's), found {found}.")
        if self.labels is not None and self.labels_file is not None:
            raise RecipeError("student: expected either labels or labels_file, found both.")
        if self.width is not None and self.width % self.num_heads:
            raise RecipeError(f"student.width: expected a multiple of heads ({self.num_heads}), found {self.width}.")

    @property
    def num_heads(self) -> int:
        """The number of heads of a ViT that is described by its width."""
        return self.heads or max(self.width // 64, 1)

    def names(self) -> tuple[str, ...] | None:
        """Return the class names, or None to use the teacher's."""
        names = self.labels if self.labels_file is None else read_classes(self.labels_file).names
        if names is not None:
            check_labels(names)
        return names

    def architecture(self, size: int | None, labels: Sequence[str]) -> dict[str, Any]:
        """Return timm's name and arguments. `size` is the image size in pixels; None uses the model's own."""
        sizes = {} if size is None else {"img_size": size}
        if self.width is not None:
            sizes = {"img_size": 224, "patch_size": self.patch_size, "embed_dim": self.width, **sizes}
            sizes |= {"depth": self.layers, "num_heads": self.num_heads}
        return {"timm_model": self.model or vit.OWN, "sizes": sizes, "labels": list(labels)}


@TASKS.register("classification")
class Classification(Task):
    """A ViT classifier."""

    name = "classification"
    towers = ("image",)
    main_graph = "image"
    figures = ("/top1",)
    provides = frozenset({"teacher", "labels", "space", "logits", "tokens"})
    mixes = True
    stage_defaults = default_losses(["classification"], quantize=["logits"])

    def build(self, architecture: dict[str, Any], seed: int | None = None) -> nn.Module:
        return vit.build(architecture, seed)

    def check_student(self, section: Mapping[str, Any], has_teacher: bool) -> None:
        student = checked(Student, section, "student")
        if student.names() is None and not has_teacher:
            raise RecipeError("student: expected class names in labels or labels_file, found neither.")
        if student.model is not None:
            vit.check_name(student.model, "student")

    def student_from(self, section: Mapping[str, Any], teacher: Model | None, seed: int) -> Model:
        self.check_student(section, teacher is not None)
        student = checked(Student, section, "student")
        labels = student.names() or tuple(teacher.architecture["labels"])
        if teacher is not None and list(labels) != teacher.architecture["labels"]:
            raise RecipeError("student.labels: expected the teacher's labels, found others. Leave labels out.")
        size = student.image_size or (teacher.preprocess.size if teacher else None)
        architecture = student.architecture(size, labels)
        model = self._model(self.build(architecture, seed), architecture)
        if teacher is None:
            return model
        return replace(model, preprocess=teacher.preprocess.model_copy(update={"size": model.preprocess.size}))

    def load_pretrained(self, name: str, checkpoint: str | None, where: str, which: Which | None = None) -> Model:
        import timm

        vit.check_name(name, where)
        if which is not None:
            raise RecipeError(
                f"{where}.weights: it is not used with a classifier, whose raw weights are read. Leave it out."
            )
        if checkpoint is None:
            raise RecipeError(f"{where}: model '{name}' requires 'checkpoint': a file with timm weights, or 'random'.")
        architecture = {"timm_model": name, "sizes": {}, "labels": list(read_classes(Path("imagenet")).names)}
        module = vit.build_stock(architecture, seed=0)
        if checkpoint != "random":
            try:
                timm.models.load_checkpoint(module, checkpoint, use_ema=False, weights_only=True)
            except (RuntimeError, OSError, ValueError, KeyError, EOFError, UnpicklingError) as error:
                raise ArtifactError(
                    f"Checkpoint '{checkpoint}' cannot be loaded into {name}: {first_line(error)}"
                ) from None
        return self._model(surgery.use_own_attention(module).eval(), architecture)

    def _model(self, module: nn.Module, architecture: dict[str, Any]) -> Model:
        """Put a module together with the preprocessing that timm gives its name."""
        import timm

        height, _ = anatomy.image_size(module)
        preprocess = Preprocess(size=height)
        if architecture["timm_model"] != vit.OWN:
            data = timm.data.resolve_data_config({}, model=module)
            preprocess = preprocess_from_open_clip({**data, "size": height})
        return Model(module, architecture, preprocess, None, task=self.name)

    def graphs(self, model: Model) -> dict[str, Graph]:
        size = model.preprocess.size
        pixels = Input(name="pixel_values", dtype="float32", shape=(3, size, size))
        logits = Output(name="logits", shape=(len(model.architecture["labels"]),))
        return {"image": Graph(name="image", inputs=(pixels,), outputs=(logits,), agrees="logits")}

    def call(self, module: nn.Module, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": module(inputs["pixel_values"])}

    def inputs_of(self, arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"image": {"pixel_values": arrays["pixels"]}}

    def cached_rows(self, module: nn.Module, name: str, rows: Tensor) -> Tensor:
        return module(rows)

    def samples(self, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None) -> dict[str, Arrays]:
        return {"image": {"pixel_values": np.concatenate(sample_images(sets, preprocess))}}

    def evaluate(
        self, run: Mapping[str, Run], sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None
    ) -> dict[str, Outcomes]:
        results: dict[str, Outcomes] = {}
        for one in sets:
            if one.classes is None:
                raise RecipeError(
                    f"data: {one.name} has no classes. Evaluating a classifier requires labeled images; use data with labels."
                )
            batches = one.pixel_batches(preprocess)
            logits = np.concatenate([run["image"]({"pixel_values": pixels})["logits"] for pixels in batches])
            if logits.shape[1] != len(one.classes.names):
                raise RecipeError(
                    f"data: expected the model's {logits.shape[1]} classes, found {len(one.classes.names)} in {one.name}."
                )
            found = score_logits(logits, one.labels(), one.seen)
            results |= {f"{one.name}/{metric}": outcomes for metric, outcomes in found.items()}
        return results

    def lesson(self, job: TrainingJob) -> ClassifierLesson:
        return ClassifierLesson(job)

    def describe(self, model: Model) -> dict[str, Any]:
        return {"labels": tuple(model.architecture["labels"])}


class Classifier(TrainingModule):
    """The forward pass of a training step."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Classify images [B, 3, S, S]. Returns logits [B, C], and token features if they are hooked."""
        return {"logits": self.model(pixels).float()} | self.take_tokens()


class ClassifierLesson(Lesson):
    """Supervised training on labels, and distillation of logits and token features."""

    def __init__(self, job: TrainingJob) -> None:
        self.needs, self.learning = job.needs, ("image",)
        self.tokens = self.learning if "tokens" in job.needs else ()
        self.num_classes = len(job.student.architecture["labels"])
        for teacher in job.teachers:
            job.refuse_other_inputs(teacher)
            job.refuse_other_labels(teacher)
        if "labels" in job.needs:
            _refuse_unlabelled(job)
        if not job.sources_have("images"):
            raise RecipeError(f"{job.title}: a classifier requires images, but the training data has none.")
        self.sizes = job.sizes(lambda model: len(model.architecture["labels"]), self.learning)

    def module(self, module: nn.Module) -> Classifier:
        return Classifier(module, self.tokens)

    def inputs(self, arrays: Mapping[str, Tensor], mask: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
        return {"pixels": arrays["pixels"]}

    def cached_outputs(self, arrays: Mapping[str, Tensor], teacher: int, scale: float | None) -> Outputs:
        return {"logits": arrays[f"teacher_image_{teacher}"] * arrays[f"teacher_image_norm_{teacher}"][:, None]}

    def batch(
        self,
        outputs: Outputs,
        teachers: Sequence[Outputs],
        arrays: Mapping[str, Tensor],
        projections: Mapping[str, nn.Module],
        gather: Gather,
    ) -> Batch:
        # All sources have the same classes, but the loader numbers them consecutively across sources.
        labels = torch.where(arrays["label"] < 0, arrays["label"], arrays["label"] % self.num_classes)
        mixing = {}
        if "share" in arrays:
            others = arrays["other_label"]
            others = torch.where(others < 0, others, others % self.num_classes)
            mixing = {"other_labels": gather.own(others), "shares": gather.own(arrays["share"])}
        return Batch(
            features_of_logits(outputs, gather),
            tuple(features_of_logits(one, gather) for one in teachers),
            groups=gather.rows(arrays["group"]),
            labels=gather.own(labels),
            all_labels=gather.rows(labels),
            sides=self.learning,
            **mixing,
        )


def _refuse_unlabelled(job: TrainingJob) -> None:
    for source in job.sources:
        if getattr(source, "classes", None) is None:
            raise RecipeError(
                f"{job.title}: losses on labels require labeled images, but {source.name} has no classes. Use labeled data, "
                "or losses such as logits."
            )
        job.refuse_other_classes(source)
