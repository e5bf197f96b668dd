"""Contrastive image-text models: two towers, graphs `image` and `text`; retrieval and zero-shot classification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.errors import RecipeError
from clipress.metrics.evaluate import embed_classes, evaluate_items
from clipress.metrics.outcomes import Outcomes
from clipress.models import anatomy, students
from clipress.models.importers import model_named
from clipress.models.load import Model, build, refuse_absurd, save_for_open_clip
from clipress.models.text_length import text_end
from clipress.models.weights_file import Which
from clipress.runtime.graph import Arrays, Graph, Run, clip_graphs
from clipress.tasks import TASKS, Task, Tokenize, runs_of, sample_images, sample_texts, task_named
from clipress.tasks.training import Batch, Features, Gather, Lesson, Momentum, Outputs, TrainingJob, TrainingModule

if TYPE_CHECKING:
    from clipress.data.eval_sets import EvalSet
    from clipress.data.transforms import Preprocess

SIDES = ("image", "text")
MAX_LOG_SCALE = float(np.log(100))  # CLIP's clamp
ARRAYS = {"image": "pixels", "text": "ids"}  # names in a training batch
INPUTS = {"image": "pixel_values", "text": "input_ids"}
OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}


@TASKS.register("clip")
class Clip(Task):
    """CLIP and other models with an image and a text tower."""

    name = "clip"
    towers = SIDES
    main_graph = "image"
    reads_text = True
    figures = ("/top1", "/text_r1", "/image_r1")
    provides = frozenset({"pairs", "teacher", "space", "width", "keys", "momentum", "tokens", "masked", "labels"})

    def build(self, architecture: dict[str, Any], seed: int | None = None) -> nn.Module:
        refuse_absurd(architecture)
        return build(architecture, seed)

    def check_student(self, section: Mapping[str, Any], has_teacher: bool) -> None:
        students.check(section, has_teacher)

    def student_from(self, section: Mapping[str, Any], teacher: Model | None, seed: int) -> Model:
        return replace(students.student_from(section, teacher, seed), task=self.name)

    def load_pretrained(self, name: str, checkpoint: str | None, where: str, which: Which | None = None) -> Model:
        return replace(model_named(name, checkpoint, where, which), task=self.name)

    def towers_of_teacher(self, section: Mapping[str, Any] | None) -> tuple[str, ...]:
        return students.towers_of_teacher(section)

    def graphs(self, model: Model) -> dict[str, Graph]:
        return clip_graphs(
            model.preprocess.size,
            anatomy.context_length(model.module),
            int(model.architecture["embed_dim"]),
            text_end(model.module),
        )

    def call(self, module: nn.Module, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encode = module.encode_image if graph == "image" else module.encode_text
        return {OUTPUTS[graph]: encode(inputs[INPUTS[graph]], normalize=True)}

    def inputs_of(self, arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {side: {INPUTS[side]: arrays[name]} for side, name in ARRAYS.items() if name in arrays}

    def cached_rows(self, module: nn.Module, name: str, rows: Tensor) -> Tensor:
        encode = module.encode_image if name == ARRAYS["image"] else module.encode_text
        return encode(rows, normalize=False)

    def samples(self, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None) -> dict[str, Arrays]:
        pixels = sample_images(sets, preprocess)
        ids = tokenize(list(dict.fromkeys(sample_texts(sets, pixels))))
        return {"image": {INPUTS["image"]: np.concatenate(pixels)}, "text": {INPUTS["text"]: ids}}

    def evaluate(
        self, run: Mapping[str, Run], sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None
    ) -> dict[str, Outcomes]:
        return evaluate_items(*(encoder(run, side) for side in SIDES), sets, preprocess, tokenize)

    def needs(self, of_losses: frozenset[str]) -> frozenset[str]:
        # Classes are embedded prompts of the teacher.
        return of_losses | {"teacher", "classes"} if "labels" in of_losses else of_losses

    def lesson(self, job: TrainingJob) -> ClipLesson:
        return ClipLesson(job)

    def describe(self, model: Model) -> dict[str, Any]:
        bias = getattr(model.module, "logit_bias", None)
        return {
            "embed_dim": int(model.architecture["embed_dim"]),
            "logit_scale": float(model.module.logit_scale.detach().exp()),
            "logit_bias": None if bias is None else float(bias.detach()),
        }

    def save_for_library(self, model: Model, folder: Path) -> bool:
        return save_for_open_clip(model, folder)


def encoder(run: Mapping[str, Run], side: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return one graph as a function from input rows to embeddings [B, D]."""
    return lambda rows: run[side]({INPUTS[side]: rows})[OUTPUTS[side]]


