"""Images without captions: all images under a folder, or those in a list (`clipress data filter` writes one)."""

from __future__ import annotations

from clipress.data.formats.files import Files, images_under, lines_of, needed
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec


@FORMATS.register("images")
def read(spec: SourceSpec) -> Files:
    """Read the images under `images`; with `annotations`, those in its first column, below a header `filepath`."""
    root = needed(spec.images, "images", "images", folder=True)
    if spec.annotations is None:
        files, paths = Files(spec, root), images_under(root)
    else:
        listed = needed(spec.annotations, "annotations", "images")
        files, paths = Files(spec, listed), (line.split("\t")[0] for _, line in lines_of(listed, spec.encoding))
    for number, path in enumerate(paths, 1):
        if files.full:
            break
        if path and not (number == 1 and path == "filepath"):
            files.add(path, (), where=f"image {number}")
    return files.done()
