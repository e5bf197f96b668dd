"""COCO captions as COCO ships them (`captions_val2017.json`): images, and annotations that point at them by id.

The images come in the order of their ids, captions in the order of the file, as in torchvision's CocoCaptions. Names
of 2014 and 2017 are just file names under `images`.
"""

from __future__ import annotations

from clipress.data.formats.files import Files, json_of, needed
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec
from clipress.errors import DataError


@FORMATS.register("coco")
def read(spec: SourceSpec) -> Files:
    """Read an annotation file; every image has all its captions."""
    path = needed(spec.annotations, "annotations", "coco")
    found = json_of(path)
    parts = [found.get(key) if isinstance(found, dict) else None for key in ("images", "annotations")]
    if not all(isinstance(part, list) for part in parts):
        raise DataError(f"{path}: a mapping with lists of 'images' and 'annotations' is asked for.")
    files, names, texts, unclear = Files(spec, path), {}, {}, set()
    for number, row in enumerate(parts[0]):
        known = isinstance(row, dict) and isinstance(row.get("id"), int) and isinstance(row.get("file_name"), str)
        if not known:
            files.skip(f"image {number}: a whole 'id' and a 'file_name' are asked for")
        elif names.setdefault(row["id"], row["file_name"]) != row["file_name"]:
            files.skip(f"image {number}: its id {row['id']} is another's too")
            unclear.add(row["id"])
    for image in unclear:  # nothing tells whose captions they are
        del names[image]
    for number, row in enumerate(parts[1]):
        caption = row.get("caption") if isinstance(row, dict) else None
        image = row.get("image_id") if isinstance(row, dict) else None
        if isinstance(caption, str) and caption.strip() and isinstance(image, int) and image in names:
            texts.setdefault(image, []).append(caption)
        else:
            files.skip(f"annotation {number}: a 'caption' and the 'image_id' of an image are asked for")
    for image in sorted(names):
        if image in texts:
            files.add(names[image], texts[image], where=f"image {image}")
        else:
            files.skip(f"image {image}: it has no caption")
    return files.done()
