"""The `data` section of a recipe: which sources, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from clipress.data.transforms import Augment, Library
from clipress.errors import RecipeError
from clipress.recipe import Section

BEAMS, CANDIDATES = 3, 128  # as BLIP publishes them
MAX_SKIPPED = 0.2  # fraction of a source that may be left out
MAX_REPLACED = 0.05  # fraction of the training records that may be replaced


class BeamSearch(Section):
    """How texts are written, see metrics/beam.py."""

    beams: int = Field(BEAMS, ge=1)
    """Texts that go on per image or question; 1 is greedy."""
    shortest: int | None = Field(None, ge=1)
    """Ids below which no text may end, with those of the prompt. Default: 5 of captions, 1 of answers, as published."""
    longest: int | None = Field(None, ge=2)
    """Ids of the longest text, with those of the prompt. Default: 20 of captions, 10 of answers, as published."""


class SourceSpec(Section):
    """One source in a recipe."""

    format: str
    """Pairs: csv, karpathy, coco, webdataset. Labelled: folder. One-sided: images, captions. Statements about two images: nlvr2.
    Questions: vqa. Embedded: scenes, digits, statements, questions."""
    split: Literal["train", "val", "test"] = "train"
    """Split of an embedded set."""
    annotations: Path | None = None
    """File that lists the records."""
    images: Path | None = None
    """Folder that image paths are relative to; default: the folder of the annotations."""
    shards: str | None = None
    """webdataset: tar files as `dir/{00000..00003}.tar`, several patterns joined by `::`, or a folder of tar files."""
    separator: str = Field("\t", min_length=1)
    """csv: the column separator."""
    quoted: bool | Literal["auto"] = "auto"
    """Tables: whether cells are quoted where needed (RFC 4180). auto: separated by commas they are; by anything else they are if every
    quotation mark is where a writer of quoted tables, such as pandas, would put it. Conceptual Captions' are not."""
    encoding: str = "utf-8"
    """Encoding of tables, and of the captions in shards, such as cp1252 or gbk."""
    image_key: str = "filepath"
    """csv: name of the image column. Rows with the same image are one image with several captions."""
    caption_key: str | None = None
    """csv: name of the caption column, by default title. webdataset: the key of the captions in a record's JSON file; default: captions
    are text files."""
    image_suffixes: tuple[str, ...] = ("jpg", "png", "jpeg", "webp", "avif")
    """webdataset: names of image files behind the first dot; of several the first counts."""
    caption_suffixes: tuple[str, ...] = ()
    """webdataset: likewise of captions; default: txt, or json with a `caption_key`."""
    max_skipped: float = Field(MAX_SKIPPED, ge=0, le=1)
    """Fraction of the records that may be damaged or missing; they are left out. More of them stop the work; 0 allows none."""
    text_normaliser: Literal["none", "blip"] = "none"
    """blip: normalise texts as BLIP and UPop do: lower-case, most punctuation removed, the first words alone."""
    classes: Path | None = None
    """Class list of labelled images: names or `WNID name`, one per line, or `imagenet` for open_clip's names."""
    answers: Path | None = None
    """vqa: JSON list of the answers to choose from."""
    beam_search: BeamSearch | None = None
    """How captions are written to evaluate them. Questions: write answers, instead of choosing from a list."""
    candidates: int = Field(CANDIDATES, ge=1)
    """Questions: how many answers of the list are compared as a whole, those whose first token is likeliest. BLIP's retrieval: how
    many of the nearest texts and images are read together with a query and ranked again; UPop has 256 for COCO, 128 for Flickr30K."""
    templates: str | tuple[str, ...] = ("a photo of a {}",)
    """Prompts of labelled images, with `{}`, `{c}` or `{label}`; `openai` (80) and `simple` (7) are open_clip's."""
    check: bool = False
    """Check that every image file exists when the source is opened, not only the first 50,000."""
    weight: float = Field(1.0, gt=0)
    """This source's share of each training batch, relative to the others."""
    name: str | None = None
    """Name in results; default: the format."""
    limit: int | None = Field(None, ge=1)
    """Use only the first N records."""
    seen: tuple[str, ...] = ()
    """Classes seen during training. Accuracy is then also reported for seen and unseen classes."""

    def model_post_init(self, _: Any) -> None:
        try:
            is_known = all(mark.encode(self.encoding) == mark.encode("ascii") for mark in ("\n", '"', ",", "\t"))
        except LookupError:
            is_known = False
        if not is_known:
            raise RecipeError(
                f"data: encoding: expected an encoding that writes ASCII as it is, such as utf-8, cp1252 or gbk, found "
                f"'{self.encoding:.40}'. Convert the file to UTF-8 if it has another."
            )


class DataSpec(Section):
    """The `data` section: sources for training, for validation during compression, and for testing in bench."""

    train: tuple[SourceSpec, ...]
    val: tuple[SourceSpec, ...] = ()
    test: tuple[SourceSpec, ...] = ()
    augment: Augment = Augment()
    repeats: int = Field(1, ge=1)
    """Show every image so many times in a row, each time augmented anew (repeated augmentation, Hoffer et al. 2020); DeiT has 3.
    An epoch remains as long."""
    workers: Annotated[int, Field(ge=0, le=1 << 10)] | Literal["auto"] = "auto"
    """Number of decoding processes for each that trains; 0 decodes in the training process. auto: 0 on a CPU, which training fills;
    on a GPU its share of the cores, as far as shared memory holds what they hand over."""
    max_replaced: float = Field(MAX_REPLACED, ge=0, le=1)
    """Fraction of the records read by a stage that may be unreadable; they are replaced by others. More of them, and more than 20,
    stop the run; 0 allows none."""
    resize: Library = "pillow"
    """Resizing library for training: pillow gives open_clip's pixels; torch is nearly twice as fast, within one level."""
