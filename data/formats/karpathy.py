"""Karpathy-split JSON as BLIP and UPop ship it (COCO, Flickr30K).

Train: a list of {"image", "caption": str, "image_id"}, one row per pair. Val and test: {"image", "caption": [str]}.
Rows of one image are gathered, so every caption of an image is a right answer to it.
"""

from __future__ import annotations

import json

from clipress.data.formats.files import Files, needed
from clipress.data.pairs import SourceSpec
from clipress.errors import DataError


def read(spec: SourceSpec) -> Files:
    """Read a retrieval annotation file; image paths are relative to `images`."""
    path = needed(spec.annotations, "annotations", "karpathy")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON: {error}.") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: a list of rows is asked for, found {type(rows).__name__}.")
    files, gathered = Files(spec, path), {}
    for number, row in enumerate(rows):
        caption = row.get("caption") if isinstance(row, dict) else None
        texts = [caption] if isinstance(caption, str) else caption
        valid = isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts)
        if valid and isinstance(row.get("image"), str):
            gathered.setdefault(row["image"], []).extend(texts)
        else:
            files.skip(f"row {number}: 'image' and a non-empty 'caption' are asked for")
    for image, texts in gathered.items():
        files.add(image, tuple(texts), where=f"image {image}")
    return files.done()
