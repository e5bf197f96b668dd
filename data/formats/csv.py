"""CLIP CSV/TSV: a header line `title<sep>filepath`, then one pair per line (CLIP-KD's gather_cc, open_clip).

Conceptual Captions' files are tab-separated and unquoted: a caption may begin with a quotation mark or be "NA".
Broken rows and missing files are skipped and counted.
"""

from __future__ import annotations

from clipress.data.formats.files import Files, needed
from clipress.data.pairs import SourceSpec
from clipress.errors import DataError


def read(spec: SourceSpec) -> Files:
    """Read a pairs file; paths are relative to `images` when it is given."""
    path = needed(spec.annotations, "annotations", "csv")
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    header = lines[0].split(spec.separator) if lines else []
    if not {"title", "filepath"} <= set(header):
        raise DataError(
            f"{path}: the first line must name 'title' and 'filepath', split by {spec.separator!r}; found {header}."
        )
    title, file = header.index("title"), header.index("filepath")
    files = Files(spec, path)
    for number, line in enumerate(lines[1:], 2):
        cells = line.split(spec.separator)
        if len(cells) == len(header) and cells[title].strip():
            files.add(cells[file], (cells[title],), where=f"line {number}")
        elif line.strip():
            files.skip(f"line {number}: {len(cells)} cells, {len(header)} asked for")
    return files.done()
