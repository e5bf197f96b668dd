"""CLIP CSV/TSV: a header line `title<sep>filepath`, then one pair per line (CLIP-KD's gather_cc, open_clip).

Conceptual Captions' files are tab-separated and unquoted: a caption may begin with a quotation mark or be "NA". Tables that
pandas writes are quoted; `table.py` tells them apart. Rows of one image are merged, so that every caption of an image matches
it. Bad rows are skipped and counted.
"""

from __future__ import annotations

from clipress.data.formats.files import Files, needed
from clipress.data.formats.table import Table
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec
from clipress.errors import DataError

CAPTION = "title"


@FORMATS.register("csv")
def read(spec: SourceSpec) -> Files:
    """Read a file of pairs; paths are relative to `images` if that is set."""
    path = needed(spec.annotations, "annotations", "csv")
    files = Table(spec, path, spec.separator)
    rows, caption_key = files.rows(), spec.caption_key or CAPTION
    _, _, header = next(rows, (0, 1, []))
    if not {caption_key, spec.image_key} <= set(header):
        raise DataError(
            f"{path}: expected a header with '{caption_key}' and '{spec.image_key}', separated by {spec.separator!r}; "
            f"found {header}. Set 'caption_key', 'image_key' or 'separator'."
        )
    file, title, width = files.columns = header.index(spec.image_key), header.index(caption_key), len(header)
    for _, number, cells in () if files.restore() else rows:
        if isinstance(cells, str):
            files.skip(f"line {number}: {cells}")
        elif len(cells) == width:
            files.add(cells[file], (cells[title],), where=f"line {number}")
        elif any(cells):
            files.skip(f"line {number}: expected {width} cells, found {len(cells)}")
    return files.done()
