"""Texts without images: Conceptual Captions' raw tables, CC3M's `caption<TAB>url` and CC12M's `url<TAB>caption`.

These have no header; the columns are recognised from the first line. A header such as img2dataset's (`caption<TAB>url`)
and a plain list of captions are supported too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipress.data.formats.files import Files, needed
from clipress.data.formats.table import Table
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec
from clipress.errors import DataError


@FORMATS.register("captions")
def read(spec: SourceSpec) -> Files:
    """Read the captions and ignore the URLs."""
    path = needed(spec.annotations, "annotations", "captions")
    files = Table(spec, path, "\t")
    header, caption, width = columns(path, next(files.rows(), (0, 1, [""]))[2])
    files.columns = (None, caption, width)
    for _, number, cells in () if files.restore() else files.rows():
        if files.full:
            break
        if number == 1 and header:
            continue
        if len(cells) == width:
            files.add(None, (cells[caption],), where=f"line {number}")
        elif any(cells):
            files.skip(f"line {number}: expected {width} cells, found {len(cells)}")
    return files.done()


def columns(path: Path, first: Sequence[str]) -> tuple[bool, int, int]:
    """Return whether the first line is a header, the caption's column, and the number of columns."""
    names = [cell.strip().lower() for cell in first]
    if "caption" in names:
        return True, names.index("caption"), len(first)
    urls = [cell.startswith(("http://", "https://")) for cell in first]
    if len(first) == 1 and not urls[0]:
        return False, 0, 1
    if len(first) == 2 and sum(urls) == 1:
        return False, urls.index(False), 2
    raise DataError(
        f"{path}: expected a caption and a URL per line, separated by a tab, in either order; found {len(first)} cells in "
        f"the first line, {sum(urls)} of them URLs."
    )
