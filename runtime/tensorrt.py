"""TensorRT engines: find TensorRT and a GPU, check that a plan fits them, load it and run it.

    image.nvidia-h200.trt10.16.1.11.fp16.engine        the plan
    image.nvidia-h200.trt10.16.1.11.fp16.engine.json   its sidecar: what it is, where it runs, its hash
    image.nvidia-h200.trt10.16.1.11.fp16.engine.log    the builder's log

A plan is executable code: it is loaded only if its sidecar says that these bytes were built for this TensorRT and this
GPU. That catches mistakes and damage; it does not make a folder from an untrusted source safe. Written against the
Python API of TensorRT 10.12 to 11.4.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from clipress.errors import ArtifactError, BackendMissing, ExportError, how_to_install
from clipress.recipe import read_typed
from clipress.runtime.cuda import Cuda, open_cuda
from clipress.runtime.graph import Arrays

OLDEST = (10, 12)
INSTALL = how_to_install("tensorrt")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """TensorRT and a GPU that it supports."""

    trt: Any
    cuda: Cuda

    @property
    def version(self) -> str:
        """TensorRT's version, such as 10.16.1.11."""
        return str(self.trt.__version__)

    def __str__(self) -> str:
        return f"TensorRT {self.version} on {self.cuda.gpu} (compute capability {_dotted(self.cuda.capability)})"


def find_machine() -> Machine:
    """Return TensorRT and the GPU of this machine. Raises BackendMissing with what is missing and how to get it."""
    missing, trt, cuda = [], None, None
    try:
        trt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        missing.append(f"TensorRT is not installed ({error}): {INSTALL}")
    except (ImportError, OSError, RuntimeError) as error:
        missing.append(f"TensorRT is installed, but its libraries do not load ({error}); reinstall it: {INSTALL}")
    else:
        if numbers(getattr(trt, "__version__", "0"))[:2] < OLDEST:
            found = getattr(trt, "__version__", "of an unknown version")
            missing.append(f"TensorRT {found} is installed, 10.12 or later is required: {INSTALL}")
    try:
        cuda = open_cuda()
    except BackendMissing as error:
        missing.append(f"no NVIDIA GPU is usable ({error}); check nvidia-smi, the driver may be missing or too old")
    if not missing:
        try:
            log = new_log(trt)
            create(trt.Runtime, log)
        except BackendMissing as error:
            missing.append(str(error))
    if missing:
        raise BackendMissing("TensorRT cannot be used on this machine: " + "; and ".join(missing) + ".")
    return Machine(trt, cuda)


def create(kind: Callable[[Any], Any], log: Any) -> Any:
    """Create a Builder or Runtime. Raises BackendMissing where TensorRT finds no GPU (CUDA errors 35 and 100)."""
    try:
        return kind(log)
    except TypeError as error:  # "factory function returned nullptr"; only the log has the reason.
        reason = "; ".join(log.lines) or str(error)
        raise BackendMissing(
            f"TensorRT finds no usable GPU ({reason}); check nvidia-smi, the driver may be missing or too old"
        ) from None


def new_log(trt: Any) -> Any:
    """Return a logger that keeps TensorRT's messages up to INFO, and those about sparsity, in `lines`."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.INFO) or message.startswith("(Sparsity)"):
                self.lines.append(f"[{severity.name}] {message}")

    return Log()


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(str(part) for part in capability)


class Profile(BaseModel):
    """The smallest, optimal and largest shape of one input of an engine."""

    min: Shape = Field(min_length=1)
    opt: Shape = Field(min_length=1)
    max: Shape = Field(min_length=1)

    def has(self, shape: Shape) -> bool:
        """Return whether a shape is within the profile."""
        sides = zip(self.min, shape, self.max, strict=False)
        return len(shape) == len(self.min) and all(low <= side <= high for low, side, high in sides)


class Sidecar(BaseModel):
    """The description beside a plan; a plan itself keeps nothing of the ONNX file's metadata."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    tower: str
    """The graph's name."""
    precision: str
    tensorrt: str
    gpu: str
    compute_capability: tuple[int, int]
    version_compatible: bool
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"]
    onnx_sha256: str
    """Of the exported file, before its precision was lowered."""
    plan_sha256: str
    profiles: dict[str, Profile] = Field(min_length=1)
    """By input."""
    settings: dict[str, Any]
    sparse_layers: dict[str, int] = {}
    """Numbers of layers that are eligible for sparse kernels and that use them, from the builder's log."""
    model: dict[str, Any] = {}
    """The ONNX file's clipress metadata: preprocessing, tokenizer, logit scale, lineage."""
    parity: dict[str, float] = {}
    """The comparison with ONNX Runtime."""
    clipress: str

    @model_validator(mode="before")
    @classmethod
    def _of_one_input(cls, given: Any) -> Any:
        """Read earlier sidecars: their engines have one input, which they do not name."""
        if isinstance(given, Mapping) and "profiles" not in given and "profile" in given:
            return {**given, "profiles": {"": given["profile"]}}
        return given

    @property
    def profile(self) -> Profile:
        """The first input's profile; all inputs have its batches."""
        return next(iter(self.profiles.values()))

    @property
    def is_for(self) -> str:
        """What the engine was built for, in words."""
        return f"TensorRT {self.tensorrt} on {self.gpu} (compute capability {_dotted(self.compute_capability)})"

    def fits(self, machine: Machine) -> bool:
        """Return whether the engine runs on a machine."""
        built, here = numbers(self.tensorrt), numbers(machine.version)
        version = built == here or (self.version_compatible and built <= here)
        capability = tuple(machine.cuda.capability)
        gpu = {
            "none": (self.gpu, self.compute_capability) == (machine.cuda.gpu, capability),
            "same_compute_capability": self.compute_capability == capability,
            "ampere_plus": capability >= (8, 0),
        }
        return version and gpu[self.hardware_compatibility]


