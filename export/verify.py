"""Run the self-tests of exported files on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipress.errors import ArtifactError, ExportError
from clipress.export import metadata, onnx_file
from clipress.runtime.export_folder import DESCRIPTION, read_export
from clipress.runtime.onnx_session import check, metadata_of, open_session, runs_exactly


@dataclass(frozen=True)
class Verified:
    """A file that passed its self-test."""

    path: Path
    precision: str
    least_cosine: float
    """Between its outputs and those of exact arithmetic."""
    exact_mode: bool
    """Whether it runs in ONNX Runtime's exact mode."""
    milliseconds: float
    """Of the self-test."""


def verify(source: Path) -> Iterator[Verified]:
    """Run the self-test of one ONNX file, or of every file of an export or run folder, on the CPU.

    Raises ArtifactError for a folder without exported files or with damaged ones, ExportError for the first file that
    fails its self-test or has none.
    """
    for path in _files(source):
        try:
            about = metadata.read_metadata(onnx_file.read(path)) or {}
        except Exception as error:  # Protobuf's errors have no common type.
            raise ArtifactError(f"{path} is not a readable ONNX file: {error}.") from None
        if "self_test" not in about:
            raise ExportError(
                f"{path} has no self-test: it was exported by an earlier clipress, or by another tool. Export it "
                "again: clipress export RUN"
            )
        precision = str(about.get("precision", ""))
        session = open_session(path, float16="16" in precision)
        start = time.perf_counter()
        found = check(session, path, metadata_of(session))
        taken = 1000 * (time.perf_counter() - start)
        yield Verified(path, precision, 0.0 if found is None else found, runs_exactly(session), taken)


def _files(source: Path) -> list[Path]:
    if source.suffix == ".onnx":
        if not source.is_file():
            raise ArtifactError(f"{source} does not exist.")
        return [source]
    folders = [source] if (source / DESCRIPTION).is_file() else sorted((source / "export").glob("*/"))
    found: list[Path] = []
    for folder in folders:
        if (folder / DESCRIPTION).is_file():
            read_export(folder)  # It checks the hashes.
            found += sorted(folder.glob("*.onnx"))
    if not found:
        raise ArtifactError(
            f"{source} has no exported files: expected an export folder (with export.json), a run folder that has been "
            "exported, or an ONNX file."
        )
    return found
