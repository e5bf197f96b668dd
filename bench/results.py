"""The types of results.json, which is written and read here alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from clipress.artifact import read_header
from clipress.errors import ArtifactError
from clipress.recipe import read_typed
from clipress.runtime.measured import AGAIN, MeasuredRow, Measurement
from clipress.runtime.sessions import RUNTIMES
from clipress.storage import write_text_whole

SCHEMA_VERSION = 1
UNREAD = "unread"  # of an evaluation set, how many records could not be read and were left out


class Case(NamedTuple):
    """A timed case: one graph at one batch size, with whole texts or with short ones."""

    graph: str
    batch: int
    ids: int = 0
    """Length of texts without padding; 0 for whole ones, and for graphs without texts."""

    def __str__(self) -> str:
        return f"{self.graph} tower, {self.size}"

    @property
    def size(self) -> str:
        """The batch, and the length of texts if they are short, in words."""
        return f"batch {self.batch}" + (f", {self.ids} ids" if self.ids else "")


class Strict(BaseModel):
    """Base of everything in the file: frozen, no unknown keys. Keys that were never set are not written."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Latency(Measurement):
    """trtexec's figures of one graph at one batch size, and the ratio to the first row's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_ms: float
    max_ms: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    cv_percent: float | None = None
    """Coefficient of variation."""
    throughput_qps: float
    """Queries per second; a query is one batch."""
    enqueue_mean_ms: float | None = None
    """Enqueue times exist on devices only."""
    enqueue_median_ms: float | None = None
    enqueue_p99_ms: float | None = None
    iterations: int
    """Queries that were counted."""
    rounds: int | None = None
    speed_up: float | None = None
    """Times as fast as the first row, paired by rounds."""
    speed_up_low: float | None = None
    """Ends of the 95 % interval; None with too few rounds."""
    speed_up_high: float | None = None

    @property
    def case(self) -> Case:
        return Case(self.tower, self.batch, self.ids)


class LayerCost(Strict):
    """The exact costs of one layer."""

    tower: str
    name: str
    """Path of the module."""
    params: int
    macs: int
    """Multiply-accumulates of one item."""


class Spent(Strict):
    """The time that a kind of operator, or a layer, takes in a query."""

    name: str
    median_ms: float
    percent: float
    """Percent of the query."""
    nodes: int


class Profile(Strict):
    """ONNX Runtime's profile of one graph; both lists in descending order of time."""

    tower: str
    """The graph's name."""
    batch: int
    queries: int
    operators: tuple[Spent, ...]
    layers: tuple[Spent, ...]

    @property
    def case(self) -> Case:
        return Case(self.tower, self.batch)


class Row(MeasuredRow):
    """One model on one backend: what it is, what it costs, how good and how fast it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact: str
    """Name of the artifact's folder."""
    task: str = "clip"
    """Results of version 0.1 do not name the task; all of them are of CLIPs."""
    device: str = "cpu"
    precision: str
    params: int | None = None
    params_without_embeddings: int | None = None
    block_params: int | None = None
    macs: int | None = None
    macs_per_tower: dict[str, int] = Field(default_factory=dict)
    layers: tuple[LayerCost, ...] = ()
    bytes: int
    """Size of the files it runs from."""
    text_ids: int | None = None
    """Length of a whole text in ids; None for models that read none."""
    exact_mode: bool = False
    """Whether ONNX Runtime ran in exact mode, since 8-bit weights overflow on this CPU."""
    parity: dict[str, Any] = Field(default_factory=dict)
    """The export's comparison with torch."""
    accuracy: dict[str, float] = Field(default_factory=dict)
    """`<set>/<metric>` -> percent; empty if accuracy was not measured."""
    accuracy_se: dict[str, float] = Field(default_factory=dict)
    """Standard errors, in points."""
    block_params_kept: float | None = None
    """Fraction of the first row's."""
    profiles: tuple[Profile, ...] = ()
    latency: tuple[Latency, ...] = ()

    def timing(self, case: Case | None) -> Latency | None:
        """Return the latency of a case, None if it was not measured."""
        return next((one for one in self.latency if one.case == case), None)