def engine_path(folder: Path, graph: str, precision: str, machine: Machine) -> Path:
    """Return the path of a graph's engine for a machine."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine.cuda.gpu.lower()).strip("-")
    return folder / f"{graph}.{gpu}.trt{machine.version}.{precision}.engine"


def read_sidecar(plan: Path) -> Sidecar:
    """Read the sidecar of a plan. Raises ArtifactError."""
    path = plan.with_name(f"{plan.name}.json")
    again = "Build it here: clipress export RUN --tensorrt"
    if not plan.is_file():
        others = ", ".join(sorted(file.name for file in plan.parent.glob("*.engine"))) or "none"
        raise ArtifactError(f"Engine {plan} does not exist; found in its folder: {others}. {again}")
    try:
        return read_typed(Sidecar, path, f"The engine is not loaded. {again}")
    except FileNotFoundError:
        raise ArtifactError(
            f"Engine {plan} has no {path.name} beside it. A plan is executable code and is not loaded without one. "
            f"{again}"
        ) from None


def read_plan(plan: Path) -> tuple[bytes, Sidecar]:
    """Read a plan and its sidecar. Raises ArtifactError when the sidecar is missing or describes another plan."""
    sidecar = read_sidecar(plan)
    content = plan.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sidecar.plan_sha256:
        raise ArtifactError(
            f"{plan} ({len(content)} bytes) is truncated or changed: its sha256 starts with {found[:12]}, its sidecar "
            f"says {sidecar.plan_sha256[:12]}. It is not loaded. Build it here: clipress export RUN --tensorrt"
        )
    return content, sidecar


def load_engine(plan: Path, machine: Machine | None = None) -> Engine:
    """Load an engine.

    Raises ArtifactError when its sidecar is missing or describes another plan, TensorRT or GPU, and BackendMissing when
    this machine has no TensorRT or GPU.
    """
    content, sidecar = read_plan(plan)
    machine = machine or find_machine()
    if not sidecar.fits(machine):
        raise ArtifactError(
            f"Engine {plan} is for {sidecar.is_for}; this is {machine}. Build it here: clipress export RUN --tensorrt"
        )
    return Engine(content, machine, plan.name, own_code=sidecar.version_compatible)


class Engine:
    """A plan on the GPU, a function from inputs to outputs; one stream.

    Args:
        plan: from a trusted place; `load_engine` checks that.
        name: for messages.
        own_code: allow the plan's own runtime, which version-compatible plans contain.
    """

    def __init__(self, plan: bytes, machine: Machine, name: str, own_code: bool = False) -> None:
        self.machine, self.name = machine, name
        trt, self._log = machine.trt, new_log(machine.trt)
        self._runtime = create(trt.Runtime, self._log)
        self._runtime.engine_host_code_allowed = own_code
        engine = self._engine = self._runtime.deserialize_cuda_engine(plan)
        self.require(engine is not None, "be loaded")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [one for one in names if engine.get_tensor_mode(one) == trt.TensorIOMode.INPUT]
        self.outputs = [one for one in names if one not in self.inputs]
        if not self.inputs or not self.outputs:
            raise ExportError(
                f"{name}: expected an engine with inputs and outputs, found {', '.join(names) or 'none'}."
            )
        self.profiles = {one: self._profile(one) for one in self.inputs}
        self.stream = machine.cuda.stream()
        self._queries: dict[tuple[Shape, ...], Query] = {}

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Compute the outputs of any number of rows, in parts that the profile allows; a short part is padded."""
        profile = self.profiles[self.inputs[0]]
        low, high, count = profile.min[0], profile.max[0], len(inputs[self.inputs[0]])
        done: dict[str, list[np.ndarray]] = {name: [] for name in self.outputs}
        for start in range(0, count, high):
            size = min(high, count - start)
            part = {name: _padded(inputs[name][start : start + size], low) for name in self.inputs}
            shapes = tuple(rows.shape for rows in part.values())
            if shapes not in self._queries:
                self._queries[shapes] = self.query(part)
            query = self._queries[shapes]
            query.load(part)
            query()
            for name, rows in done.items():
                rows.append(query.outputs[name].host[:size].copy())
        return {name: np.concatenate(rows) for name, rows in done.items()}

    def query(self, inputs: Arrays, cuda_graph: bool = False) -> Query:
        """Return one inference on these inputs, with its own buffers. Raises ExportError outside the profile."""
        for name, profile in self.profiles.items():
            shape = np.shape(inputs[name])
            if not profile.has(shape):
                raise ExportError(
                    f"{self.name}: expected {name} from {list(profile.min)} to {list(profile.max)}, found "
                    f"{list(shape)}. Choose another batch, or build the engine with another export.tensorrt.batch."
                )
        return Query(self, inputs, cuda_graph)

    def context(self) -> Any:
        """Return a new execution context with scratch memory of its own."""
        context = self._engine.create_execution_context()
        self.require(context is not None, "create a context")
        return context

    def dtype(self, tensor: str) -> np.dtype:
        """Return a tensor's type."""
        return np.dtype(self.machine.trt.nptype(self._engine.get_tensor_dtype(tensor)))

    def require(self, done: bool, what: str) -> None:
        """Raise ExportError, with TensorRT's last messages, if a call failed."""
        if not done:
            reason = "; ".join(self._log.lines[-3:]) or "TensorRT gives no reason"
            raise ExportError(f"{self.name} could not {what}: {reason}.")

    def _profile(self, tensor: str) -> Profile:
        shapes = self._engine.get_tensor_profile_shape(tensor, 0)
        return Profile(**{key: tuple(shape) for key, shape in zip(("min", "opt", "max"), shapes, strict=True)})


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    """Return rows, with zeros up to `count` of them."""
    missing = max(0, count - len(rows))
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)]) if missing else rows


