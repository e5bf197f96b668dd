"""Classify images with a server, and draw masks; see `clipress.load` for classification on this machine."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from clipress.data.formats.files import images_under
from clipress.data.prompts import check_labels
from clipress.data.transforms import fitted, open_image
from clipress.errors import DataError
from clipress.serve.classify import BATCH, LoadedModel, label_columns, shares_among
from clipress.serve.client import Answer, Client
from clipress.serve.segment import drawn_mask, shares_of
from clipress.storage import write_bytes_whole

Read = tuple[Path, Any]
"""An image's path, and the image."""


@dataclass(frozen=True)
class Server:
    """A running Triton server, and how to send requests to it."""

    url: str
    timeout: float = 60
    """Seconds per request."""
    in_flight: int = 16
    """Concurrent requests."""


def labels_from(option: str | None, file: Path | None) -> list[str]:
    """Return the labels of a comma-separated text, or of a text file with one per line; blank ones are skipped.

    Exactly one of the two must be given. Raises DataError.
    """
    if (option is None) == (file is None):
        found = "none" if file is None else "both"
        raise DataError(f"Set exactly one of --labels and --labels-file; found {found}.")
    parts = option.split(",") if file is None else _lines(file)
    labels = [part.strip() for part in parts if part.strip()]
    if not labels:
        where = f"--labels '{option}'" if file is None else f"Labels file {file}"
        raise DataError(f"{where} holds no label. Give labels, such as cat,dog or one per line.")
    check_labels(labels)
    return labels


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"Labels file {file} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Labels file {file} cannot be read: {error}. Use UTF-8 text, one label per line.") from None


def images_in(paths: Iterable[Path], standard_input: Iterable[str] = ()) -> Iterator[Path]:
    """Yield images one by one: every image of a folder; for `-`, the paths in `standard_input`."""
    for path in paths:
        if str(path) == "-":
            yield from (Path(line.rstrip("\r\n")) for line in standard_input if line.strip())
        elif path.is_dir():
            yield from (path / name for name in images_under(path))
        else:
            yield path


def read_images(images: Iterable[Path], model: LoadedModel, refused: Callable[[Path, str], None]) -> Iterator[Read]:
    """Yield the images that can be read, as the model sees them: of a Segmenter at their own size, of others uint8 [S, S, 3].

    Calls `refused` with each other one and why.
    """
    for path in images:
        try:
            image = open_image(path)
        except DataError as error:
            refused(path, str(error))
        else:
            yield path, image if model.segments else fitted(image, model.exported.preprocess)


def classified(
    model: LoadedModel, images: Iterable[Read], labels: Sequence[str], templates: Sequence[str], softmax: bool
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield every image with the probabilities [C] of the labels, a batch at a time."""
    images = iter(images)
    while batch := list(islice(images, BATCH)):
        paths, pixels = zip(*batch, strict=True)
        yield from zip(paths, model.classify(pixels, labels, templates, softmax), strict=True)


def overlays_of_masks(
    model: LoadedModel, images: Iterable[Read], out: Path
) -> Iterator[tuple[Path, Path, dict[str, float]]]:
    """Segment images one by one. Yields an image, the PNG written to `out`, and the shares of the labels in it, largest first."""
    taken: set[str] = set()
    for path, image in images:
        (mask,) = model.segment(image)
        name = next(name for name in _names(path.stem) if name not in taken)
        taken.add(name)
        content = io.BytesIO()
        drawn_mask(image, mask, model.labels).save(content, "PNG")
        write_bytes_whole(out / name, content.getvalue())
        yield path, out / name, shares_of(mask, model.labels)


def _names(stem: str) -> Iterator[str]:
    """Yield names for an overlay; images of one name may come from several folders."""
    yield f"{stem}.png"
    yield from (f"{stem}-{number}.png" for number in count(2))


def labels_of_server(server: Server) -> list[str] | None:
    """Return the labels of a served classifier; None for a CLIP, which takes any labels."""
    with Client(server.url, timeout=server.timeout) as client:
        return client.labels()


def predict_with_server(
    server: Server,
    images: Iterable[Path],
    labels: Sequence[str],
    known: Sequence[str] | None,
    templates: Sequence[str],
    softmax: bool,
    progress: bool,
) -> Iterator[Answer]:
    """Yield an answer per image, in order, as they arrive; a failed image does not affect the others.

    `known` are the labels of a served classifier, see `labels_of_server`. It takes no labels and has no use for
    `templates`: `labels` are then selected from its answers. Raises DataError for a label that it does not know.
    """
    columns = None if known is None else label_columns(known, labels)
    with Client(server.url, timeout=server.timeout, in_flight=server.in_flight, progress=progress) as client:
        if columns is None:
            yield from client.classified(images, labels, templates, softmax)
            return
        for answer in client.classified(images):
            yield answer if answer.value is None else replace(answer, value=shares_among(answer.value, columns))
