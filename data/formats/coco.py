"""COCO captions as distributed (`captions_val2017.json`): images, and annotations that refer to them by id.

Images are ordered by id and captions by their place in the file, as in torchvision's CocoCaptions. The file names of
both 2014 and 2017 work; they are relative to `images`.
"""

from __future__ import annotations

from clipress.data.formats.files import Files, json_of, needed
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec
from clipress.errors import DataError


@FORMATS.register("coco")
def read(spec: SourceSpec) -> Files:
    """Read an annotation file; every image gets all its captions."""
    path = needed(spec.annotations, "annotations", "coco")
    found = json_of(path)
    parts = [found.get(key) if isinstance(found, dict) else None for key in ("images", "annotations")]
    if not all(isinstance(part, list) for part in parts):
        raise DataError(f"{path}: expected a mapping with lists 'images' and 'annotations'.")
    files, names, texts, unclear = Files(spec, path), {}, {}, set()
    for number, row in enumerate(parts[0]):
        known = isinstance(row, dict) and isinstance(row.get("id"), int) and isinstance(row.get("file_name"), str)
        if not known:
            files.skip(f"image {number}: expected an integer 'id' and a 'file_name'")
        elif names.setdefault(row["id"], row["file_name"]) != row["file_name"]:
            files.skip(f"image {number}: its id {row['id']} is not unique")
            unclear.add(row["id"])
    for image in unclear:  # It is unclear which image the captions belong to.
        del names[image]
    for number, row in enumerate(parts[1]):
        caption = row.get("caption") if isinstance(row, dict) else None
        image = row.get("image_id") if isinstance(row, dict) else None
        if isinstance(caption, str) and caption.strip() and isinstance(image, int) and image in names:
            texts.setdefault(image, []).append(caption)
        else:
            files.skip(f"annotation {number}: expected a 'caption' and the 'image_id' of an image")
    for image in sorted(names):
        if image in texts:
            files.add(names[image], texts[image], where=f"image {image}")
        else:
            files.skip(f"image {image}: it has no caption")
    return files.done()
