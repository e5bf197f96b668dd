"""A server in this process that speaks enough of KServe's HTTP protocol (v2, binary tensors) to be a Triton's stand-in."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

Inputs = dict[str, np.ndarray]
Model = Callable[[Inputs], dict[str, np.ndarray]]
TYPES = {"FP32": np.float32, "INT32": np.int32}


class Refusal(Exception):
    """What a model answers with instead: an HTTP status and a text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Server:
    """Serves `models`: functions from inputs to outputs that run in the request's thread. Counts what it sees."""

    def __init__(self, **models: Model) -> None:
        self.models = models
        self.requests: list[tuple[str, Inputs]] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                name = self.path.split("/")[3]
                status, head, tail = owner._answer(name, body, self.headers.get("Inference-Header-Content-Length"))
                self.send_response(status)
                if tail:
                    self.send_header("Inference-Header-Content-Length", str(len(head)))
                self.send_header("Content-Length", str(len(head) + len(tail)))
                self.end_headers()
                self.wfile.write(head + tail)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that hang up are part of the tests
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, name: str, body: bytes, head: str | None) -> tuple[int, bytes, bytes]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            if name not in self.models:
                raise Refusal(404, f"Request for unknown model: '{name}' is not found")
            inputs = _inputs(body, int(head or len(body)))
            with self._lock:
                self.requests.append((name, inputs))
            return 200, *_outputs(self.models[name](inputs))
        except Refusal as refusal:
            return refusal.status, json.dumps({"error": str(refusal)}).encode(), b""
        finally:
            with self._lock:
                self._now -= 1


def _inputs(body: bytes, head: int) -> Inputs:
    inputs, place = {}, head
    for tensor in json.loads(body[:head])["inputs"]:
        size = tensor["parameters"]["binary_data_size"]
        data = body[place : place + size]
        place += size
        if tensor["datatype"] == "BYTES":
            values, at = np.empty(int(np.prod(tensor["shape"])), object), 0
            for number in range(len(values)):
                (length,) = struct.unpack_from("<I", data, at)
                values[number] = data[at + 4 : at + 4 + length]
                at += 4 + length
        else:
            values = np.frombuffer(data, TYPES[tensor["datatype"]])
        inputs[tensor["name"]] = values.reshape(tensor["shape"])
    return inputs


def _outputs(outputs: dict[str, np.ndarray]) -> tuple[bytes, bytes]:
    tensors, tail = [], b""
    for name, values in outputs.items():
        kind = "BYTES" if values.dtype == object else "FP32"
        if kind == "BYTES":
            data = b"".join(struct.pack("<I", len(one)) + one for one in values.ravel())
        else:
            data = values.astype(np.float32).tobytes()
        tensors.append(
            {"name": name, "datatype": kind, "shape": values.shape, "parameters": {"binary_data_size": len(data)}}
        )
        tail += data
    return json.dumps({"model_name": "m", "model_version": "1", "outputs": tensors}).encode(), tail