def encoders(model: Model, what: str) -> tuple[Callable, Callable]:
    """Return (images, texts) -> embeddings, arrays in and out, unit length, that run in torch in evaluation mode.

    Raises RecipeError, which begins with `what` needs them, for a model of another task.
    """
    if not isinstance(task_named(model.task), Clip):
        raise RecipeError(
            f"{what}: expected a CLIP, found a {model.task} model, which does not embed images and texts. Choose a CLIP's "
            "artifact."
        )
    run = runs_of(model)
    return encoder(run, "image"), encoder(run, "text")


class EncoderPair(TrainingModule):
    """A single forward pass for both towers, so that DDP and FSDP see all parameters used."""

    def __init__(
        self, model: nn.Module, tokens: Sequence[str] = (), frozen: Sequence[str] = (), ids_of: Tensor | None = None
    ) -> None:
        super().__init__(model, tokens)
        self.frozen = tuple(frozen)
        self.register_buffer("ids_of", ids_of, persistent=False)  # the model's id of each of the batch's tokens

    def forward(
        self, pixels: Tensor | None = None, ids: Tensor | None = None, masked: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode the given inputs. Returns raw embeddings [B, D] per side, `masked`, hooked tokens, and `scale`."""
        outputs = {"scale": self.model.logit_scale.exp().reshape(())}
        if ids is not None and self.ids_of is not None:
            ids = self.ids_of[ids]
        encode = {"image": (self.model.encode_image, pixels), "text": (self.model.encode_text, ids)}
        for side, (encoder, inputs) in encode.items():
            if inputs is not None:
                with torch.no_grad() if side in self.frozen else nullcontext():
                    outputs[side] = encoder(inputs).float()
        outputs |= self.take_tokens()
        if masked is not None:
            outputs["masked"] = self.model.encode_image(masked).float()
            self.take_tokens()  # losses compare those of the whole images
        return outputs


class ClipLesson(Lesson):
    """Contrastive training and distillation of one or both towers."""

    queues_online = True  # as in UPop's code for CLIP

    def __init__(self, job: TrainingJob) -> None:
        for number, teacher in enumerate(job.teachers):
            job.refuse_other_inputs(teacher)
            if number == 0:
                _refuse_other_width(job, teacher)
        self.job, self.needs = job, job.needs
        self.learning = _learning(job)
        self.shown = SIDES if "pairs" in job.needs else self.learning
        self.shown_to_teachers = SIDES if {"pairs", "keys"} & job.needs else self.learning
        self.tokens = self.learning if "tokens" in job.needs else ()
        self.sizes = job.sizes(lambda model: model.architecture["embed_dim"], self.learning)
        self.classes = _classes(job) if "classes" in job.needs else None

    def module(self, module: nn.Module) -> EncoderPair:
        if module is self.job.student.module:
            return EncoderPair(module, self.tokens, [side for side in SIDES if side not in self.learning])
        teacher = next((one for one in self.job.teachers if one.module is module), None)
        return EncoderPair(module, self.tokens, ids_of=None if teacher is None else self.job.ids_for(teacher))

    def inputs(self, arrays: Mapping[str, Tensor], mask: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
        inputs = self._of(arrays, self.shown)
        if mask is not None and "image" in self.learning:
            inputs["masked"] = mask(arrays["pixels"])
        return inputs

    def teacher_inputs(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._of(arrays, self.shown_to_teachers)

    def _of(self, arrays: Mapping[str, Tensor], sides: Sequence[str]) -> dict[str, Tensor]:
        return {ARRAYS[side]: arrays[ARRAYS[side]] for side in sides}

    def cached_outputs(self, arrays: Mapping[str, Tensor], teacher: int, scale: float | None) -> Outputs:
        raw = {
            side: arrays[f"teacher_{side}_{teacher}"] * arrays[f"teacher_{side}_norm_{teacher}"][:, None]
            for side in SIDES
            if f"teacher_{side}_{teacher}" in arrays
        }
        return raw | {"scale": torch.full((), scale, device=arrays["group"].device)}

    def batch(
        self,
        outputs: Outputs,
        teachers: Sequence[Outputs],
        arrays: Mapping[str, Tensor],
        projections: Mapping[str, nn.Module],
        gather: Gather,
    ) -> Batch:
        projected = None
        if projections:
            own = {side: projections[side](outputs[side]) for side in self.learning}
            if "masked" in outputs:
                own["masked"] = projections["image"](outputs["masked"])
            projected = _features({**own, "scale": outputs["scale"]}, gather)
        groups = gather.rows(arrays["group"])
        if self.classes is not None:
            self.classes = self.classes.to(groups.device)  # copied by the first step only
        return Batch(
            _features(outputs, gather),
            tuple(_features(one, gather) for one in teachers),
            positives(gather.own(arrays["group"]), groups),
            groups,
            projected=projected,
            labels=gather.own(arrays["label"]),
            all_labels=gather.rows(arrays["label"]),
            classes=self.classes,
            sides=self.learning,
        )

    def momentum(
        self,
        outputs: Outputs,
        batch: Batch,
        arrays: Mapping[str, Tensor],
        past: Mapping[str, Tensor],
        gather: Gather,
        alpha: float,
    ) -> tuple[Momentum, dict[str, Tensor]]:
        features = _features(outputs, gather)
        groups = gather.rows(arrays["group"])
        new = {"image": features.all_image, "text": features.all_text, "group": groups}
        if batch.teachers:
            new |= {"teacher_image": batch.teacher.all_image, "teacher_text": batch.teacher.all_text}
        seen = {name: torch.cat([rows, past[name]]) if past else rows for name, rows in new.items()}
        result = Momentum(
            image=features.image,
            text=features.text,
            all_image=seen["image"],
            all_text=seen["text"],
            teacher_image=seen.get("teacher_image"),
            teacher_text=seen.get("teacher_text"),
            targets=positives(gather.own(arrays["group"]), seen["group"]),
            alpha=alpha,
        )
        if self.queues_online:
            new |= {"image": batch.student.all_image.detach(), "text": batch.student.all_text.detach()}
        return result, new

    @torch.no_grad()
    def keep_in_range(self, module: nn.Module) -> None:
        module.logit_scale.clamp_(0, MAX_LOG_SCALE)


def positives(groups: Tensor, all_groups: Tensor) -> Tensor:
    """Return the targets [B, N] of rows in `groups` [B] among `all_groups` [N]: uniform over the positives of a row."""
    same = (groups[:, None] == all_groups[None, :]).float()
    return same / same.sum(1, keepdim=True)


def _features(outputs: Outputs, gather: Gather) -> Features:
    """Normalize a model's outputs and gather them."""
    unit = {side: F.normalize(outputs[side], dim=-1) if side in outputs else None for side in SIDES}
    everyone = {side: None if rows is None else gather.rows(rows) for side, rows in unit.items()}
    own = unit if gather.local else everyone
    aside = {name: outputs.get(name) for name in (*SIDES, "masked")}
    aside = {name: None if rows is None else gather.own(rows) for name, rows in aside.items()}
    return Features(
        own["image"],
        own["text"],
        everyone["image"],
        everyone["text"],
        outputs["scale"],
        raw_image=aside["image"],
        raw_text=aside["text"],
        tokens=gather.own_tokens(outputs),
        masked_image=None if aside["masked"] is None else F.normalize(aside["masked"], dim=-1),
    )


def _learning(job: TrainingJob) -> tuple[str, ...]:
    """Return the towers to train: selected by `towers`, not copied from the teacher, and with training data."""
    has_data = {"image": job.sources_have("images"), "text": job.sources_have("texts")}
    lacking = [side for side in SIDES if not has_data[side]]
    if lacking and {"pairs", "keys"} & job.needs:
        raise RecipeError(
            f"{job.title}: its losses compare images with texts, but the training data has no {lacking[0]}s. Use losses for "
            "a single tower, such as feature, or data with both."
        )
    module = job.student.module
    trainable = [side for side in SIDES if any(p.requires_grad for p in anatomy.tower_parameters(module, side))]
    sides = tuple(side for side in trainable if job.towers in ("both", side) and has_data[side])
    if not sides:
        raise RecipeError(
            f"{job.title}: expected a tower to train, found none: 'towers' is {job.towers}, trainable towers are {trainable}, "
            f"the training data covers {[side for side in SIDES if has_data[side]]}. Change 'towers' or the data."
        )
    return sides


def _refuse_other_width(job: TrainingJob, teacher: Model) -> None:
    """Raise RecipeError if a loss requires the teacher's embedding width and the student has another."""
    widths = [model.architecture["embed_dim"] for model in (teacher, job.student)]
    if job.same_width and widths[0] != widths[1]:
        raise RecipeError(
            f"{job.title}: losses {sorted(job.same_width)} require the teacher's embedding width, {widths[0]}, found {widths[1]}. "
            "Set the student's embed_dim to it, or use affinity or feature."
        )


def _classes(job: TrainingJob) -> Tensor:
    """Return the teacher's text classifiers of all labeled sources, concatenated: unit rows [C, D]."""
    teacher = job.teachers[0]
    encode, found = encoder(runs_of(teacher), "text"), []
    for source in job.sources:
        if classes := getattr(source, "classes", None):
            found.append(embed_classes(encode, teacher.tokenize(), classes))
    if not found:
        raise RecipeError(
            f"{job.title}: losses on labels require classes, but no training source has any. Use labeled data."
        )
    return torch.from_numpy(np.concatenate(found)).float()
