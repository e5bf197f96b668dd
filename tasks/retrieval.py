"""Retrieval by BLIP: graphs `image` -> embeddings and states, `text` -> embeddings, `match` -> logits of a pair; recall with re-ranking.

task: retrieval
student: {width: 64, layers: 4, heads: 4, patch_size: 8, image_size: 32, text_width: 64, text_layers: 2, text_heads: 4,
          embed_dim: 64, vocabulary: {format: scenes}}

`image` and `text` search as a CLIP's do; `match` reads the texts and images that are nearest again, together. Published models come
from `clipress import`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.data.transforms import Preprocess
from clipress.metrics.blip import IMAGE, LOGITS, STATES, TEXT, in_batches
from clipress.metrics.evaluate import encode_ids, evaluate_items, ids_of
from clipress.metrics.outcomes import Outcomes
from clipress.metrics.rerank import reranked
from clipress.models import blip
from clipress.models.load import Model
from clipress.models.owners import owned
from clipress.runtime.graph import Arrays, Graph, Output, Run
from clipress.tasks import TASKS, Tokenize, default_losses, sample_images, sample_texts
from clipress.tasks.blip import (
    FORWARD,
    BlipTask,
    batches_of,
    image_inputs,
    refuse_other_data,
    text_input,
)
from clipress.tasks.clip import ARRAYS, OUTPUTS, SIDES, ClipLesson, encoder
from clipress.tasks.training import Batch, Gather, Outputs, TrainingJob, TrainingModule

if TYPE_CHECKING:
    from clipress.data.eval_sets import EvalSet

MATCH = "match"
LEAST, MOST = 0.001, 0.5  # BLIP's clamp of the temperature


@TASKS.register("retrieval")
class Retrieval(BlipTask):
    """A BLIP that finds texts for images and images for texts."""

    name = "retrieval"
    towers = SIDES
    figures = ("/top1", "/text_r1", "/image_r1")
    provides = frozenset(
        {"pairs", "teacher", "space", "width", "keys", "momentum", "tokens", "matches", "matches_of_all"}
    )
    stage_defaults = default_losses(["contrastive", "matching"], quantize=["contrastive", "matching"])

    def graphs(self, model: Model) -> dict[str, Graph]:
        pixels, states = image_inputs(model)
        ids = text_input(model, model.architecture["context_length"])
        image, text = (Output(name=OUTPUTS[side], shape=(model.architecture["embed_dim"],)) for side in SIDES)
        pair = Output(name=LOGITS, shape=(2,))
        return {
            IMAGE: Graph(name=IMAGE, inputs=(pixels,), outputs=(image, states)),
            TEXT: Graph(name=TEXT, inputs=(ids,), outputs=(text,)),
            MATCH: Graph(name=MATCH, inputs=(ids, states.as_input()), outputs=(pair,), agrees="logits"),
        }

    def graphs_of_tower(self, tower: str) -> tuple[str, ...]:
        return (IMAGE,) if tower == IMAGE else (TEXT, MATCH)

    def call(self, module: nn.Module, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if graph == FORWARD:  # a pair belongs together with a probability, which is as large as embeddings are
            ids = inputs["input_ids"]
            *embeds, logits = module(inputs["pixel_values"], ids, ids != blip.PAD)
            return {"rows": torch.cat([*embeds, logits.softmax(-1)], -1)}
        if graph == IMAGE:
            states = module.image(inputs["pixel_values"])
            return {OUTPUTS[IMAGE]: module.image_embeds(states), STATES: states}
        ids = inputs["input_ids"]
        if graph == TEXT:
            return {OUTPUTS[TEXT]: module.text_embeds(ids, ids != blip.PAD)}
        return {LOGITS: module.match(ids, ids != blip.PAD, inputs[STATES])}

    def inputs_of(self, arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {FORWARD: {"pixel_values": arrays["pixels"], "input_ids": arrays["ids"]}}

    def cached_rows(self, module: nn.Module, name: str, rows: Tensor) -> Tensor:
        if name == ARRAYS[IMAGE]:
            return module.image_features(module.image(rows))
        return module.text_features(rows, rows != blip.PAD)

    def samples(self, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None) -> dict[str, Arrays]:
        pixels = sample_images(sets, preprocess)
        ids = {"input_ids": tokenize(sample_texts(sets, pixels))}
        return {IMAGE: {"pixel_values": np.concatenate(pixels)}, TEXT: ids, MATCH: ids}

    def completed(self, samples: Mapping[str, Arrays], run: Mapping[str, Run]) -> dict[str, Arrays]:
        states = in_batches(run[IMAGE], samples[IMAGE])[STATES]
        return {**samples, MATCH: {**samples[MATCH], STATES: states}}

    def evaluate(
        self, run: Mapping[str, Run], sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None
    ) -> dict[str, Outcomes]:
        results: dict[str, Outcomes] = {}
        for one in sets:
            if one.classes is not None:
                results |= evaluate_items(*(encoder(run, side) for side in SIDES), [one], preprocess, tokenize)
            else:
                found = reranked_recalls(run, one, preprocess, tokenize)
                results |= {f"{one.name}/{metric}": outcomes for metric, outcomes in found.items()}
        return results

    def lesson(self, job: TrainingJob) -> RetrievalLesson:
        return RetrievalLesson(job)

    def describe(self, model: Model) -> dict[str, Any]:
        scale = 1 / float(model.module.temp.detach())
        return {"embed_dim": model.architecture["embed_dim"], "logit_scale": scale, "logit_bias": None}


def reranked_recalls(
    run: Mapping[str, Run], one: EvalSet, preprocess: Preprocess, tokenize: Tokenize
) -> dict[str, Outcomes]:
    """Return the recalls of a set, whose `candidates` nearest items are scored again as pairs.

    The states of all its images are held in memory: 1.8 MB per image at 384 pixels.
    """
    captions, owner = one.texts()
    seen = [run[IMAGE]({"pixel_values": pixels}) for _, pixels in batches_of(one, preprocess)]
    images, states = (np.concatenate([found[name] for found in seen]) for name in (OUTPUTS[IMAGE], STATES))
    ids, rows = ids_of(tokenize, captions)
    texts = encode_ids(encoder(run, TEXT), ids)[rows]

    def match(image: np.ndarray, text: np.ndarray) -> np.ndarray:
        return in_batches(run[MATCH], {"input_ids": ids[rows[text]], STATES: states[image]})[LOGITS][:, 1]

    return reranked(images, texts, owner, match, one.candidates)


class RetrievalModule(TrainingModule):
    """The forward pass of a training step: both embeddings, and the scores of right and wrong pairs."""

    def __init__(
        self, model: nn.Module, towers: Sequence[str], matches: bool, rows_of_all: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__(model, towers)
        self.matches, self.rows_of_all = matches, rows_of_all

    def forward(self, pixels: Tensor, ids: Tensor, group: Tensor) -> dict[str, Tensor]:
        """Return raw embeddings [B, D] per side, hooked tokens, `scale`, and with `matches` the logits [B, 3, 2] of three pairs per row.

        `group` [B]: pairs of the same group belong together.
        """
        model, mask = self.model, ids != blip.PAD
        states = model.image(pixels)
        found = {"scale": (1 / model.temp).reshape(()).float()}
        found |= {IMAGE: model.image_features(states).float(), TEXT: model.text_features(ids, mask).float()}
        found |= self.take_tokens()
        if self.matches:
            found |= self._matched(states, ids, found, group)
            self.take_tokens()  # losses compare those of texts that are read alone
        return found

    def _matched(self, states: Tensor, ids: Tensor, found: Mapping[str, Tensor], group: Tensor) -> dict[str, Tensor]:
        gather = self.rows_of_all or (lambda rows: rows)
        if self.rows_of_all is not None:  # batches of other processes may be padded to other lengths
            ids = F.pad(ids, (0, self.model.context_length - ids.shape[1]), value=blip.PAD)
        with torch.no_grad():
            image, text = (F.normalize(found[side], dim=-1) for side in SIDES)
            all_image, all_text, all_ids, same = (
                gather(image),
                gather(text),
                gather(ids),
                group[:, None] == gather(group),
            )
            texts = drawn(found["scale"] * image @ all_text.T, same)
            images = drawn(found["scale"] * text @ all_image.T, same)
        rows = torch.arange(len(ids), device=ids.device)
        read = torch.cat([ids, all_ids[texts], ids])
        seen = torch.cat([states, states, gather(states)[images]])
        with owned(rows.repeat(3), len(rows)):
            logits = self.model.match(read, read != blip.PAD, seen)
        weights = (~same).any(1).float()
        return {
            "matches": logits.float().unflatten(0, (3, -1)).transpose(0, 1),
            "match_weights": torch.stack([torch.ones_like(weights), weights, weights], 1),
        }


def drawn(similarities: Tensor, same: Tensor) -> Tensor:
    """Draw one of the columns [B] that are not the same for every row of [B, N], likelier the more similar; any, if all are the same."""
    hidden = same & (~same).any(1, keepdim=True)
    return torch.multinomial(similarities.masked_fill(hidden, -torch.inf).softmax(1), 1)[:, 0]


class RetrievalLesson(ClipLesson):
    """Contrastive training and distillation, and matching of pairs."""

    queues_online = False  # BLIP's queue holds the momentum model's features

    def __init__(self, job: TrainingJob) -> None:
        refuse_other_data(job)
        super().__init__(job)

    def module(self, module: nn.Module) -> RetrievalModule:
        matches = module is self.job.student.module and "matches" in self.needs
        return RetrievalModule(
            module, self.tokens, matches, self.job.rows_of_all if "matches_of_all" in self.needs else None
        )

    def inputs(self, arrays: Mapping[str, Tensor], mask: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
        return {name: arrays[name] for name in ("pixels", "ids", "group")}

    def teacher_inputs(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.inputs(arrays, None)

    def batch(
        self,
        outputs: Outputs,
        teachers: Sequence[Outputs],
        arrays: Mapping[str, Tensor],
        projections: Mapping[str, nn.Module],
        gather: Gather,
    ) -> Batch:
        found = super().batch(outputs, teachers, arrays, projections, gather)
        if "matches" not in outputs:
            return found
        weights = outputs["match_weights"]
        return replace(
            found,
            student=replace(found.student, matches=gather.own(outputs["matches"])),
            match_weights=gather.own(weights),
            all_match_weights=gather.rows(weights),
        )

    @torch.no_grad()
    def keep_in_range(self, module: nn.Module) -> None:
        module.temp.clamp_(LEAST, MOST)
