"""CLIP CSV/TSV: a header line `title<sep>filepath`, then one pair per line (CLIP-KD's gather_cc, open_clip).

Conceptual Captions' files are tab-separated and unquoted: a caption may begin with a quotation mark or be "NA". Only
comma-separated files are quoted (RFC 4180), since captions contain commas. Bad rows are skipped and counted.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from clipress.data.formats.files import Files, lines_of, needed
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec
from clipress.errors import DataError


@FORMATS.register("csv")
def read(spec: SourceSpec) -> Files:
    """Read a file of pairs; paths are relative to `images` if that is set."""
    path = needed(spec.annotations, "annotations", "csv")
    rows = _quoted(path) if spec.separator == "," else _plain(path, spec.separator)
    _, header = next(rows, (1, []))
    if not {spec.caption_key, spec.image_key} <= set(header):
        raise DataError(
            f"{path}: expected a header with '{spec.caption_key}' and '{spec.image_key}', separated by {spec.separator!r}; "
            f"found {header}. Set 'caption_key', 'image_key' or 'separator'."
        )
    title, file = header.index(spec.caption_key), header.index(spec.image_key)
    files = Files(spec, path)
    for number, cells in rows:
        if files.full:
            break
        if isinstance(cells, str):
            files.skip(f"line {number}: {cells}")
        elif len(cells) == len(header):
            files.add(cells[file], (cells[title],), where=f"line {number}")
        elif any(cells):
            files.skip(f"line {number}: expected {len(header)} cells, found {len(cells)}")
    return files.done()


def _plain(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines_of(path), 1):
        yield number, line.split(separator)


def _quoted(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the cells of every record, or an error message in their place."""
    reader = csv.reader((line + "\n" for line in lines_of(path)), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            yield first, next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # an unclosed quote swallows lines, each of them a lost record
            for number in range(first, max(reader.line_num, first) + 1):
                yield number, f"invalid quoting: {error}"
