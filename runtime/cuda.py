"""CUDA from Python behind few words: pinned buffers, a stream, events, a graph.

PyCUDA when it is installed (`pip install 'clipress[pycuda]'`, built from source against a CUDA toolkit), else torch.
Both give the same calls, so that an engine neither knows nor cares:

    buffer(shape, dtype)   .host: pinned array, .address: on the device, .upload(stream), .download(stream)
    stream(), handle(stream), event(), elapsed_ms(start, end), capture(enqueue, stream)

A stream has synchronize(), an event has record(stream), in both libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from clipress.errors import BackendMissing

Cuda = Any  # PyCuda or TorchCuda


def open_cuda() -> Cuda:
    """Return the first GPU. Raises BackendMissing, saying what each of the two libraries said."""
    reasons = []
    for library in (PyCuda, TorchCuda):
        try:
            return library()
        except Exception as error:  # pycuda's own errors have no common type, and it may fail as it is imported
            reasons.append(f"{library.name}: {error}")
    raise BackendMissing("; ".join(reasons))


class PyCuda:
    """PyCUDA on the context that torch would use too."""

    name = "pycuda"

    def __init__(self) -> None:
        import pycuda.autoprimaryctx  # makes the context current as it is imported
        import pycuda.driver as driver

        self.driver = driver
        self.gpu = pycuda.autoprimaryctx.device.name()
        self.capability: tuple[int, int] = pycuda.autoprimaryctx.device.compute_capability()
        self.stream, self.event = driver.Stream, driver.Event

    def handle(self, stream: Any) -> int:
        """Return the address TensorRT wants."""
        return int(stream.handle)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the time between two recorded events, waiting for the second."""
        end.synchronize()
        return float(start.time_till(end))

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> PyCudaBuffer:
        """Return memory on both sides."""
        return PyCudaBuffer(self.driver, shape, dtype)

    def capture(self, enqueue: Callable[[], Any], stream: Any) -> None:
        """PyCUDA has no CUDA graphs."""
        raise BackendMissing("CUDA graphs were asked for, and PyCUDA has none. Uninstall pycuda, and torch is used.")


class PyCudaBuffer:
    """Pinned host memory and as much on the device."""

    def __init__(self, driver: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self._driver = driver
        self.host: np.ndarray = driver.pagelocked_empty(shape, dtype)
        self._device = driver.mem_alloc(max(self.host.nbytes, 1))
        self.address = int(self._device)

    def upload(self, stream: Any) -> None:
        """Copy to the device, without waiting."""
        self._driver.memcpy_htod_async(self._device, self.host, stream)

    def download(self, stream: Any) -> None:
        """Copy from the device, without waiting."""
        self._driver.memcpy_dtoh_async(self.host, self._device, stream)


class TorchCuda:
    """torch's tensors, streams and events."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            torch.cuda.init()  # says why
        self.torch = torch
        self.gpu = torch.cuda.get_device_name(0)
        self.capability: tuple[int, int] = torch.cuda.get_device_capability(0)
        self.stream = torch.cuda.Stream

    def event(self) -> Any:
        """Return an event that keeps the time."""
        return self.torch.cuda.Event(enable_timing=True)

    def handle(self, stream: Any) -> int:
        """Return the address TensorRT wants."""
        return int(stream.cuda_stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the time between two recorded events, waiting for the second."""
        end.synchronize()
        return float(start.elapsed_time(end))

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> TorchBuffer:
        """Return memory on both sides."""
        return TorchBuffer(self.torch, shape, dtype)

    def capture(self, enqueue: Callable[[], Any], stream: Any) -> Callable[[], None]:
        """Record what `enqueue` puts on the stream; returns what puts it there again in one launch."""
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, stream=stream):
            enqueue()

        def replay() -> None:
            with self.torch.cuda.stream(stream):
                graph.replay()

        return replay


class TorchBuffer:
    """Pinned host memory and as much on the device."""

    def __init__(self, torch: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self._torch = torch
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        self._pinned = torch.empty(shape, dtype=kind, pin_memory=True)
        self._device = torch.empty(shape, dtype=kind, device="cuda")
        self.host: np.ndarray = self._pinned.numpy()
        self.address = int(self._device.data_ptr())

    def upload(self, stream: Any) -> None:
        """Copy to the device, without waiting."""
        with self._torch.cuda.stream(stream):
            self._device.copy_(self._pinned, non_blocking=True)

    def download(self, stream: Any) -> None:
        """Copy from the device, without waiting."""
        with self._torch.cuda.stream(stream):
            self._pinned.copy_(self._device, non_blocking=True)
