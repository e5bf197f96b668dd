"""Karpathy-split JSON as distributed by BLIP and UPop (COCO, Flickr30K).

Train: a list of {"image", "caption": str, "image_id"}, one row per pair. Val and test: {"image", "caption": [str]}.
Rows of one image are merged, so that every caption of an image matches it; images with the same `image_id` match one
another.
"""

from __future__ import annotations

from clipress.data.formats.files import Files, needed, rows_of
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec


@FORMATS.register("karpathy")
def read(spec: SourceSpec) -> Files:
    """Read a retrieval annotation file; image paths are relative to `images`."""
    path = needed(spec.annotations, "annotations", "karpathy")
    rows = rows_of(path)
    files, texts, group, groups = Files(spec, path), {}, {}, {}
    for number, row in enumerate(rows):
        row = row if isinstance(row, dict) else {}
        captions = [row.get("caption")] if isinstance(row.get("caption"), str) else row.get("caption")
        valid = isinstance(captions, list) and captions and all(isinstance(t, str) and t.strip() for t in captions)
        image, image_id = row.get("image"), row.get("image_id")
        if valid and isinstance(image, str) and isinstance(image_id, (str, int, type(None))):
            texts.setdefault(image, []).extend(captions)
            same = ("image", image) if image_id is None else ("id", image_id)
            group.setdefault(image, groups.setdefault(same, len(groups)))
        else:
            files.skip(f"row {number}: expected an 'image' and a non-empty 'caption'")
    for image, captions in texts.items():
        files.add(image, captions, where=f"image {image}", group=group[image])
    return files.done()
