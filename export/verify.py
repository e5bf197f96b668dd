"""Exported files on this machine: does each compute here what its weights say?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from clipress.errors import ArtifactError, ExportError
from clipress.export import metadata
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import check, open_session, runs_exactly, told_by


@dataclass(frozen=True)
class Verified:
    """A file that passed its self-test."""

    path: Path
    precision: str
    least_cosine: float
    """Of its outputs and those of exact arithmetic."""
    exact_mode: bool
    """Whether ONNX Runtime had to be put into its exact mode for that."""
    milliseconds: float
    """What the self-test took."""


def verify(source: Path) -> Iterator[Verified]:
    """Run the self-test of every ONNX file of an export folder, of all of a run's, or of one file, on the CPU.

    Raises ArtifactError for a folder without exported files and for damaged ones, ExportError for the first file that fails
    its self-test or has none.
    """
    for path in _files(source):
        try:
            about = metadata.told(onnx.load(path, load_external_data=False)) or {}
        except Exception as error:  # protobuf's own errors have no common type
            raise ArtifactError(f"{path} is not a readable ONNX file: {error}.") from None
        if "self_test" not in about:
            raise ExportError(
                f"{path} carries no self-test: it was exported by an earlier clipress, or by another tool. Make it again: "
                "clipress export RUN"
            )
        precision = str(about.get("precision", ""))
        session = open_session(path, float16="16" in precision)
        start = time.perf_counter()
        found = check(session, path, told_by(session))
        taken = 1000 * (time.perf_counter() - start)
        yield Verified(path, precision, 0.0 if found is None else found, runs_exactly(session), taken)


def _files(source: Path) -> list[Path]:
    if source.suffix == ".onnx":
        if not source.is_file():
            raise ArtifactError(f"{source} does not exist.")
        return [source]
    folders = [source] if (source / "export.json").is_file() else sorted((source / "export").glob("*/"))
    found: list[Path] = []
    for folder in folders:
        if (folder / "export.json").is_file():
            read_export(folder)  # whole, by its hashes
            found += sorted(folder.glob("*.onnx"))
    if not found:
        raise ArtifactError(
            f"{source} holds no exported files: expected an export folder (with export.json), a run folder that has been "
            "exported, or an ONNX file."
        )
    return found
