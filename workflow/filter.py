"""Choose the images that a teacher ranks nearest to a list of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from clipress.data.filter import embeddings, nearest_to_prompts, table
from clipress.data.prompts import read_prompts
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.metrics.evaluate import encode_texts
from clipress.progress import progress_bar
from clipress.storage import write_text_whole
from clipress.tasks import model_from_artifact
from clipress.tasks.clip import encoders


@dataclass(frozen=True)
class FilterRequest:
    """The images to rank, and how many to keep. Set exactly one of keep and count."""

    images: Path
    prompts: Path
    teacher: Path
    keep: float | None = None
    """Fraction of the images."""
    count: int | None = None
    near_duplicates: float | None = None
    """Skip images whose cosine with a better one is above this."""
    threads: int = 1
    """Images decoded concurrently."""


def filter_images(request: FilterRequest, out: Path) -> tuple[int, int]:
    """Write the list of the images nearest to the prompts; return the numbers of images kept and of all images."""
    prompts = read_prompts(request.prompts)
    source = open_source(SourceSpec(format="images", images=request.images))
    teacher = model_from_artifact(request.teacher)
    teacher.module.to("cuda" if torch.cuda.is_available() else "cpu")
    encode_image, encode_text = encoders(teacher, f"Teacher {request.teacher}")
    with progress_bar(len(source), "filter", "image") as bar:
        found, indices = embeddings(source, encode_image, teacher.preprocess, threads=request.threads, done=bar.update)
    wanted = encode_texts(encode_text, teacher.tokenize(), prompts)
    count = request.count or max(round(request.keep * len(source)), 1)
    chosen = nearest_to_prompts(found, wanted, count, request.near_duplicates)
    write_text_whole(out, table([source.paths[int(index)] for index in indices], chosen, prompts))
    return len(chosen), len(source)
