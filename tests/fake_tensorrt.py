"""Fakes of TensorRT 10 and 11 and of CUDA, for machines without them.

A fake has exactly the names of that release's published bindings (tensorrt_api.json): anything else raises
AttributeError, as in the real one. It records every call. Its engines run the parsed ONNX file in ONNX Runtime, so that
the code around an engine runs for real.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import helper

from clipress.runtime.onnx_session import open_session
from clipress.runtime.tensorrt import Machine

API = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text(encoding="utf-8"))
VERSIONS = ("10.12.0.36", "11.4.0.106")


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity


class Recorded:
    """An object that has only the documented names."""

    names: tuple[str, ...] = ()

    def __init__(self, calls: list[tuple]) -> None:
        object.__setattr__(self, "calls", calls)

    def __getattr__(self, name: str) -> Any:
        """Return a documented call that only records itself; refuse other names."""
        if name not in type(self).names:
            raise AttributeError(f"{type(self).__name__} has no '{name}'")

        def call(*arguments: Any) -> None:
            self.calls.append((f"{type(self).__name__}.{name}", *arguments))

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in (*type(self).names, "state"):
            raise AttributeError(f"{type(self).__name__} has no '{name}'")
        self.calls.append((f"{type(self).__name__}.{name}", value))
        object.__setattr__(self, name, value)


class FakeCuda:
    """Host memory that doubles as device memory; a buffer's address is its index in a list."""

    def __init__(self, gpu: str = "NVIDIA H200", capability: tuple[int, int] = (9, 0)) -> None:
        self.gpu, self.capability = gpu, capability
        self.memory: list[np.ndarray] = []
        self.order: list[str] = []
        self.clock = 0.0

    def stream(self) -> Any:
        return SimpleNamespace(synchronize=lambda: self.order.append("wait"))

    def handle(self, stream: Any) -> int:
        return 77

    def event(self) -> Any:
        event = SimpleNamespace(at=None)

        def record(stream: Any) -> None:
            self.clock += 1.0
            event.at = self.clock

        event.record = record
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return end.at - start.at

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> Any:
        host, device = np.zeros(shape, dtype), np.zeros(shape, dtype)
        self.memory.append(device)

        def copy(name: str, to: np.ndarray, source: np.ndarray) -> None:
            self.order.append(name)
            to[...] = source

        return SimpleNamespace(
            host=host,
            address=len(self.memory) - 1,
            upload=lambda stream: copy("upload", device, host),
            download=lambda stream: copy("download", host, device),
        )

    def capture(self, enqueue: Any, stream: Any) -> Any:
        self.order.append("capture")
        return enqueue


