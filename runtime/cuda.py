"""The few CUDA calls that an engine needs: pinned buffers, a stream, events, a graph.

PyCUDA if it is installed (`pip install 'clipress[pycuda]'`, built from source against a CUDA toolkit), else torch. Both
have the same interface:

    buffer(shape, dtype)   .host: pinned array, .address: on the device, .upload(stream), .download(stream)
    stream(), handle(stream), event(), elapsed_ms(start, end), capture(enqueue, stream)

In both, a stream has synchronize() and an event has record(stream).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from clipress.errors import BackendMissing

Cuda = Any  # PyCuda or TorchCuda


def open_cuda() -> Cuda:
    """Return the first GPU. Raises BackendMissing with the reason of each of the two libraries."""
    reasons = []
    for library in (PyCuda, TorchCuda):
        try:
            return library()
        except Exception as error:  # PyCUDA's errors have no common type, and its import may fail too.
            reasons.append(f"{library.name}: {error}")
    raise BackendMissing("; ".join(reasons))


class PyCuda:
    """PyCUDA on the primary context, which torch uses too."""

    name = "pycuda"

    def __init__(self) -> None:
        import pycuda.autoprimaryctx  # The import makes the context current.
        import pycuda.driver as driver

        self.driver = driver
        self.gpu = pycuda.autoprimaryctx.device.name()
        self.capability: tuple[int, int] = pycuda.autoprimaryctx.device.compute_capability()
        self.stream, self.event = driver.Stream, driver.Event

    def handle(self, stream: Any) -> int:
        """Return the stream's address, as TensorRT takes it."""
        return int(stream.handle)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the time between two recorded events, waiting for the second."""
        end.synchronize()
        return float(start.time_till(end))

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> PyCudaBuffer:
        """Return memory on the host and on the device."""
        return PyCudaBuffer(self.driver, shape, dtype)

    def capture(self, enqueue: Callable[[], Any], stream: Any) -> None:
        """PyCUDA has no CUDA graphs."""
        raise BackendMissing("PyCUDA has no CUDA graphs. Uninstall pycuda to use torch, or turn CUDA graphs off.")


class PyCudaBuffer:
    """Pinned host memory and the same amount on the device."""

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
            torch.cuda.init()  # Its error has the reason.
        self.torch = torch
        self.gpu = torch.cuda.get_device_name(0)
        self.capability: tuple[int, int] = torch.cuda.get_device_capability(0)
        self.stream = torch.cuda.Stream

    def event(self) -> Any:
        """Return an event that records the time."""
        return self.torch.cuda.Event(enable_timing=True)

    def handle(self, stream: Any) -> int:
        """Return the stream's address, as TensorRT takes it."""
        return int(stream.cuda_stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the time between two recorded events, waiting for the second."""
        end.synchronize()
        return float(start.elapsed_time(end))

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> TorchBuffer:
        """Return memory on the host and on the device."""
        return TorchBuffer(self.torch, shape, dtype)

    def capture(self, enqueue: Callable[[], Any], stream: Any) -> Callable[[], None]:
        """Capture what `enqueue` puts on the stream. Returns a function that launches it again as one."""
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, stream=stream):
            enqueue()

        def replay() -> None:
            with self.torch.cuda.stream(stream):
                graph.replay()

        return replay


class TorchBuffer:
    """Pinned host memory and the same amount on the device."""

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