class Query:
    """One inference: copy in, compute, copy out, on the engine's stream. A call returns with the outputs on the host.

    Copies use pinned memory. With `cuda_graph` the computing part is captured once and launched as one. The execution
    context is not shared, because a captured graph must not see another shape.
    """

    def __init__(self, engine: Engine, inputs: Arrays, cuda_graph: bool) -> None:
        cuda, context = engine.machine.cuda, engine.context()
        self.engine, self._context = engine, context
        shapes = {name: np.shape(inputs[name]) for name in engine.inputs}
        for name, shape in shapes.items():
            engine.require(context.set_input_shape(name, shape), f"set the shape of {name}")
        shapes |= {name: tuple(context.get_tensor_shape(name)) for name in engine.outputs}
        buffers = {name: cuda.buffer(shape, engine.dtype(name)) for name, shape in shapes.items()}
        for name, buffer in buffers.items():
            engine.require(context.set_tensor_address(name, buffer.address), f"set the address of {name}")
        self.inputs = {name: buffers[name] for name in engine.inputs}
        self.outputs = {name: buffers[name] for name in engine.outputs}
        self._events = [cuda.event() for _ in range(4)]
        self._launch = self._enqueue
        self.load(inputs)
        if cuda_graph:
            self()  # TensorRT requires a plain run before a capture.
            self._launch = cuda.capture(self._enqueue, engine.stream)

    def load(self, inputs: Arrays) -> None:
        """Put other inputs of the same shapes into the host buffers."""
        for name, buffer in self.inputs.items():
            buffer.host[...] = inputs[name]

    def _enqueue(self) -> None:
        handle = self.engine.machine.cuda.handle(self.engine.stream)
        self.engine.require(self._context.execute_async_v3(handle), "run")

    def __call__(self) -> None:
        """Run, and wait until the outputs are in host memory."""
        stream = self.engine.stream
        before, ready, computed, after = self._events
        before.record(stream)
        for buffer in self.inputs.values():
            buffer.upload(stream)
        ready.record(stream)
        self._launch()
        computed.record(stream)
        for buffer in self.outputs.values():
            buffer.download(stream)
        after.record(stream)
        stream.synchronize()

    def phases(self) -> dict[str, float]:
        """Return the times of the last run by CUDA events, in ms: in, compute, out and their sum, trtexec's latency."""
        marks = zip(self._events, self._events[1:], strict=False)
        times = [self.engine.machine.cuda.elapsed_ms(start, end) for start, end in marks]
        return dict(zip(("h2d_ms", "compute_ms", "d2h_ms"), times, strict=True)) | {"latency_ms": sum(times)}
