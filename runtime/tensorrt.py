"""TensorRT engines as every room uses them: is this machine able to, whose is a plan, load it, run it.

    image.nvidia-h200.trt10.16.1.11.fp16.engine        the plan
    image.nvidia-h200.trt10.16.1.11.fp16.engine.json   its sidecar: what it is, what it is for, what it must hash to
    image.nvidia-h200.trt10.16.1.11.fp16.engine.log    what the builder said

A plan is executable code: it is loaded only when the sidecar beside it says the very same bytes were built for this
TensorRT and this GPU. That catches mistakes and damage; a folder from strangers stays a folder from strangers.
Written against the Python API of TensorRT 10.12 to 11.4.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from clipress.errors import ArtifactError, BackendMissing, ExportError
from clipress.recipe import first_problem
from clipress.runtime.cuda import Cuda, open_cuda
from clipress.storage import read_json

OLDEST = (10, 12)
INSTALL = "pip install 'clipress[tensorrt]'"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """TensorRT and a GPU that it works on."""

    trt: Any
    cuda: Cuda

    @property
    def version(self) -> str:
        """TensorRT's, such as 10.16.1.11."""
        return str(self.trt.__version__)

    def __str__(self) -> str:
        return f"TensorRT {self.version} on {self.cuda.gpu} (compute capability {_dotted(self.cuda.capability)})"


def find_machine() -> Machine:
    """Return TensorRT and the GPU here. Raises BackendMissing with all that is missing and how to get it."""
    missing, trt, cuda = [], None, None
    try:
        trt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        missing.append(f"TensorRT is not installed ({error}); do: {INSTALL}")
    except (ImportError, OSError, RuntimeError) as error:
        missing.append(f"TensorRT is installed, but its libraries do not load ({error}); install it anew: {INSTALL}")
    else:
        if numbers(getattr(trt, "__version__", "0"))[:2] < OLDEST:
            found = getattr(trt, "__version__", "of an unknown version")
            missing.append(f"TensorRT {found} is installed, 10.12 or later is needed; do: {INSTALL}")
    try:
        cuda = open_cuda()
    except BackendMissing as error:
        missing.append(
            f"no NVIDIA GPU is usable ({error}); see what nvidia-smi says, a driver may be missing or too old"
        )
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
    """Make a Builder or Runtime. Raises BackendMissing where TensorRT finds no usable GPU (CUDA errors 35 and 100)."""
    try:
        return kind(log)
    except TypeError as error:  # "factory function returned nullptr": why, only the log says
        said = "; ".join(log.lines) or str(error)
        raise BackendMissing(
            f"TensorRT finds no usable GPU ({said}); see what nvidia-smi says, a driver may be missing or too old"
        ) from None


def new_log(trt: Any) -> Any:
    """Return a logger that keeps what TensorRT says, up to INFO, and what it says about sparsity, in `lines`."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.INFO) or message.startswith("(Sparsity)"):
                self.lines.append(f"[{severity.name}] {message}")

    return Log()


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, to be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(str(part) for part in capability)


class Profile(BaseModel):
    """The smallest, best and largest shape of an engine's input."""

    min: Shape
    opt: Shape
    max: Shape


class Sidecar(BaseModel):
    """What is written beside a plan. It is all that is left of the ONNX file's metadata."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    tower: str
    precision: str
    tensorrt: str
    gpu: str
    compute_capability: tuple[int, int]
    version_compatible: bool
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"]
    onnx_sha256: str
    """Of the exported file, before its precision was lowered."""
    plan_sha256: str
    profile: Profile
    settings: dict[str, Any]
    sparse_layers: dict[str, int] = {}
    """How many layers could have run sparse, and how many do, as the builder says."""
    model: dict[str, Any] = {}
    """clipress's metadata of the ONNX file: preprocessing, tokenizer, logit scale, lineage."""
    parity: dict[str, float] = {}
    """What the comparison with ONNX Runtime gave."""
    clipress: str

    @property
    def is_for(self) -> str:
        """Say what an engine was built for, for messages."""
        return f"TensorRT {self.tensorrt} on {self.gpu} (compute capability {_dotted(self.compute_capability)})"

    def fits(self, machine: Machine) -> bool:
        """Tell whether the engine may run here."""
        built, here = numbers(self.tensorrt), numbers(machine.version)
        version = built == here or (self.version_compatible and built <= here)
        capability = tuple(machine.cuda.capability)
        gpu = {
            "none": (self.gpu, self.compute_capability) == (machine.cuda.gpu, capability),
            "same_compute_capability": self.compute_capability == capability,
            "ampere_plus": capability >= (8, 0),
        }
        return version and gpu[self.hardware_compatibility]


