"""Answers to questions about images, by BLIP: graphs `image` -> states, `question` -> states, `answer` -> scores; VQA accuracy.

task: vqa
student: {width: 64, layers: 4, heads: 4, patch_size: 8, image_size: 32, text_width: 64, text_layers: 2, text_heads: 4,
          context_length: 16, answer_length: 4, vocabulary: {format: questions}}

Answers are chosen from the list of the data, or written with `beam_search`. Published models come from `clipress import`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.data.transforms import Preprocess
from clipress.errors import RecipeError
from clipress.metrics.blip import (
    IMAGE,
    LIKELIHOODS,
    LOGITS,
    MASK,
    QUESTION,
    STATES,
    TEXT,
    Questions,
    in_batches,
    mask_of,
)
from clipress.metrics.outcomes import Outcomes
from clipress.metrics.vqa import score_answers
from clipress.models import blip
from clipress.models.load import Model
from clipress.runtime.graph import Arrays, Graph, Input, Output, Run
from clipress.tasks import TASKS, Tokenize, sample_images, sample_texts
from clipress.tasks.blip import (
    FORWARD,
    batches_of,
    image_inputs,
    pieces_of,
    text_input,
)
from clipress.tasks.blip_text import BlipText, WritingLesson, next_tokens
from clipress.tasks.training import Gather, TrainingJob, TrainingModule

if TYPE_CHECKING:
    from clipress.data.eval_sets import EvalSet


@TASKS.register("vqa")
class Vqa(BlipText):
    """A BLIP that answers questions.

    The states of a question have a row for every id that it may have, zeros at padding, and its mask says which of them count. `answer` gives the scores
    of the token behind an answer's last id, and the log-likelihood of the whole answer, smoothed as in training.
    """

    name = "vqa"
    towers = (IMAGE, "question", "answer")
    figures = ("/accuracy",)

    def graphs(self, model: Model) -> dict[str, Graph]:
        pixels, states = image_inputs(model)
        sizes = model.architecture
        longest, text = sizes["context_length"], sizes[TEXT]
        question = Output(name=QUESTION, shape=(longest, text["width"]))
        mask = Input(name=MASK, dtype="int64", shape=(longest,))
        scores = Output(name=LOGITS, shape=(text["vocabulary"],)), Output(name=LIKELIHOODS, shape=())
        ids, answer = text_input(model, longest), text_input(model, sizes["answer_length"])
        return {
            IMAGE: Graph(name=IMAGE, inputs=(pixels,), outputs=(states,)),
            "question": Graph(name="question", inputs=(ids, states.as_input()), outputs=(question,)),
            "answer": Graph(name="answer", inputs=(answer, question.as_input(), mask), outputs=scores, agrees="logits"),
        }

    def call(self, module: nn.Module, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if graph == FORWARD:
            return {LOGITS: _forward(module, **inputs)}
        if graph == IMAGE:
            return {STATES: module.image(inputs["pixel_values"])}
        ids = inputs["input_ids"]
        mask = (ids != blip.PAD).long()
        if graph == "question":
            states = module.question(ids, mask, inputs[STATES]) * mask[..., None]
            longest = (
                module.context_length,
                *module.text_encoder.norm.normalized_shape,
            )  # numbers, also while it is traced
            padded = F.pad(states, (0, 0, 0, longest[0] - ids.shape[1]))
            return {QUESTION: padded.reshape(-1, *longest)}  # which says to a file how long it is
        logits = module.decode(ids, mask, inputs[QUESTION], inputs[MASK])
        last = (mask.sum(1) - 1).clamp(min=0)[:, None, None].expand(-1, -1, logits.shape[-1])
        longer = F.pad(logits, (0, 0, 0, 1)), F.pad(ids, (0, 1)), F.pad(mask, (0, 1))  # one id alone has no next one
        likelihoods = blip.token_likelihoods(*longer, blip.SMOOTHING).sum(1)
        return {LOGITS: logits.gather(1, last)[:, 0], LIKELIHOODS: likelihoods}

    def inputs_of(self, arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {FORWARD: _inputs(arrays)} if "answers" in arrays else {}

    def samples(self, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None) -> dict[str, Arrays]:
        for one in sets:
            _refuse_without_answers(one)
        parts = sample_images(sets, preprocess)
        ids = tokenize(sample_texts(sets, parts))
        answers = [given[0] for one, taken in zip(sets, parts, strict=True) for given in one.answers(len(taken))]
        return {
            IMAGE: {"pixel_values": np.concatenate(parts)},
            "question": {"input_ids": ids},
            "answer": {"input_ids": pieces_of(tokenize)(answers), MASK: mask_of(ids, blip.PAD)},
        }

    def completed(self, samples: Mapping[str, Arrays], run: Mapping[str, Run]) -> dict[str, Arrays]:
        question = {**samples["question"], **in_batches(run[IMAGE], samples[IMAGE])}
        answer = {**samples["answer"], **in_batches(run["question"], question)}
        return {**samples, "question": question, "answer": answer}

    def evaluate(
        self, run: Mapping[str, Run], sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None
    ) -> dict[str, Outcomes]:
        results: dict[str, Outcomes] = {}
        for one in sets:
            _refuse_without_answers(one)
            answers = answers_of(run, one, preprocess, tokenize)
            found = score_answers(answers, one.answers(), one.groups())
            results |= {f"{one.name}/{metric}": outcomes for metric, outcomes in found.items()}
        return results

    def lesson(self, job: TrainingJob) -> VqaLesson:
        return VqaLesson(job)


def _refuse_without_answers(one: EvalSet) -> None:
    if not getattr(one.source, "has_answers", False):
        raise RecipeError(
            f"data: {one.name} has no answers. Evaluating answers requires them; use questions with answers."
        )


def answers_of(run: Mapping[str, Run], one: EvalSet, preprocess: Preprocess, tokenize: Tokenize) -> list[str]:
    """Return an answer to every question of a set: the likeliest of its candidates, or one that is written."""
    pieces, candidates = pieces_of(tokenize), getattr(one.source, "candidates", None)
    if candidates is None and one.beam_search is None:
        raise RecipeError(
            f"data: {one.name} has no list of answers to choose from. Set 'answers' to one, or 'beam_search' to write answers."
        )
    ids = tokenize(one.first_texts(len(one.source)))
    found = []
    for places, pixels in batches_of(one, preprocess):
        asked = Questions(run, pixels, ids[places], pieces)
        search = one.beam_search
        if search is None:
            found += asked.chosen(candidates, one.candidates)
        else:
            found += asked.written(search.beams, search.shortest, search.longest)
    return found


def _inputs(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: arrays[name] for name in ("pixels", "ids", "answers", "owner")}


def _forward(model: nn.Module, pixels: Tensor, ids: Tensor, answers: Tensor, owner: Tensor) -> Tensor:
    return model(pixels, ids, (ids != blip.PAD).long(), answers, (answers != blip.PAD).long(), owner)


class VqaModule(TrainingModule):
    """The forward pass of a training step."""

    def forward(self, pixels: Tensor, ids: Tensor, answers: Tensor, owner: Tensor) -> dict[str, Tensor]:
        """Return the logits behind every token of answers [A, L, V]; `owner` [A] says whose question each one answers."""
        return {"logits": _forward(self.model, pixels, ids, answers, owner).float()} | self.take_tokens()


class VqaLesson(WritingLesson):
    """Training on answers: each counts by the share of people who gave it, its tokens added up, per question."""

    def __init__(self, job: TrainingJob) -> None:
        super().__init__(job)
        if not all(getattr(source, "has_answers", False) for source in job.sources):
            raise RecipeError(
                f"{job.title}: expected answers to the questions, found data without. Use data with answers."
            )

    def module(self, module: nn.Module) -> VqaModule:
        return VqaModule(module, self.tokens)

    def inputs(self, arrays: Mapping[str, Tensor], mask: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
        return _inputs(arrays)

    def words(self, arrays: Mapping[str, Tensor], gather: Gather) -> tuple[Tensor, Tensor]:
        weights = arrays["answer_weight"][:, None] / len(arrays["ids"])
        return arrays["answers"], next_tokens(arrays["answers"]) * weights
