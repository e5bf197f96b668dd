"""Whether a statement about two images is true (NLVR2), by BLIP: graphs `image` -> states, `reason` -> logits; accuracy.

task: nlvr
student: {width: 64, layers: 4, heads: 4, patch_size: 8, image_size: 32, text_width: 64, text_layers: 2, text_heads: 4,
          vocabulary: {format: statements}}

Class 1 means true. Images are evaluated in the order of the file. Published models come from `clipress import`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from clipress.data.transforms import Preprocess
from clipress.errors import RecipeError
from clipress.metrics.blip import IMAGE, LOGITS, OTHER_STATES, STATES, TEXT, in_batches, judge
from clipress.metrics.classify import score_logits
from clipress.metrics.outcomes import Outcomes
from clipress.models import blip
from clipress.models.load import Model
from clipress.runtime.graph import Arrays, Graph, Output, Run
from clipress.tasks import SAMPLES, TASKS, Tokenize, default_losses, sample_images, sample_texts
from clipress.tasks.blip import (
    FORWARD,
    BlipLesson,
    BlipTask,
    batches_of,
    image_inputs,
    text_input,
)
from clipress.tasks.training import Batch, Gather, Outputs, TrainingJob, TrainingModule, features_of_logits

if TYPE_CHECKING:
    from clipress.data.eval_sets import EvalSet


@TASKS.register("nlvr")
class Nlvr(BlipTask):
    """A BLIP that judges statements about two images."""

    name = "nlvr"
    towers = (IMAGE, TEXT)
    figures = ("/accuracy",)
    provides = frozenset({"teacher", "labels", "space", "logits", "tokens"})
    stage_defaults = default_losses(["classification"], quantize=["logits"])

    def graphs(self, model: Model) -> dict[str, Graph]:
        pixels, states = image_inputs(model)
        ids = text_input(model, model.architecture["context_length"])
        other = states.model_copy(update={"name": OTHER_STATES})
        reads = (ids, states.as_input(), other.as_input())
        return {
            IMAGE: Graph(name=IMAGE, inputs=(pixels,), outputs=(states,)),
            "reason": Graph(name="reason", inputs=reads, outputs=(Output(name=LOGITS, shape=(2,)),), agrees="logits"),
        }

    def graphs_of_tower(self, tower: str) -> tuple[str, ...]:
        return (IMAGE,) if tower == IMAGE else ("reason",)

    def call(self, module: nn.Module, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if graph == IMAGE:
            return {STATES: module.image(inputs["pixel_values"])}
        if graph == FORWARD:
            return {LOGITS: _forward(module, **inputs)}
        ids = inputs["input_ids"]
        return {LOGITS: module.reason(ids, ids != blip.PAD, inputs[STATES], inputs[OTHER_STATES])}

    def inputs_of(self, arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {FORWARD: _inputs(arrays)} if "other_pixels" in arrays else {}

    def samples(self, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None) -> dict[str, Arrays]:
        for one in sets:
            one.require_pairs()
        first = sample_images(sets, preprocess)
        second = [next(one.pixel_batches(preprocess, SAMPLES, others=True)) for one in sets]
        ids = tokenize(sample_texts(sets, first))
        return {IMAGE: {"pixel_values": np.concatenate(first + second)}, "reason": {"input_ids": ids}}

    def completed(self, samples: Mapping[str, Arrays], run: Mapping[str, Run]) -> dict[str, Arrays]:
        first, second = np.split(in_batches(run[IMAGE], samples[IMAGE])[STATES], 2)
        return {**samples, "reason": {**samples["reason"], STATES: first, OTHER_STATES: second}}

    def evaluate(
        self, run: Mapping[str, Run], sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None
    ) -> dict[str, Outcomes]:
        results: dict[str, Outcomes] = {}
        for one in sets:
            one.require_pairs()
            logits = logits_of(run, one, preprocess, tokenize)
            results[f"{one.name}/accuracy"] = score_logits(logits, one.labels())["top1"]
        return results

    def lesson(self, job: TrainingJob) -> NlvrLesson:
        return NlvrLesson(job)


def logits_of(run: Mapping[str, Run], one: EvalSet, preprocess: Preprocess, tokenize: Tokenize) -> np.ndarray:
    """Return the logits [N, 2] of every statement of a set."""
    ids = tokenize(one.first_texts(len(one.source)))
    pairs = zip(batches_of(one, preprocess), batches_of(one, preprocess, others=True), strict=True)
    return np.concatenate([judge(run, first, second, ids[places]) for (places, first), (_, second) in pairs])


def _inputs(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: arrays[name] for name in ("pixels", "other_pixels", "ids")}


def _forward(model: nn.Module, pixels: Tensor, other_pixels: Tensor, ids: Tensor) -> Tensor:
    return model(torch.cat([pixels, other_pixels]), ids, ids != blip.PAD)


class NlvrModule(TrainingModule):
    """The forward pass of a training step."""

    def forward(self, pixels: Tensor, other_pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Judge statements [B, L] about pairs of images [B, 3, S, S]. Returns logits [B, 2], and token features if they are hooked."""
        return {"logits": _forward(self.model, pixels, other_pixels, ids).float()} | self.take_tokens()


class NlvrLesson(BlipLesson):
    """Supervised training on statements, and distillation of logits and token features."""

    def __init__(self, job: TrainingJob) -> None:
        super().__init__(job)
        for source in job.sources:
            if not getattr(source, "has_pairs", False):
                raise RecipeError(
                    f"{job.title}: expected statements about pairs of images, but {source.name} has no pairs. Use data of the format nlvr2."
                )
        self.sizes = job.sizes(lambda model: 2, self.learning)

    def module(self, module: nn.Module) -> NlvrModule:
        return NlvrModule(module, self.tokens)

    def inputs(self, arrays: Mapping[str, Tensor], mask: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
        return _inputs(arrays)

    def batch(
        self,
        outputs: Outputs,
        teachers: Sequence[Outputs],
        arrays: Mapping[str, Tensor],
        projections: Mapping[str, nn.Module],
        gather: Gather,
    ) -> Batch:
        return Batch(
            features_of_logits(outputs, gather),
            tuple(features_of_logits(one, gather) for one in teachers),
            groups=gather.rows(arrays["group"]),
            labels=gather.own(arrays["label"]),
            all_labels=gather.rows(arrays["label"]),
            sides=self.learning,
        )
