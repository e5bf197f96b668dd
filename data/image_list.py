"""Named images without captions, from a folder or from webdataset shards.

A name is the path of an image: `photos/cats/1.jpg`, or `shards/00000.tar/000000012` for a record of a shard. Names start
with the given path, so that images of several folders do not clash.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from clipress.data.file_states import Check
from clipress.data.formats import images
from clipress.data.formats.files import SUFFIXES, Files, Strings, images_under, report_skipped
from clipress.data.formats.index_files import bytes_at
from clipress.data.formats.webdataset import index_of, names_of, record_states, shard_paths
from clipress.data.spec import SourceSpec
from clipress.data.transforms import open_image
from clipress.errors import DataError


class ImageList(Protocol):
    """Images in a fixed order. `image` raises DataError for one that cannot be read."""

    where: str

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image: ...
    def name(self, index: int) -> str: ...
    def states(self, check: Check) -> np.ndarray: ...  # int64 [N, 2], of all images, see file_states.py


def open_images(where: str) -> ImageList:
    """Open a folder of images, a folder of shards, or shards by a pattern such as `dir/{00000..00003}.tar`.

    Raises DataError when there is nothing to read, and when a folder holds both images and shards.
    """
    if not where.endswith(".tar"):
        folder = Path(where)
        if not any(folder.glob("*.tar")):
            return _in_folder(folder)
        if stray := next(images_under(folder), None):
            raise DataError(
                f"{where}: expected images or shards, found both (such as {stray}). Pass the shards alone, as "
                f"{where}/{{00000..00009}}.tar"
            )
    return _in_shards(where)


@dataclass(frozen=True)
class _Folder:
    where: str
    files: Files

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        return self.files.image(index)

    def name(self, index: int) -> str:
        return str(Path(self.where) / self.files.paths[index])

    def states(self, check: Check) -> np.ndarray:
        return self.files.states(range(len(self)), check)


def _in_folder(folder: Path) -> _Folder:
    files = images.read(SourceSpec(format="images", images=folder))
    if len(files) == 0:
        raise DataError(f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}) or shards (.tar), found none.")
    return _Folder(str(folder), files)


@dataclass(frozen=True)
class _Shards:
    where: str
    paths: list[Path]
    first: np.ndarray
    """First record of each shard, and the total: int64 [shards + 1]."""
    places: np.ndarray
    """Byte offset and size: int64 [N, 2]."""
    names: Strings

    def __len__(self) -> int:
        return len(self.places)

    def image(self, index: int) -> Image.Image:
        try:
            return open_image(bytes_at(self._shard(index), *self.places[index].tolist()))
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from None

    def name(self, index: int) -> str:
        return f"{self._shard(index)}/{self.names[index]}"

    def states(self, check: Check) -> np.ndarray:
        return record_states(self.paths, self.first, self.places, range(len(self)), check)

    def _shard(self, index: int) -> Path:
        return self.paths[int(np.searchsorted(self.first, index, side="right")) - 1]


def _in_shards(where: str) -> _Shards:
    paths = shard_paths(where)
    counts, places, names, total = [], [], Strings(), 0
    for path in paths:
        members = index_of(path)
        has_image = members["image"][:, 1] > 0
        places.append(members["image"][has_image])
        for name, usable in zip(names_of(members), has_image, strict=True):
            if usable:
                names.append(name)
        counts.append(len(places[-1]))
        total += len(has_image)
    report_skipped(where, total, total - sum(counts), "a record without an image")
    if not len(names):
        raise DataError(f"{where}: expected records with an image, found none.")
    return _Shards(where, paths, np.cumsum([0, *counts]), np.concatenate(places), names)