class CaseRatio(Strict):
    """The speed-up of a row over the one it was made from."""

    tower: str
    """The graph's name."""
    batch: int
    ids: int = 0
    """As of a case."""
    speed_up: float
    speed_up_low: float | None
    speed_up_high: float | None


class Verdict(Strict):
    """Whether INT8, 2:4 or another runtime pays off on this machine."""

    stage: str
    against: str
    """The row it was made from, or what the first runtime keeps."""
    method: str
    faster: bool | None
    """None if no difference was seen, or if there were too few rounds."""
    keep: str | None
    """The row to keep; None if the measurement cannot tell."""
    loss: float | None
    """Points of accuracy lost; None if accuracy was not measured."""
    text: str
    cases: tuple[CaseRatio, ...]


class Kept(Strict):
    """The artifact to serve in place of a run's last one, on one backend."""

    backend: str
    artifact: str
    hash: str
    of: str
    """The last artifact."""
    of_hash: str
    preferred: bool = True
    """Whether this is the runtime to use, of several."""
    text: str


class Conditions(BaseModel):
    """Everything that a number depends on. Keys are shown in reports in this order."""

    model_config = ConfigDict(frozen=True, extra="allow")

    recipe: str | None = None
    command: str | None = None
    date: str | None = None
    clipress: str | None = None
    onnxruntime: str | None = None
    openvino: str | None = None
    torch: str | None = None
    numpy: str | None = None
    python: str | None = None
    system: str | None = None
    processor: str | None = None
    cores: int | None = None
    isa: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    load_average: tuple[float, ...] | None = None
    threads: int | None = None
    cpu_affinity: tuple[int, ...] | str | None = None
    omp_num_threads: str | None = None
    backends: tuple[str, ...] = ()
    dtype_of_torch: str | None = None
    warm_up_ms: int | None = None
    duration_ms: int | None = None
    iterations_at_least: int | None = None
    interleaved: bool | None = None
    turn_ms: float | None = None
    sessions: str | None = None
    order: str | None = None
    clock: str | None = None
    transfers: str | None = None
    ratios: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    """By evaluation set: its items, how many records were left out as `unread`, its fingerprint."""
    protocol: str | None = None

    def known(self) -> dict[str, Any]:
        """Return what was recorded, by name."""
        return self.model_dump(mode="json", exclude_unset=True)


class Results(Strict):
    """The content of results.json; the first row is the reference."""

    schema_version: Literal[1]
    conditions: Conditions
    rows: tuple[Row, ...] = Field(min_length=1)
    verdicts: tuple[Verdict, ...] = ()
    kept: tuple[Kept, ...] = ()


def write_results(results: Results, folder: Path) -> Path:
    """Write results.json."""
    path = folder / "results.json"
    write_text_whole(path, json.dumps(results.model_dump(mode="json", exclude_unset=True), indent=1) + "\n")
    return path


def read_results(path: Path) -> Results:
    """Read a results.json. Raises ArtifactError if it is missing or damaged."""
    try:
        return read_typed(Results, path, AGAIN)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file. Measure first: clipress bench RUN") from None


def read_kept(results: Path, run: Path, last: str, runtime: str | None = None) -> Kept | None:
    """Return what a run's results.json keeps of its last artifact, in a runtime or in the preferred one.

    None if nothing was measured, or if the artifacts have been made again since.
    """
    try:
        kept = next(
            one
            for one in read_results(results).kept
            if one.of == last and (one.backend == runtime if runtime else one.preferred and one.backend in RUNTIMES)
        )
        expected = {kept.of: kept.of_hash, kept.artifact: kept.hash}
        current = {name: read_header(run / name)["lineage"][-1]["hash"] for name in expected}
    except (ArtifactError, LookupError, StopIteration):
        return None
    return kept if current == expected else None
