"""The part of results.json that other commands than bench read: latencies, and the models they belong to.

`bench.results` builds its own types on these, so that each key is written down once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat

from clipress.recipe import read_typed

AGAIN = "Measure again: clipress bench RUN"


class Measurement(BaseModel):
    """The latency of one graph at one batch size."""

    model_config = ConfigDict(frozen=True)

    tower: str
    """The graph's name; the key is older than graphs."""
    batch: int
    ids: int = 0
    """Length of texts without padding; 0 for whole ones, and for graphs without texts."""
    threads: int
    """Inside one operator."""
    median_ms: FiniteFloat
    items_per_s: FiniteFloat


class Record(BaseModel):
    """One stage of a model's lineage, with everything that the stage recorded."""

    model_config = ConfigDict(frozen=True, extra="allow")

    stage: str = ""
    kind: str | None = None
    hash: str


class MeasuredRow(BaseModel):
    """One model on one backend."""

    model_config = ConfigDict(frozen=True)

    stage: str
    """The row's label: the artifact, with its run and its backend where there are several."""
    backend: str
    lineage: tuple[Record, ...] = ()
    """From the first stage to the last."""
    latency: Sequence[Measurement]

    @property
    def hash(self) -> str | None:
        """Identity of the measured artifact; None where the results have no lineage."""
        return self.lineage[-1].hash if self.lineage else None


class _File(BaseModel):
    rows: tuple[MeasuredRow, ...]


def read_measurements(path: Path, stage: str, lineage_hash: str, backend: str) -> list[Measurement]:
    """Read what was measured of one artifact on one backend; nothing if the file does not exist or has another model.

    Raises ArtifactError for a damaged file.
    """
    try:
        rows = read_typed(_File, path, AGAIN).rows
    except FileNotFoundError:
        return []
    wanted = (stage, backend, lineage_hash)
    return [one for row in rows if (row.stage, row.backend, row.hash) == wanted for one in row.latency]
