"""Send load to a Triton server over HTTP or gRPC, with requests that are prepared before they are timed.

A load generator shares the cores with what it measures, so as little as possible is done per request: bytes go out and
come back, and only the status of an answer is read. By HTTP that takes a fifth of the time of tritonclient's own client,
which is why `clipress bench-server` uses it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from clipress.bench.server.load import STEPS, Send, Statistics
from clipress.errors import ServerError

CONNECTIONS = 256  # For HTTP; further requests wait, and their latency counts from their due time.
CONNECT_SECONDS = 5  # for gRPC
INFER = "/inference.GRPCInferenceService/ModelInfer"
STATISTICS = "/inference.GRPCInferenceService/ModelStatistics"


@dataclass(frozen=True)
class InputTemplate:
    """An input tensor of one row, with different content for every number."""

    datatype: str
    shape: tuple[int, ...]
    content: Callable[[int], bytes]
    """The tensor of request n, in Triton's wire format."""


@dataclass(frozen=True)
class RequestTemplate:
    """A request to a model, of one row."""

    model: str
    inputs: Mapping[str, InputTemplate]
    """By the names of the input tensors."""
    output: str
    """Name of the output tensor."""

    def contents(self, number: int) -> list[bytes]:
        """Return the input tensors of a request, in their order."""
        return [one.content(number) for one in self.inputs.values()]


class Refused(Exception):
    """The server answered with an error."""


class Wire(Protocol):
    """A connection to a server. Raises Refused or OSError."""

    def sender(self, template: RequestTemplate) -> Send:
        """Return a function that sends request number n and returns the answer as bytes."""

    async def connect(self) -> None:
        """Wait until requests can be sent."""

    async def statistics(self) -> Statistics:
        """Return what the server has counted for every model."""

    async def close(self) -> None:
        """Close all connections."""


def open_wire(protocol: str, address: str, tls: bool) -> Wire:
    """Return a connection to `host:port`, by http or grpc; it is opened with the first request."""
    return Http(address, tls) if protocol == "http" else Grpc(address, tls)


async def checked_sender(wire: Wire, template: RequestTemplate, url: str) -> Send:
    """Return a template's sender after one request has been answered. Raises ServerError if it is not."""
    send = wire.sender(template)
    try:
        await wire.connect()
        await send(0)
    except Exception as error:
        raise ServerError(
            f"{url}: expected an answer from model {template.model}, found: {error or type(error).__name__}. Check the "
            "address, and that the server has loaded the model."
        ) from None
    return send


class Http:
    """Keep-alive connections, one per request under way."""

    def __init__(self, address: str, tls: bool) -> None:
        self._authority, _, path = address.partition("/")
        self._path, self._tls = f"/{path}" if path else "", tls
        self._free: list[_Connection] = []
        self._limit = asyncio.Semaphore(CONNECTIONS)

    def sender(self, template: RequestTemplate) -> Send:
        tensors = [
            {"name": name, "shape": one.shape, "datatype": one.datatype} for name, one in template.inputs.items()
        ]

        @lru_cache
        def head(*sizes: int) -> bytes:
            inputs = zip(tensors, sizes, strict=True)
            request = {
                "inputs": [{**tensor, "parameters": {"binary_data_size": size}} for tensor, size in inputs],
                "outputs": [{"name": template.output, "parameters": {"binary_data": True}}],
            }
            text = json.dumps(request).encode()
            length = f"Inference-Header-Content-Length: {len(text)}\r\n"
            return self._head("POST", f"models/{template.model}/infer", len(text) + sum(sizes), length) + text

        async def send(number: int) -> bytes:
            contents = template.contents(number)
            return await self._answer(b"".join([head(*map(len, contents)), *contents]))

        return send

    async def connect(self) -> None:
        """Nothing to wait for: connections are opened by requests."""

    async def statistics(self) -> Statistics:
        return read_statistics(json.loads(await self._answer(self._head("GET", "models/stats", 0))))

    async def close(self) -> None:
        for connection in self._free:
            connection.transport.close()
        self._free.clear()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    def _head(self, method: str, path: str, size: int, more: str = "") -> bytes:
        return (
            f"{method} {self._path}/v2/{path} HTTP/1.1\r\nHost: {self._authority}\r\nContent-Length: {size}\r\n{more}\r\n"
        ).encode()

    async def _answer(self, message: bytes) -> bytes:
        async with self._limit:
            connection = self._free.pop() if self._free else await self._connect()
            status, body = await connection.answer(message)
            if not connection.transport.is_closing():
                self._free.append(connection)
        if status != 200:
            raise Refused(body.decode(errors="replace"))
        return body

    async def _connect(self) -> _Connection:
        host, _, port = self._authority.rpartition(":")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, host.strip("[]"), int(port), ssl=self._tls or None)
        return connection


