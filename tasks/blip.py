"""What BLIP's tasks share: the `student` section, the graph `image`, texts, and training on images with texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from clipress.data.sources import open_source, readable_captions
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Preprocess
from clipress.data.word_pieces import WordPieces, vocabulary_of, word_pieces_spec
from clipress.errors import RecipeError
from clipress.metrics.blip import IMAGE, IMAGES_AT_ONCE, STATES, TEXT
from clipress.models import anatomy, blip
from clipress.models.load import Model
from clipress.models.med import DROPOUT
from clipress.models.text_length import text_end
from clipress.models.weights_file import Which
from clipress.recipe import Section, checked
from clipress.runtime.graph import Input, Output
from clipress.tasks import Task, Tokenize
from clipress.tasks.training import Lesson, Outputs, TrainingJob

if TYPE_CHECKING:
    from clipress.data.eval_sets import EvalSet

FORWARD = "forward"
"""Instead of a graph, for calibration: the whole pass that training makes, since later graphs read what earlier ones compute."""


class Student(Section):
    """The `student` section of a BLIP: the sizes of its towers, and which words it knows."""

    width: int = Field(768, ge=1)
    layers: int = Field(12, ge=1)
    heads: int = Field(12, ge=1)
    patch_size: int = Field(16, ge=1)
    image_size: int = Field(384, ge=1)
    """Image size in pixels."""
    text_width: int = Field(768, ge=1)
    text_layers: int = Field(12, ge=1)
    text_heads: int = Field(12, ge=1)
    context_length: int = Field(40, ge=2)
    """Ids of the longest text."""
    answer_length: int = Field(16, ge=2)
    """vqa: ids of the longest answer."""
    embed_dim: int = Field(256, ge=1)
    """retrieval: width of the embeddings."""
    merges_from: int | None = Field(None, ge=0)
    """nlvr: the first text layer that merges what it reads of both images by a Linear; earlier ones average. Default: half of the layers."""
    dropout: float = Field(DROPOUT, ge=0, lt=1)
    """In training, of the text modules."""
    inherit: bool = False
    """Start from the teacher's weights, which may be a BLIP of another task: modules that both have are copied, and each of nlvr's two
    cross-attentions starts as the teacher's."""
    vocabulary: Path | SourceSpec | tuple[SourceSpec, ...] | None = None
    """BERT's vocab.txt, or sources of texts, such as {format: scenes}, whose words are the vocabulary. Default: the teacher's."""
    prompt: str = "a picture of "
    """caption: what every caption begins with."""

    def model_post_init(self, _: Any) -> None:
        for name, width, heads in (
            ("width", self.width, self.heads),
            ("text_width", self.text_width, self.text_heads),
        ):
            if width % heads:
                raise RecipeError(f"student.{name}: expected a multiple of the heads ({heads}), found {width}.")
        if self.image_size % self.patch_size:
            raise RecipeError(
                f"student.image_size: expected a multiple of patch_size ({self.patch_size}), found {self.image_size}."
            )

    def words(self) -> str:
        """Return the vocab.txt. Raises RecipeError for a file that cannot be read."""
        if not isinstance(self.vocabulary, Path):
            sources = [self.vocabulary] if isinstance(self.vocabulary, SourceSpec) else self.vocabulary
            return vocabulary_of([self.prompt, *(text for source in sources for text in _texts_of(source))])
        try:
            return self.vocabulary.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"student.vocabulary: expected a vocab.txt or a source of texts, found {self.vocabulary}: {error}"
            ) from None

    def architecture(self, task: str, vocabulary: int) -> dict[str, Any]:
        """Return what blip.build builds."""
        image = {"img_size": self.image_size, "patch_size": self.patch_size, "embed_dim": self.width}
        image |= {"depth": self.layers, "num_heads": self.heads}
        text = {"vocabulary": vocabulary, "width": self.text_width, "layers": self.text_layers}
        more = {key: getattr(self, key) for key in blip.MORE[task]}
        if more.get("merges_from", 0) is None:
            more["merges_from"] = self.text_layers // 2
        text |= {"heads": self.text_heads, "positions": max(self.context_length, more.get("answer_length", 0))}
        return {
            "task": task,
            IMAGE: image,
            TEXT: text,
            "context_length": self.context_length,
            "dropout": self.dropout,
            **more,
        }


def _texts_of(spec: SourceSpec) -> list[str]:
    """Return every text of a source: captions or questions, and answers."""
    source = open_source(spec)
    places = range(len(source))
    texts = [text for place in places for text in readable_captions(source, place)]
    if getattr(source, "has_answers", False):
        texts += [text for place in places for text in source.answers(place)]
    return texts + list(getattr(source, "candidates", None) or ())


