"""Questions about images as BLIP and UPop ship them: VQA v2 (Goyal et al. 2017) and Visual Genome (Krishna et al. 2017).

[{"question_id": 7, "image": "train2014/x.jpg", "question": "What colour?", "answer": ["red", ...], "dataset": "vqa"},
 {"image": "image/1.jpg", "question": "What colour?", "answer": "red", "dataset": "vg"}]

Each file is a source, since the images of VQA and of Visual Genome are in different folders. A file for testing has no answers.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipress.data.formats.files import Files, Strings, json_of, needed, rows_of
from clipress.data.formats.text import pre_question
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec
from clipress.errors import DataError

log = logging.getLogger("clipress.data")
GENOME_WEIGHT = 0.2  # of Visual Genome's one answer, as BLIP trains


def weights_of(answers: Sequence[str]) -> dict[str, float]:
    """Return the answers that differ with the share of people who gave them."""
    return {answer: count / len(answers) for answer, count in Counter(answers).items()}


class Questions(Files):
    """Image files with a question each, and what people answered."""

    candidates: tuple[str, ...] | None = None

    def __init__(self, spec: SourceSpec, *args) -> None:
        super().__init__(spec, *args)
        self.said, self.said_ends = Strings(), array("q", [0])  # item i has those from said_ends[i] to said_ends[i + 1]
        self.is_genome, self.ids = array("b"), array("q")

    def add_question(self, row: dict[str, Any], answers: Sequence[str], where: str, group: int) -> None:
        """Add a question with its image."""
        before = len(self)
        self.add(row["image"], (row["question"],), where, group)
        if len(self) > before:
            for answer in answers:
                self.said.append(answer)
            self.said_ends.append(len(self.said))
            self.is_genome.append(row.get("dataset") == "vg")
            number = row.get("question_id")
            self.ids.append(number if isinstance(number, int) and abs(number) < 1 << 62 else before)

    def content(self) -> Iterator[bytes | bytearray | array]:
        yield from super().content()
        yield from (self.said.bytes, self.said.ends, self.said_ends, self.is_genome, self.ids)
        yield repr(self.candidates).encode()

    @property
    def has_answers(self) -> bool:
        return len(self.said) > 0

    def answers(self, index: int) -> Sequence[str]:
        return tuple(self.said[place] for place in range(self.said_ends[index], self.said_ends[index + 1]))

    def answer_weights(self, index: int) -> dict[str, float]:
        found = self.answers(index)
        return dict.fromkeys(found, GENOME_WEIGHT) if self.is_genome[index] else weights_of(found)

    def question_id(self, index: int) -> int:
        """Return the id that a file of results names the question by."""
        return self.ids[index]


@FORMATS.register("vqa")
def read(spec: SourceSpec) -> Questions:
    """Read an annotation file; image paths are relative to `images`, and `text_normaliser: blip` changes the questions alone."""
    path = needed(spec.annotations, "annotations", "vqa")
    rows = rows_of(path)
    found, groups = Questions(spec, path), {}  # questions about one image are a group
    if spec.text_normaliser == "blip":
        found.normalised = pre_question
    for number, row in enumerate(rows):
        row = row if isinstance(row, dict) else {}
        answers = row.get("answer", [])
        answers = [answers] if isinstance(answers, str) else answers
        are_texts = isinstance(answers, list) and all(isinstance(answer, str) and answer.strip() for answer in answers)
        if are_texts and isinstance(row.get("image"), str) and isinstance(row.get("question"), str):
            group = groups.setdefault(row["image"], len(groups))
            found.add_question(row, answers, f"row {number}", group)
        else:
            found.skip(f"row {number}: expected an 'image', a 'question', and 'answer' as a text or a list of texts")
    if spec.answers is not None:
        found.candidates = _candidates(needed(spec.answers, "answers", "vqa"), found)
    return found.done()


def _candidates(path: Path, questions: Questions) -> tuple[str, ...]:
    """Return the answers to choose from. Raises DataError for a list in which no question has an answer."""
    listed = json_of(path)
    if not (isinstance(listed, list) and listed and all(isinstance(text, str) and text.strip() for text in listed)):
        raise DataError(f'{path}: expected a JSON list of answers, such as ["yes", "no"].')
    known = set(listed)
    if questions.has_answers:
        answered = sum(not known.isdisjoint(questions.answers(index)) for index in range(len(questions)))
        if not answered:
            raise DataError(
                f"{path}: no question of {questions.origin} has an answer in this list, the first one's is {questions.answers(0)[:1]}. "
                "Use the list that belongs to these questions, or leave 'answers' out."
            )
        log.info("%s: %d of %d questions have an answer in this list.", path, answered, len(questions))
    return tuple(dict.fromkeys(listed))
