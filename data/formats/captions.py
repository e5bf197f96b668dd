"""Texts without pictures: Conceptual Captions' raw tables, CC3M's `caption<TAB>url` and CC12M's `url<TAB>caption`.

There is no header; which column is which is seen on the first line. A header such as img2dataset's (`caption<TAB>url`)
is known too, and so is a plain list of captions.
"""

from __future__ import annotations

from pathlib import Path

from clipress.data.formats.files import Files, lines_of, needed
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec
from clipress.errors import DataError


@FORMATS.register("captions")
def read(spec: SourceSpec) -> Files:
    """Read the captions and leave the addresses."""
    path = needed(spec.annotations, "annotations", "captions")
    header, caption, width = columns(path)
    files = Files(spec, path)
    for number, line in enumerate(lines_of(path), 1):
        cells = line.split("\t")
        if files.full:
            break
        if number == 1 and header:
            continue
        if len(cells) == width:
            files.add(None, (cells[caption],), where=f"line {number}")
        elif line:
            files.skip(f"line {number}: {len(cells)} cells, {width} asked for")
    return files.done()


def columns(path: Path) -> tuple[bool, int, int]:
    """Return whether a table has a header line, which column is the caption, and how many columns there are."""
    first = next(lines_of(path), "").split("\t")
    names = [cell.strip().lower() for cell in first]
    if "caption" in names:
        return True, names.index("caption"), len(first)
    urls = [cell.startswith(("http://", "https://")) for cell in first]
    if len(first) == 1 and not urls[0]:
        return False, 0, 1
    if len(first) == 2 and sum(urls) == 1:
        return False, urls.index(False), 2
    raise DataError(
        f"{path}: lines of a caption and a web address, split by a tab, are asked for in either order; "
        f"the first line has {len(first)} cells, {sum(urls)} of them addresses."
    )