def engine_path(folder: Path, tower: str, precision: str, machine: Machine) -> Path:
    """Return where the engine for this machine belongs."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine.cuda.gpu.lower()).strip("-")
    return folder / f"{tower}.{gpu}.trt{machine.version}.{precision}.engine"


def read_sidecar(plan: Path) -> Sidecar:
    """Read what is beside a plan and check the plan against it. Raises ArtifactError."""
    path = plan.with_name(f"{plan.name}.json")
    again = "Build it here: clipress export RUN --tensorrt"
    if not plan.is_file():
        others = ", ".join(sorted(file.name for file in plan.parent.glob("*.engine"))) or "none"
        raise ArtifactError(f"Engine {plan} was asked for, and there is no such file (there are: {others}). {again}")
    try:
        sidecar = Sidecar.model_validate(read_json(path))
    except FileNotFoundError:
        raise ArtifactError(
            f"Engine {plan} has no {path.name} beside it. A plan is executable code, and nothing says whose this one is: "
            f"it is not loaded. {again}"
        ) from None
    except ValidationError as error:
        raise ArtifactError(f"{path}, {first_problem(error)}. The engine is not loaded. {again}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not readable ({error}). The engine is not loaded. {again}") from None
    return sidecar


def read_plan(plan: Path) -> tuple[bytes, Sidecar]:
    """Read a plan that its sidecar vouches for, and the sidecar. Raises ArtifactError when it is missing or of another."""
    sidecar = read_sidecar(plan)
    content = plan.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sidecar.plan_sha256:
        raise ArtifactError(
            f"{plan} ({len(content)} bytes) is truncated or changed: its sha256 starts with {found[:12]}, its sidecar says "
            f"{sidecar.plan_sha256[:12]}. It is not loaded. Build it here: clipress export RUN --tensorrt"
        )
    return content, sidecar


def load_engine(plan: Path, machine: Machine | None = None) -> Engine:
    """Load an engine that its sidecar vouches for.

    Raises ArtifactError when the sidecar is missing or speaks of another plan, TensorRT or GPU, and BackendMissing when
    there is none of these here.
    """
    content, sidecar = read_plan(plan)
    machine = machine or find_machine()
    if not sidecar.fits(machine):
        raise ArtifactError(
            f"Engine {plan} is for {sidecar.is_for}; here is {machine}. Build it here: clipress export RUN --tensorrt"
        )
    return Engine(content, machine, plan.name, own_code=sidecar.version_compatible)


class Engine:
    """A plan on the GPU: one input, one output, one stream.

    Args:
        plan: from a trusted place; `load_engine` sees to that.
        name: for messages.
        own_code: let the plan bring its own runtime, as version-compatible ones do.
    """

    def __init__(self, plan: bytes, machine: Machine, name: str, own_code: bool = False) -> None:
        self.machine, self.name = machine, name
        trt, self._log = machine.trt, new_log(machine.trt)
        self._runtime = create(trt.Runtime, self._log)
        self._runtime.engine_host_code_allowed = own_code
        engine = self._engine = self._runtime.deserialize_cuda_engine(plan)
        self.checked(engine is not None, "be loaded")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        takes = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        if len(takes) != 1 or len(names) != 2:
            raise ExportError(f"{name}: one input and one output are asked for, found {', '.join(names)}.")
        self.takes, self.gives = takes[0], next(n for n in names if n not in takes)
        shapes = engine.get_tensor_profile_shape(self.takes, 0)
        self.profile = Profile(**{key: tuple(s) for key, s in zip(("min", "opt", "max"), shapes, strict=True)})
        self.stream = machine.cuda.stream()
        self._queries: dict[Shape, Query] = {}

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Encode any number of rows, in parts the profile allows; a part that is too small is filled up. Returns [B, D]."""
        low, high = self.profile.min[0], self.profile.max[0]
        done = []
        for start in range(0, len(batch), high):
            part = batch[start : start + high]
            shape = (max(len(part), low), *part.shape[1:])
            if shape not in self._queries:
                self._queries[shape] = self.query(shape)
            query = self._queries[shape]
            query.input.host[: len(part)] = part
            query()
            done.append(query.output.host[: len(part)].copy())
        return np.concatenate(done)

    def query(self, shape: Shape, cuda_graph: bool = False) -> Query:
        """Return one inference on buffers of its own. Raises ExportError for a shape outside the profile."""
        low, high = self.profile.min, self.profile.max
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            raise ExportError(
                f"{self.name} takes {self.takes} from {list(low)} to {list(high)}, asked for is {list(shape)}. "
                "Choose another batch, or build it anew with other export.tensorrt.batch."
            )
        return Query(self, shape, cuda_graph)

    def context(self) -> Any:
        """Return an execution context of its own, scratch memory included."""
        context = self._engine.create_execution_context()
        self.checked(context is not None, "have a context")
        return context

    def dtype(self, tensor: str) -> np.dtype:
        """Return a tensor's type."""
        return np.dtype(self.machine.trt.nptype(self._engine.get_tensor_dtype(tensor)))

    def checked(self, done: bool, what: str) -> None:
        """Raise ExportError, with what TensorRT said last, when something was not done."""
        if not done:
            said = "; ".join(self._log.lines[-3:]) or "TensorRT does not say why"
            raise ExportError(f"{self.name} could not {what}: {said}.")