def fake_tensorrt(version: str, cuda: FakeCuda) -> ModuleType:
    """Return a fake module of a release. `calls` records the calls to it; `damage` is added to outputs."""
    trt = ModuleType("tensorrt")
    calls: list[tuple] = []
    trt.__version__, trt.calls, trt.ILogger = version, calls, ILogger
    trt.damage, trt.fail, trt.log, trt.parses = 0.0, "", [], True
    for name, members in API[version]["enums"].items():
        setattr(trt, name, enum.IntEnum(name, members))
    trt.nptype = lambda dtype: {trt.DataType.FLOAT: np.float32, trt.DataType.INT64: np.int64}[dtype]
    documented = API[version]["classes"]

    def kind(name: str, **own: Any) -> type:
        assert not own.keys() - documented[name], f"{name} has no {own.keys() - documented[name]}"
        return type(name, (Recorded,), {"names": tuple(documented[name]), **own})

    def make(cls: type, state: Any = None) -> Any:
        made = cls(calls)
        object.__setattr__(made, "state", state)
        return made

    def called(self: Any, name: str, *arguments: Any) -> None:
        calls.append((f"{type(self).__name__}.{name}", *arguments))

    class Memory(bytes):
        """IHostMemory is read through the buffer protocol."""

    def set_timing_cache(self: Any, cache: Any, ignore_mismatch: bool) -> bool:
        called(self, "set_timing_cache", cache.state, ignore_mismatch)
        return cache.state in (b"", b"timings of " + version.encode())

    cache = kind("ITimingCache", serialize=lambda self: Memory(b"timings of " + version.encode()))
    config = kind(
        "IBuilderConfig",
        create_timing_cache=lambda self, blob: make(cache, bytes(blob)),
        set_timing_cache=set_timing_cache,
        add_optimization_profile=lambda self, profile: self.state.update(profile=profile.state),
    )

    def set_shape(self: Any, name: str, *shapes: tuple[int, ...]) -> None:
        called(self, "set_shape", name, *shapes)
        self.state[name] = shapes

    profile = kind("IOptimizationProfile", set_shape=set_shape)
    network = kind("INetworkDefinition")

    def context(self: Any) -> Any:
        return make(execution, {"run": self.state["run"], "shapes": {}, "addresses": {}})

    def set_input_shape(self: Any, name: str, shape: tuple[int, ...]) -> bool:
        self.state["shapes"][name] = tuple(shape)
        return True

    def set_tensor_address(self: Any, name: str, address: int) -> bool:
        self.state["addresses"][name] = address
        return True

    def get_tensor_shape(self: Any, name: str) -> tuple[int, ...]:
        (batch,) = {shape[0] for shape in self.state["shapes"].values()}
        return (batch, *next(put.shape[1:] for put in self.state["run"].get_outputs() if put.name == name))

    def execute(self: Any, handle: int) -> bool:
        called(self, "execute_async_v3", handle)
        cuda.order.append("enqueue")
        memory = {name: cuda.memory[address] for name, address in self.state["addresses"].items()}
        names = [put.name for put in self.state["run"].get_outputs()]
        found = self.state["run"].run(names, {name: memory[name] for name in self.state["shapes"]})
        for name, rows in zip(names, found, strict=True):
            memory[name][...] = rows + trt.damage
        return True

    execution = kind(
        "IExecutionContext",
        set_input_shape=set_input_shape,
        set_tensor_address=set_tensor_address,
        get_tensor_shape=get_tensor_shape,
        execute_async_v3=execute,
    )
    types = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}

    def tensors(self: Any) -> list[Any]:
        return [*self.state["run"].get_inputs(), *self.state["run"].get_outputs()]

    engine = kind(
        "ICudaEngine",
        num_io_tensors=property(lambda self: len(tensors(self))),
        get_tensor_name=lambda self, i: tensors(self)[i].name,
        get_tensor_mode=lambda self, name: (
            trt.TensorIOMode.INPUT if name in self.state["profile"] else trt.TensorIOMode.OUTPUT
        ),
        get_tensor_dtype=lambda self, name: trt.DataType[
            types[next(put.type for put in tensors(self) if put.name == name)]
        ],
        get_tensor_profile_shape=lambda self, name, index: self.state["profile"][name],
        create_execution_context=context,
    )

    def deserialize(self: Any, plan: bytes) -> Any:
        called(self, "deserialize_cuda_engine", len(plan))
        described = json.loads(plan)
        run = open_session(Path(described["onnx"]), 1, float16=True)
        return make(engine, {"run": run, "profile": described["profile"]})

    def needs_gpu(log: Any) -> None:
        if trt.fail:  # This is what happens on a machine without a usable GPU.
            log.log(Severity.ERROR, trt.fail)
            raise TypeError("pybind11::init(): factory function returned nullptr")

    runtime_kind = kind("Runtime", deserialize_cuda_engine=deserialize)

    def runtime(log: Any) -> Any:
        needs_gpu(log)
        return make(runtime_kind)

    def build(self: Any, network: Any, config: Any) -> bytes | None:
        called(self, "build_serialized_network")
        for line in trt.log:
            self.state.log(Severity.INFO if "(Sparsity)" not in line else Severity.VERBOSE, line)
        return Memory(json.dumps({"onnx": network.state["onnx"], "profile": config.state["profile"]}).encode())

    def create_network(self: Any, flags: int = 0) -> Any:
        called(self, "create_network", flags)
        return make(network, {})

    builder_kind = kind(
        "Builder",
        create_network=create_network,
        create_builder_config=lambda self: make(config, {}),
        create_optimization_profile=lambda self: make(profile, {}),
        build_serialized_network=build,
    )

    def builder(log: Any) -> Any:
        needs_gpu(log)
        return make(builder_kind, log)

    def parse(self: Any, path: str) -> bool:
        called(self, "parse_from_file", path)
        self.state["onnx"] = path
        onnx.checker.check_model(path)
        return trt.parses

    parser_kind = kind(
        "OnnxParser",
        parse_from_file=parse,
        num_errors=1,
        get_error=lambda self, i: SimpleNamespace(desc=lambda: "In node 7 (importErf): UNSUPPORTED_NODE"),
    )
    trt.Builder, trt.Runtime = builder, runtime
    trt.OnnxParser = lambda network, log: make(parser_kind, network.state)
    return trt


def fake_machine(version: str = VERSIONS[0], **gpu: Any) -> Machine:
    """Return a machine with the fakes."""
    cuda = FakeCuda(**gpu)
    return Machine(fake_tensorrt(version, cuda), cuda)


def product(weight: np.ndarray, name: str = "linear") -> onnx.ModelProto:
    """Return x [batch, N] -> y = x @ weight, without clipress metadata."""
    takes = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", weight.shape[0]])
    gives = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", weight.shape[1]])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    graph = helper.make_graph(nodes, name, [takes], [gives], [onnx.numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def two_inputs(weight: np.ndarray) -> onnx.ModelProto:
    """Return states [batch, N], memory [batch, M] -> logits = states @ weight + memory."""
    sizes = {"states": weight.shape[0], "memory": weight.shape[1]}
    takes = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", size]) for n, size in sizes.items()]
    gives = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", weight.shape[1]])
    nodes = [
        helper.make_node("MatMul", ["states", "w"], ["product"], name="product"),
        helper.make_node("Add", ["product", "memory"], ["logits"], name="sum"),
    ]
    graph = helper.make_graph(nodes, "question", takes, [gives], [onnx.numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
