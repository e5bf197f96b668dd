"""Captions by BLIP: graphs `image` -> states, `memory` -> keys and values of all layers, `decode` -> the next token; CIDEr and BLEU-4.

task: caption
student: {width: 64, layers: 4, heads: 4, patch_size: 8, image_size: 32, text_width: 64, text_layers: 2, text_heads: 4,
          vocabulary: {format: scenes}}

Published models come from `clipress import`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from clipress.data.spec import BeamSearch
from clipress.data.transforms import Preprocess
from clipress.data.word_pieces import WordPieces
from clipress.metrics.blip import IMAGE, LOGITS, MEMORY, STATES, TEXT, in_batches, write_captions
from clipress.metrics.caption import score_captions
from clipress.metrics.outcomes import Outcomes
from clipress.models import blip
from clipress.models.load import Model
from clipress.runtime.graph import Arrays, Graph, Output, Run
from clipress.tasks import TASKS, Tokenize, sample_images, sample_texts
from clipress.tasks.blip import (
    FORWARD,
    batches_of,
    image_inputs,
    pieces_of,
    text_input,
    vocabulary_size,
)
from clipress.tasks.blip_text import BlipText, WritingLesson, next_tokens
from clipress.tasks.training import Gather, TrainingJob, TrainingModule

if TYPE_CHECKING:
    from clipress.data.eval_sets import EvalSet

SAMPLE_IDS = 8  # at most, of texts whose next token is compared


@TASKS.register("caption")
class Caption(BlipText):
    """A BLIP that writes captions."""

    name = "caption"
    towers = (IMAGE, TEXT)
    figures = ("/cider",)
    figures_unit = ""
    has_prompt = True

    def graphs(self, model: Model) -> dict[str, Graph]:
        pixels, states = image_inputs(model)
        pairs = [(layer.cross[0].k, layer.cross[0].v) for layer in model.module.text_decoder.layers]
        width = sum(linear.out_features for pair in pairs for linear in pair)
        memory = Output(name=MEMORY, shape=(states.shape[0], width))
        ids = text_input(model, model.architecture["context_length"])
        logits = Output(name=LOGITS, shape=(vocabulary_size(model),))
        return {
            IMAGE: Graph(name=IMAGE, inputs=(pixels,), outputs=(states,)),
            "memory": Graph(name="memory", inputs=(states.as_input(),), outputs=(memory,)),
            "decode": Graph(name="decode", inputs=(ids, memory.as_input()), outputs=(logits,), agrees="logits"),
        }

    def graphs_of_tower(self, tower: str) -> tuple[str, ...]:
        return {IMAGE: (IMAGE,), TEXT: ("memory", "decode")}[tower]

    def call(self, module: nn.Module, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if graph == FORWARD:
            return {LOGITS: module(inputs["pixel_values"], inputs["input_ids"], inputs["input_ids"] != blip.PAD)}
        if graph == IMAGE:
            return {STATES: module.image(inputs["pixel_values"])}
        if graph == "memory":
            return {MEMORY: module.memory(inputs[STATES])}
        return {LOGITS: module.decode(inputs["input_ids"], None, inputs[MEMORY], last=True)[:, 0]}

    def inputs_of(self, arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {FORWARD: {"pixel_values": arrays["pixels"], "input_ids": arrays["ids"]}}

    def samples(self, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None) -> dict[str, Arrays]:
        parts = sample_images(sets, preprocess)
        ids = tokenize(sample_texts(sets, parts))
        length = min(SAMPLE_IDS, int((ids != blip.PAD).sum(1).min()))  # of one length, as the texts of a search are
        return {IMAGE: {"pixel_values": np.concatenate(parts)}, "decode": {"input_ids": ids[:, :length]}}

    def completed(self, samples: Mapping[str, Arrays], run: Mapping[str, Run]) -> dict[str, Arrays]:
        states = in_batches(run[IMAGE], samples[IMAGE])
        return {**samples, "memory": states, "decode": {**samples["decode"], **in_batches(run["memory"], states)}}

    def evaluate(
        self, run: Mapping[str, Run], sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None
    ) -> dict[str, Outcomes]:
        results: dict[str, Outcomes] = {}
        for one in sets:
            references = one.captions()
            found = captions_of(run, one, preprocess, pieces_of(tokenize))
            results |= {f"{one.name}/{name}": scores for name, scores in score_captions(found, references).items()}
        return results

    def lesson(self, job: TrainingJob) -> CaptionLesson:
        return CaptionLesson(job)


def captions_of(run: Mapping[str, Run], one: EvalSet, preprocess: Preprocess, pieces: WordPieces) -> list[str]:
    """Write a caption of every image of a set."""
    search = one.beam_search or BeamSearch()
    limits = search.beams, search.shortest, search.longest
    return [text for _, pixels in batches_of(one, preprocess) for text in write_captions(run, pixels, pieces, *limits)]


class CaptionModule(TrainingModule):
    """The forward pass of a training step."""

    def forward(self, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Return the logits behind every token of captions [B, L, V]."""
        return {"logits": self.model(pixels, ids, ids != blip.PAD).float()} | self.take_tokens()


class CaptionLesson(WritingLesson):
    """Training on captions: every token but the prompt's counts alike."""

    def __init__(self, job: TrainingJob) -> None:
        super().__init__(job)
        self.begins = len(WordPieces(job.student.tokenizer).begun())

    def module(self, module: nn.Module) -> CaptionModule:
        return CaptionModule(module, self.tokens)

    def inputs(self, arrays: Mapping[str, Tensor], mask: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
        return {"pixels": arrays["pixels"], "ids": arrays["ids"]}

    def words(self, arrays: Mapping[str, Tensor], gather: Gather) -> tuple[Tensor, Tensor]:
        kept = next_tokens(arrays["ids"], self.begins)
        counts = gather.rows(kept.sum()[None]).to(torch.float32)  # of every process, whose losses are averaged
        return arrays["ids"], kept / counts.mean().clamp(min=1)
