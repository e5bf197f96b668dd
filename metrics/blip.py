"""What BLIPs say about images, through one callable per graph, whatever runs it: evaluation and prediction ask here.

caption     image -> states, memory -> keys and values of all layers, decode -> logits of the next token
vqa         image -> states, question -> its states, answer -> logits of the next token, log-likelihoods of whole answers
nlvr        image -> states, reason -> logits of a statement about two images; class 1 means true
retrieval   image -> embeddings and states, text -> embeddings, match -> logits of a pair; class 1: they belong together
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clipress.data.spec import BEAMS, CANDIDATES
from clipress.data.word_pieces import WordPieces
from clipress.metrics.beam import Step, beam_search
from clipress.metrics.rank_answers import likeliest_answers

IMAGE, TEXT = "image", "text"
STATES, OTHER_STATES, MEMORY = "image_states", "other_states", "image_memory"
QUESTION, MASK = "question_states", "question_mask"
LOGITS, LIKELIHOODS = "logits", "log_likelihoods"
CAPTIONS, ANSWERS = (5, 20), (1, 10)
"""Ids of the shortest and longest text that is written, as published: of captions with the prompt, of answers with [DEC]."""

IMAGES_AT_ONCE = 16  # in evaluation: the states of an image are 600 to 900 rows

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""A graph as a function from inputs to outputs by name, as in runtime/graph.py."""
Graphs = Mapping[str, Run]


def write_captions(
    graphs: Graphs,
    pixels: np.ndarray,
    pieces: WordPieces,
    beams: int = BEAMS,
    shortest: int | None = None,
    longest: int | None = None,
) -> list[str]:
    """Write a caption of every image [N, 3, S, S]; limits as for `beam_search`, None: as published."""
    memory = graphs["memory"](graphs[IMAGE]({"pixel_values": pixels}))[MEMORY]

    def step(ids: np.ndarray, images: np.ndarray) -> np.ndarray:
        return graphs["decode"]({"input_ids": ids, MEMORY: memory[images]})[LOGITS]

    return _written(step, len(pixels), pieces, beams, shortest or CAPTIONS[0], longest or CAPTIONS[1])


class Questions:
    """Questions about images, read beside them, and the graph that answers them.

    Args:
        pixels: the image of every question, [N, 3, S, S].
        ids: the questions, int64 [N, L], padded to the context length.
    """

    def __init__(self, graphs: Graphs, pixels: np.ndarray, ids: np.ndarray, pieces: WordPieces) -> None:
        self.run, self.pieces = graphs["answer"], pieces
        read = graphs["question"]({"input_ids": ids, **graphs[IMAGE]({"pixel_values": pixels})})
        self.inputs = {**read, MASK: mask_of(ids, pieces.pad)}

    def _asked(self, ids: np.ndarray, questions: np.ndarray) -> dict[str, np.ndarray]:
        return self.run({"input_ids": ids, **{name: rows[questions] for name, rows in self.inputs.items()}})

    def _next(self, ids: np.ndarray, questions: np.ndarray) -> np.ndarray:
        return self._asked(ids, questions)[LOGITS]

    def chosen(self, candidates: Sequence[str], k: int = CANDIDATES) -> list[str]:
        """Return the likeliest candidate for every question; `k` as for `likeliest_answers`, which raises DataError."""
        count = len(self.inputs[MASK])
        ids = self.pieces(candidates, first=self.pieces.decode)
        first = self._next(np.tile(self.pieces.begun(), (count, 1)), np.arange(count))

        def score(question: int, places: np.ndarray) -> np.ndarray:
            return self._asked(ids[places], np.full(len(places), question))[LIKELIHOODS]

        return [candidates[place] for place in likeliest_answers(first, ids, score, k)]

    def written(self, beams: int = BEAMS, shortest: int | None = None, longest: int | None = None) -> list[str]:
        """Write an answer to every question; limits as for `beam_search`, None: as published."""
        count = len(self.inputs[MASK])
        return _written(self._next, count, self.pieces, beams, shortest or ANSWERS[0], longest or ANSWERS[1])


def mask_of(ids: np.ndarray, pad: int) -> np.ndarray:
    """Return which ids of questions [N, L] are no padding, int64."""
    return (ids != pad).astype(np.int64)


def judge(graphs: Graphs, first: np.ndarray, second: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return logits [N, 2] of statements [N, L] about two images [N, 3, S, S] each; class 1 means true."""
    states, other = (graphs[IMAGE]({"pixel_values": pixels})[STATES] for pixels in (first, second))
    return graphs["reason"]({"input_ids": ids, STATES: states, OTHER_STATES: other})[LOGITS]


def in_batches(run: Run, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph on all rows, some at a time."""
    count = len(next(iter(inputs.values())))
    parts = [
        run({name: rows[start : start + IMAGES_AT_ONCE] for name, rows in inputs.items()})
        for start in range(0, count, IMAGES_AT_ONCE)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _written(step: Step, count: int, pieces: WordPieces, beams: int, shortest: int, longest: int) -> list[str]:
    begun = np.tile(pieces.begun(), (count, 1))
    texts = beam_search(step, begun, pieces.end, beams, shortest, min(longest, pieces.longest))
    return [pieces.written(text.ids) for text in texts]