class _Connection(asyncio.Protocol):
    """One request at a time."""

    transport: asyncio.Transport
    _waiting: asyncio.Future[tuple[int, bytes]] | None = None
    _found = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_exception(error or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._found += data
        head, end, body = self._found.partition(b"\r\n\r\n")
        if not end or self._waiting is None or self._waiting.done():
            return
        if len(body) >= _length(head):
            self._found = b""
            self._waiting.set_result((int(head[9:12]), body))

    async def answer(self, message: bytes) -> tuple[int, bytes]:
        if self.transport.is_closing():
            raise ConnectionResetError("the server closed the connection")
        self._waiting = asyncio.get_running_loop().create_future()
        self.transport.write(message)
        try:
            return await self._waiting
        except asyncio.CancelledError:
            self.transport.abort()  # nobody waits for the answer that would come next
            raise


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


class Grpc:
    """One channel; requests are serialised here, answers stay bytes."""

    def __init__(self, address: str, tls: bool) -> None:
        import grpc

        options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
        self._channel = (
            grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options)
            if tls
            else grpc.aio.insecure_channel(address, options)
        )
        self._infer = self._channel.unary_unary(INFER)

    def sender(self, template: RequestTemplate) -> Send:
        from grpc.aio import AioRpcError
        from tritonclient.grpc.service_pb2 import ModelInferRequest

        request = ModelInferRequest(model_name=template.model)
        for name, one in template.inputs.items():
            request.inputs.add(name=name, datatype=one.datatype, shape=one.shape)
        request.outputs.add(name=template.output)

        async def send(number: int) -> bytes:
            request.raw_input_contents[:] = template.contents(number)
            try:
                return await self._infer(request.SerializeToString())
            except AioRpcError as error:  # The error's own text is a page long.
                raise Refused(error.details()) from None

        return send

    async def connect(self) -> None:
        # Channels to one address share what they know of it, and one that is still recovering fails its requests at once.
        try:
            await asyncio.wait_for(self._channel.channel_ready(), CONNECT_SECONDS)
        except asyncio.TimeoutError:
            raise Refused(f"no connection within {CONNECT_SECONDS} s") from None

    async def statistics(self) -> Statistics:
        from google.protobuf.json_format import MessageToDict
        from tritonclient.grpc.service_pb2 import ModelStatisticsRequest, ModelStatisticsResponse

        call = self._channel.unary_unary(
            STATISTICS, ModelStatisticsRequest.SerializeToString, ModelStatisticsResponse.FromString
        )
        return read_statistics(MessageToDict(await call(ModelStatisticsRequest()), preserving_proto_field_name=True))

    async def close(self) -> None:
        await self._channel.close()


def read_statistics(answer: dict[str, Any]) -> Statistics:
    """Read Triton's statistics of all models: nanoseconds summed over requests, versions of a model added up."""
    found: Statistics = {}
    for one in answer["model_stats"]:
        parts = one.get("inference_stats", {})
        new = {
            "requests": _number(parts, "success", "count"),
            "rows": int(one.get("inference_count", 0)),
            "executions": int(one.get("execution_count", 0)),
            "cache_hits": _number(parts, "cache_hit", "count"),
            **{step: _number(parts, step, "ns") for step in STEPS},
        }
        old = found.get(one["name"], {})
        found[one["name"]] = {key: value + old.get(key, 0) for key, value in new.items()}
    return found


def _number(parts: dict[str, Any], name: str, kind: str) -> int:
    return int(parts.get(name, {}).get(kind, 0))