class Query:
    """One inference: copy in, compute, copy out, on the engine's stream. Calling it waits for the end.

    Copies use pinned memory. With `cuda_graph` the computing part is recorded once and launched as one. The context is
    its own, since a recorded graph must not see another shape.
    """

    def __init__(self, engine: Engine, shape: Shape, cuda_graph: bool) -> None:
        cuda, context = engine.machine.cuda, engine.context()
        engine.checked(context.set_input_shape(engine.takes, shape), "set its input's shape")
        self.engine, self._context = engine, context
        self.input = cuda.buffer(shape, engine.dtype(engine.takes))
        self.output = cuda.buffer(tuple(context.get_tensor_shape(engine.gives)), engine.dtype(engine.gives))
        engine.checked(context.set_tensor_address(engine.takes, self.input.address), "set its input")
        engine.checked(context.set_tensor_address(engine.gives, self.output.address), "set its output")
        self._events = [cuda.event() for _ in range(4)]
        self._launch = self._enqueue
        if cuda_graph:
            self()  # TensorRT wants a plain run before one is recorded
            self._launch = cuda.capture(self._enqueue, engine.stream)

    def _enqueue(self) -> None:
        handle = self.engine.machine.cuda.handle(self.engine.stream)
        self.engine.checked(self._context.execute_async_v3(handle), "run")

    def __call__(self) -> None:
        """Run, and wait until the output is in host memory."""
        stream = self.engine.stream
        before, ready, computed, after = self._events
        before.record(stream)
        self.input.upload(stream)
        ready.record(stream)
        self._launch()
        computed.record(stream)
        self.output.download(stream)
        after.record(stream)
        stream.synchronize()

    def phases(self) -> dict[str, float]:
        """Return what the last run took, by CUDA events, in ms: in, compute, out and their sum, trtexec's latency."""
        marks = zip(self._events, self._events[1:], strict=False)
        taken = [self.engine.machine.cuda.elapsed_ms(start, end) for start, end in marks]
        return dict(zip(("h2d_ms", "compute_ms", "d2h_ms"), taken, strict=True)) | {"latency_ms": sum(taken)}