class BlipTask(Task):
    """Base class of BLIP's tasks."""

    main_graph = IMAGE
    reads_text = True
    has_prompt: ClassVar[bool] = False
    """Whether every text begins with the student's prompt."""

    def build(self, architecture: dict[str, Any], seed: int | None = None) -> nn.Module:
        return blip.build({**architecture, "task": self.name}, seed)

    def check_student(self, section: Mapping[str, Any], has_teacher: bool) -> None:
        student = checked(Student, section, "student")
        if student.inherit and not has_teacher:
            raise RecipeError("student.inherit: expected a teacher to copy weights from, found none.")
        if student.vocabulary is None and not has_teacher:
            raise RecipeError(
                "student.vocabulary: expected BERT's vocab.txt or a source of texts such as {format: scenes}, found none."
            )

    def student_from(self, section: Mapping[str, Any], teacher: Model | None, seed: int) -> Model:
        self.check_student(section, teacher is not None)
        student = checked(Student, section, "student")
        if student.vocabulary is None:
            tokenizer = {**teacher.tokenizer, "context_length": student.context_length}
            vocabulary = vocabulary_size(teacher)
        else:
            prompt = student.prompt if self.has_prompt else ""
            tokenizer = word_pieces_spec(student.words(), student.context_length, prompt)
            vocabulary = WordPieces(tokenizer).encode + 1
        architecture = student.architecture(self.name, vocabulary)
        preprocess = Preprocess(size=student.image_size, resize_mode="squash")
        if teacher is not None:
            preprocess = teacher.preprocess.model_copy(update={"size": student.image_size})
        module = self.build(architecture, seed)
        if student.inherit:
            inherit(module, teacher)
        return Model(module, architecture, preprocess, tokenizer, task=self.name)

    def load_pretrained(self, name: str, checkpoint: str | None, where: str, which: Which | None = None) -> Model:
        raise RecipeError(
            f"{where}: no library has BLIPs by name, found '{name}'. Import a published file with clipress import, and use its "
            "artifact."
        )

    def graph_of(self, tower: str) -> str:
        return FORWARD

    def cached_rows(self, module: nn.Module, name: str, rows: Tensor) -> Tensor:
        raise RecipeError(_NO_CACHE)


@torch.no_grad()
def inherit(module: nn.Module, teacher: Model) -> None:
    """Copy what a teacher has of a BLIP's weights into it. Raises RecipeError for other sizes, or a teacher that is no BLIP."""
    theirs = teacher.module.state_dict() if anatomy.is_blip(teacher.module) else {}
    found = False
    for name, rows in module.state_dict().items():
        names = (name, name.replace(".cross.1.", ".cross.0."))
        source = next((theirs[one] for one in names if one in theirs), None)
        if source is not None and source.shape != rows.shape:
            raise RecipeError(
                f"student.inherit: expected the teacher's sizes, but {name} is {list(rows.shape)}, and {list(source.shape)} in the teacher. "
                "Use its sizes and words, and a teacher that is not cut."
            )
        if source is not None:
            rows.copy_(source)
            found = True
    if not found:
        raise RecipeError(f"student.inherit: expected a teacher that is a BLIP, found one of task {teacher.task}.")


_NO_CACHE = "teacher.cache: what a BLIP makes of an image with a text is not cached. Leave it out."


def image_inputs(model: Model) -> tuple[Input, Output]:
    """Return the pixels and the states of the graph `image`."""
    size, image = model.preprocess.size, model.module.visual_encoder
    tokens = int(image.patch_embed.num_patches + image.num_prefix_tokens)
    pixels = Input(name="pixel_values", dtype="float32", shape=(3, size, size))
    return pixels, Output(name=STATES, shape=(tokens, image.embed_dim))


def vocabulary_size(model: Model) -> int:
    """Return how many tokens a model knows."""
    return model.architecture[TEXT]["vocabulary"]


def text_input(model: Model, length: int) -> Input:
    """Return the ids of a graph that takes texts of any length up to `length`."""
    largest = vocabulary_size(model) - 1
    return Input(name="input_ids", dtype="int64", shape=(length,), largest=largest, end=text_end(model.module))


def pieces_of(tokenize: Tokenize) -> WordPieces:
    """Return the word pieces behind a model's tokenizer."""
    return WordPieces(tokenize.spec)


def batches_of(one: EvalSet, preprocess: Preprocess, others: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (places, pixels) of a set's images, or of the second ones of pairs, some at a time."""
    start = 0
    for pixels in one.pixel_batches(preprocess, IMAGES_AT_ONCE, others):
        yield np.arange(start, start + len(pixels)), pixels
        start += len(pixels)


class BlipLesson(Lesson):
    """Base class of lessons about images with texts."""

    def __init__(self, job: TrainingJob) -> None:
        self.job, self.needs = job, job.needs
        self.learning = tuple(tower for tower in anatomy.towers(job.student.module) if job.towers in ("both", tower))
        self.tokens = self.learning if "tokens" in job.needs else ()
        for teacher in job.teachers:
            job.refuse_other_inputs(teacher)
        refuse_other_data(job)

    def cached_outputs(self, arrays: Mapping[str, Tensor], teacher: int, scale: float | None) -> Outputs:
        raise RecipeError(_NO_CACHE)


def refuse_other_data(job: TrainingJob) -> None:
    """Raise RecipeError for training data without images or without texts."""
    if not (job.sources_have("images") and job.sources_have("texts")):
        raise RecipeError(f"{job.title}: a BLIP requires images and texts, but the training data lacks one of them.")
