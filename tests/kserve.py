"""A server in this process that fails on demand: KServe's HTTP protocol (v2), as far as `clipress.serve.client` uses it.

A real Triton shows what right answers look like. This one shows what a server answers seldom: 503, a delay, nonsense.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from tritonclient.utils import deserialize_bytes_tensor

Inputs = dict[str, np.ndarray]
Model = Callable[[Inputs], dict[str, np.ndarray]]


class Refusal(Exception):
    """An error response: an HTTP status and a text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Server:
    """Serves `models`: functions from inputs to outputs, run in the request's thread. Keeps the requests it gets.

    `configs` may hold more of a model's configuration than its name.
    """

    def __init__(self, **models: Model) -> None:
        self.models = models
        self.requests: list[tuple[str, Inputs]] = []
        self.configs: dict[str, dict[str, Any]] = {}
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:  # The only thing that the client reads is a model's configuration.
                name = self.path.split("/")[3]
                known = name in owner.models
                self._send(
                    *((200, {"name": name, **owner.configs.get(name, {})}) if known else (404, {"error": "unknown"}))
                )

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                head = int(self.headers.get("Inference-Header-Content-Length", len(body)))
                self._send(*owner.answer(self.path.split("/")[3], json.loads(body[:head]), body[head:]))

            def _send(self, status: int, answer: Any) -> None:
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # Some tests hang up on the server.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, name: str, request: Any, data: bytes) -> tuple[int, Any]:
        """Return the status and the JSON that answer a request."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            if name not in self.models:
                raise Refusal(404, f"Request for unknown model: '{name}' is not found")
            inputs = {}
            for tensor in request["inputs"]:
                size = tensor["parameters"]["binary_data_size"]
                rows, data = data[:size], data[size:]
                is_text = tensor["datatype"] == "BYTES"
                values = deserialize_bytes_tensor(rows) if is_text else np.frombuffer(rows, np.int32)
                inputs[tensor["name"]] = values.reshape(tensor["shape"])
            with self._lock:
                self.requests.append((name, inputs))
            outputs = [_output(*output) for output in self.models[name](inputs).items()]
            return 200, {"model_name": name, "model_version": "1", "outputs": outputs}
        except Refusal as refusal:
            return refusal.status, {"error": str(refusal)}
        finally:
            with self._lock:
                self._now -= 1


def _output(name: str, values: np.ndarray) -> dict[str, Any]:
    data = values.astype(np.float64).ravel().tolist()
    return {"name": name, "datatype": "FP32", "shape": values.shape, "data": data}
