"""Build an index of images for search by text, and change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipress.data.file_states import Check
from clipress.progress import Say
from clipress.serve.index import Description, Kind, remove_entries
from clipress.serve.indexing import index_images as embed_and_index
from clipress.workflow.exported import find_export


@dataclass(frozen=True)
class IndexRequest:
    """What to index, and how."""

    images: str
    """A folder of images, or webdataset shards."""
    model: Path
    """An export folder, or an artifact that has been exported."""
    kind: Kind | None = None
    threads: int = 0
    add: bool = False
    """Add to the entries of the index."""
    check: Check = "stat"
    """How changed images are noticed when the index is added to."""


def index_images(request: IndexRequest, out: Path, say: Say) -> Description:
    """Embed images with an exported image encoder and write an index of them."""
    export = find_export(request.model)
    return embed_and_index(request.images, export, out, request.kind, request.threads, request.add, say, request.check)


def remove_from_index(index: Path, keys: Sequence[str]) -> Description:
    """Remove entries from an index by their keys."""
    return remove_entries(index, keys)
