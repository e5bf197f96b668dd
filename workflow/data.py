"""Prepare data: sample images, downloads, and prompts of a class list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from clipress.data.download import download
from clipress.data.prompts import prompts_by_class, read_classes, read_templates
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.storage import write_text_whole


def write_images(folder: Path, form: Literal["scenes", "digits"], count: int) -> int:
    """Write images of an embedded set's test split as PNG files, with captions beside them; return their number."""
    source = open_source(SourceSpec(format=form, split="test", limit=count))
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(source)):
        Image.fromarray(source.image(index)).save(folder / f"{form}-{index:03}.png")
        (folder / f"{form}-{index:03}.txt").write_text("\n".join(source.captions(index)) + "\n", encoding="utf-8")
    return len(source)


def write_prompts(classes: Path, templates: Sequence[str], out: Path) -> tuple[int, int]:
    """Write a class list's prompts, one per line or by class as JSON; return the numbers of prompts and of classes."""
    shapes = [shape for template in templates for shape in read_templates(template)]
    pairs = prompts_by_class(read_classes(classes).names, shapes)
    lines = [prompt for _, prompts in pairs for prompt in prompts]
    by_class = {name: prompts for name, prompts in pairs}  # Equal names have equal prompts.
    text = json.dumps(by_class, indent=1, ensure_ascii=False) if out.suffix == ".json" else "\n".join(lines)
    write_text_whole(out, text + "\n")
    return len(lines), len(pairs)


def download_images(urls: Path, out: Path, **settings: Any) -> None:
    """Download the images of a table of URLs and captions as webdataset shards; settings as in data/download.py."""
    download(urls, out, **settings)
