"""A page on this machine: files from a table, and graphs that run here for a page that asks.

It listens on loopback alone, and answers requests that name it as their host and come from its own page, so that no other
page in the same browser can use it.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Mapping
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from clipress.errors import ServerError, first_line
from clipress.runtime.export_folder import Exported
from clipress.runtime.onnx_session import open_session

LOOPBACK = "127.0.0.1"
KINDS = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}
BLOCK = 1 << 20  # bytes
LIMIT = 1 << 28  # bytes of a request
Runs = Mapping[tuple[str, str], Callable[[bytes, tuple[int, ...]], bytes]]
"""By model and graph: the bytes of an input and its shape -> those of the first output, float32."""


class PageServer(ThreadingHTTPServer):
    """Serves files, and runs graphs: POST /run/<model>/<graph>?shape=1,3,224,224.

    Args:
        site: every file by its path below /, where it is or its bytes; index.html is also /.
        runs: graphs that the page may run.
        port: 0 takes any free one.

    Raises ServerError if the port is taken.
    """

    daemon_threads = True

    def __init__(self, site: Mapping[str, Path | bytes], runs: Runs | None = None, port: int = 0) -> None:
        self.site, self.runs = site, runs or {}
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ServerError(
                f"Port {port} of {LOOPBACK} cannot be used: {first_line(error)}. Choose another one: --port"
            ) from None

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{self.host}/"

    @property
    def host(self) -> str:
        """Host and port, as browsers send them."""
        return f"{LOOPBACK}:{self.server_address[1]}"


def runs_of(models: list[Exported], threads: int = 0) -> Runs:
    """Return all graphs of exports as the page asks for them; each is opened when it is first run."""
    return {(model.stage, name): _Run(model, name, threads) for model in models for name in model.graphs}


class _Run:
    def __init__(self, exported: Exported, graph: str, threads: int) -> None:
        self.exported, self.graph, self.threads = exported, exported.graphs[graph], threads
        self._opening = Lock()

    @cached_property
    def session(self):
        """The graph's session."""
        return open_session(self.exported.onnx(self.graph.name), self.threads)

    def __call__(self, content: bytes, shape: tuple[int, ...]) -> bytes:
        takes, gives = self.graph.inputs[0], self.graph.outputs[0].name
        values = np.frombuffer(content, takes.dtype).reshape(shape)  # Raises ValueError for another shape.
        with self._opening:
            session = self.session
        return np.asarray(session.run([gives], {takes.name: values})[0], np.float32).tobytes()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    HEADERS: ClassVar = {
        # Threads of WebAssembly share memory, which browsers allow to isolated pages only.
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Embedder-Policy": "require-corp",
        "Cross-Origin-Resource-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    def do_GET(self) -> None:
        if self._is_refused():
            return
        name = unquote(urlsplit(self.path).path).lstrip("/") or "index.html"
        content = self.server.site.get(name)
        if content is None:
            self._answer(HTTPStatus.NOT_FOUND, b"There is no such file.")
            return
        kind = KINDS.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        if isinstance(content, bytes):
            self._answer(HTTPStatus.OK, content, kind)
            return
        self._begin(HTTPStatus.OK, content.stat().st_size, kind)
        with content.open("rb") as file:
            while block := file.read(BLOCK):
                self.wfile.write(block)

    def do_POST(self) -> None:
        if self._is_refused():
            return
        where = urlsplit(self.path)
        run = self.server.runs.get(tuple(where.path.split("/")[2:])) if where.path.startswith("/run/") else None
        length = int(self.headers.get("Content-Length") or 0)
        if run is None or not 0 < length <= LIMIT:
            self.close_connection = True  # The body was not read.
            self._answer(HTTPStatus.NOT_FOUND, b"There is no such graph, or its input is empty or too long.")
            return
        content = self.rfile.read(length)
        try:
            shape = tuple(map(int, parse_qs(where.query)["shape"][0].split(",")))
            self._answer(HTTPStatus.OK, run(content, shape))
        except Exception as error:  # ONNX Runtime's own errors have no common type.
            self._answer(HTTPStatus.BAD_REQUEST, first_line(error).encode())

    def _is_refused(self) -> bool:
        """Refuse a page of another origin, and a name that somebody lets point to this machine."""
        hosts = {self.server.host, f"localhost:{self.server.server_address[1]}"}
        origin = self.headers.get("Origin")
        refused = self.headers.get("Host") not in hosts or origin not in (None, *(f"http://{host}" for host in hosts))
        if refused:
            self.close_connection = True
            self._answer(HTTPStatus.FORBIDDEN, b"Only the page of this server may ask it.")
        return refused

    def _answer(self, status: HTTPStatus, content: bytes, kind: str = "application/octet-stream") -> None:
        self._begin(status, len(content), kind)
        self.wfile.write(content)

    def _begin(self, status: HTTPStatus, length: int, kind: str) -> None:
        self.send_response(status)
        for name, value in {**self.HEADERS, "Content-Type": kind, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            pass  # A page that was closed while it loaded.

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a camera asks many times per second."""
