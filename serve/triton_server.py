"""A Triton server on a model repository: start it, wait for it, load models, and stop it with nothing left behind."""

from __future__ import annotations

import http.client
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipress.errors import ServerError
from clipress.progress import Say
from clipress.serve.checksums import AGENT, LIBRARY
from clipress.serve.signals import ended_by_signals
from clipress.serve.triton_config import server_options
from clipress.serve.triton_install import Triton, find_triton

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient

LOOPBACK = "127.0.0.1"
EXIT_SECONDS = 10  # how long the server waits for requests in progress, and for clients that stay connected
SHARED_MEMORY = Path("/dev/shm")
WATCH_SECONDS = 1
STUB = "triton_python_backend_stub"
# Through these a client could make the server run a file of its choice, or read this machine's memory.
CLOSED = "model-repository,shared-memory,trace,logging"
NO_AGENT = (
    f"Expected the repository agent '{AGENT}' ({LIBRARY}), which NVIDIA's containers have and the downloaded server has not. "
    "Start the repository in the container, as its README.md says, or set serve.checksums to false and run: clipress serve RUN"
)
# This program becomes the server, which gets SIGTERM when clipress has died, however that happened.
TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class TritonServer:
    """Triton on one repository folder, with all its models loaded. A context manager: inside, the server is ready.

    Only this object loads and unloads models; that part of the server is closed to other clients. The server ends with
    the thread that started it.

    Args:
        repository: folder of models; it is only read.
        host: interface to listen on; the loopback one by default.
        http_port, grpc_port, metrics_port: None picks a free one.
        log: file for the server's log; None uses a temporary one.
        ready_within: seconds until all models must be loaded and warmed up.
        triton: the server to start; None means `find_triton()`.

    Attributes:
        name: what the names of its files in shared memory begin with.
        http, grpc, metrics: its addresses, as host:port. Metrics are at /metrics.
        pid: the process id, which is also that of the session of all its processes; None unless it runs.
    """

    def __init__(
        self,
        repository: str | Path,
        *,
        host: str = LOOPBACK,
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        log: Path | None = None,
        ready_within: float = 120,
        triton: Triton | None = None,
    ) -> None:
        self.repository, self.host, self.ready_within = Path(repository), host, ready_within
        self._wanted_ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._log, self._triton = log, triton
        self.name = f"clipress-{os.getpid()}-{secrets.token_hex(4)}"
        self._key = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until every model is ready.

        Raises BackendMissing if there is no Triton, and ServerError, with its log's errors, if a port is taken, a model
        cannot be loaded or time runs out; nothing is then left behind.
        """
        triton = self._triton or find_triton()
        if self._log is None:
            self._folder = tempfile.TemporaryDirectory(prefix="clipress-triton-")
        self.log = self._log or Path(self._folder.name, "server.log")
        try:
            ports = _free_ports(self.host, self._wanted_ports)
            reached = LOOPBACK if self.host == "0.0.0.0" else self.host
            self.http, self.grpc, self.metrics = (f"{reached}:{port}" for port in ports.values())
            self._launch(triton, ports)
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def _launch(self, triton: Triton, ports: dict[str, int]) -> None:
        command = [
            *(sys.executable, "-I", "-S", "-c", TIED, str(os.getpid()), str(triton.binary)),
            f"--model-repository={self.repository.absolute()}",
            *triton.options,
            *server_options(self.repository),
            "--model-control-mode=explicit",
            "--load-model=*",
            "--strict-readiness=true",
            f"--backend-config=python,shm-region-prefix-name={self.name}-",
            f"--exit-timeout-secs={EXIT_SECONDS}",
            f"--http-restricted-api={CLOSED}:clipress={self._key}",
            f"--grpc-restricted-protocol={CLOSED}:clipress={self._key}",
            *(f"--{kind}-address={self.host}" for kind in ports),
            *(f"--{kind}-port={port}" for kind, port in ports.items()),
        ]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **triton.environment},
                start_new_session=True,  # Ctrl-C is for clipress, and all processes can be ended as a group
            )

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self.ready_within
        while not self._is_ready():
            if self._process.poll() is not None:
                raise self._failure(f"it ended with exit code {self._process.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise self._failure(f"it was not ready within {self.ready_within:g} s")
            time.sleep(0.05)
        self._ready = True

    def _is_ready(self) -> bool:
        # Triton starts to serve its metrics after it reports that it is ready.
        return _answers(self.http, "/v2/health/ready") and _answers(self.metrics, "/metrics")

    def _failure(self, found: str) -> ServerError:
        errors = _errors_in(self.log)
        if f"unable to find '{LIBRARY}'" in errors:  # said of every model
            found, errors = "its models' files have checksums, and this server cannot compare them", NO_AGENT
        return ServerError(f"Triton cannot serve {self.repository}: {found}. {errors}")

    def wait(self, say: Say = lambda _: None) -> None:
        """Wait as long as the server runs, and reload models whose processes have died; `say` reports that.

        Triton itself keeps reporting such a model as ready, and its requests fail. Raises ServerError when the server ends
        by itself, or a model cannot be loaded again. No other thread may load or unload models meanwhile.
        """
        process = self._process
        known = _model_processes(process.pid)
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(WATCH_SECONDS)
                raise self._failure(f"it ended by itself, with exit code {code}")
            now = _model_processes(process.pid)
            for model in sorted({model for model, _ in known - now}):
                say(f"A process of {model} has died: it is loaded again.")
                self.load(model)
            known = now | _model_processes(process.pid)

    def stop(self) -> None:
        """End the server and its processes. Requests in progress are answered first, for up to EXIT_SECONDS."""
        process, self._process = self._process, None
        try:
            if process and self._ready:  # before that there are no requests, and models that are loading would not stop
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(EXIT_SECONDS + 5)
        finally:
            if process:
                with suppress(ProcessLookupError):  # models run in processes of their own
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for left in SHARED_MEMORY.glob(f"{self.name}-*"):
                left.unlink(missing_ok=True)
            if self._folder:
                self._folder.cleanup()

    def load(self, model: str) -> None:
        """Load a model as it is on disk now: new versions are loaded, removed ones are no longer served.

        A loaded model keeps answering until the new one is ready. Raises ServerError if it cannot be loaded.
        """
        try:
            with self._control(f"load {model}") as client:
                client.load_model(model, headers=self._headers)
        except ServerError as error:
            reason = _refusal_in(self.log, model) if "failed to poll" in str(error) else ""
            raise ServerError(f"{error}{reason}") from None

    def unload(self, model: str) -> None:
        """Unload a model, and wait until it is gone. A model that is not loaded is no error. Raises ServerError."""
        with self._control(f"unload {model}") as client:
            client.unload_model(model, headers=self._headers)
            deadline = time.monotonic() + self.ready_within
            while self._states(client, model) & {"READY", "UNLOADING"}:
                if time.monotonic() > deadline:
                    raise ServerError(f"Triton did not unload {model} within {self.ready_within:g} s.")
                time.sleep(0.02)

    def _states(self, client: InferenceServerClient, model: str) -> set[str]:
        return {one.state for one in client.get_model_repository_index(self._headers).models if one.name == model}

    @property
    def _headers(self) -> dict[str, str]:
        return {"triton-grpc-protocol-clipress": self._key}

    @contextmanager
    def _control(self, action: str) -> Iterator[InferenceServerClient]:
        from tritonclient.grpc import InferenceServerClient
        from tritonclient.utils import InferenceServerException

        client: Any = InferenceServerClient(self.grpc, channel_args=[("grpc.enable_http_proxy", 0)])
        try:
            yield client
        except InferenceServerException as error:
            raise ServerError(f"Triton could not {action}: {_short(error.message())}") from None
        finally:
            client.close()


def _free_ports(host: str, wanted: dict[str, int | None]) -> dict[str, int]:
    """Return a free port for each kind. All are held until all are known, so that none is used twice."""
    held: dict[str, socket.socket] = {}
    try:
        for kind, port in wanted.items():
            held[kind] = socket.socket()
            # Servers set this, since connections of the previous one may linger.
            held[kind].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held[kind].bind((host, port or 0))
            except OSError as error:
                raise ServerError(
                    f"Triton cannot listen on {host}:{port or 'any port'} ({kind}): {error.strerror}. "
                    "Choose another port, or none to use a free one."
                ) from None
        return {kind: taken.getsockname()[1] for kind, taken in held.items()}
    finally:
        for taken in held.values():
            taken.close()


def _model_processes(server: int) -> set[tuple[str, str]]:
    """Return (model, instance), such as classify and 0_1, of every process of the python backend."""
    found = set()
    for children in Path(f"/proc/{server}/task").glob("*/children"):
        with suppress(OSError):  # a thread or process that ends
            for pid in children.read_text().split():
                words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
                # a process that has ended has no words; other names are short-lived ones that complete a configuration
                if Path(words[0]).name == STUB and (name := re.fullmatch(r"(.+)_(\d+_\d+)", words[-3])):
                    found.add(name.groups())
    return found


def _answers(address: str, path: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=5)  # ignores proxies
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _errors_in(log: Path) -> str:
    """Return the errors in a log, else its last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # E1121 14:50:34.772040 27063 model_lifecycle.cc:642] "failed to load 'x' version 1: ...\n\nAt: ..."
    errors = [match[1] for line in lines if (match := re.match(r"(?:E\d{4} .*?\] |error: )(.*)", line))]
    errors = [error for error in errors if "CudaDriverHelper" not in error]  # reported wherever there is no GPU
    if errors:
        return "Its log says: " + " ".join(dict.fromkeys(map(_short, errors)))
    return "Its log ends: " + "\n".join(["", *lines[-15:]])


def _refusal_in(log: Path, model: str) -> str:
    """Return why Triton last refused a model's folder, such as the agent's reason: clients only learn that it was refused."""
    text = log.read_text(encoding="utf-8", errors="replace")
    reasons = re.findall(rf"Poll failed for model directory '{re.escape(model)}': (.*)", text)
    return f" Its log says: {_short(reasons[-1])}" if reasons else ""


def _short(text: str) -> str:
    """Drop the part of an error that names places in Triton's own files."""
    return re.split(r"\n|\\n", text.strip().strip('"'))[0].rstrip(".")[:500] + "."


def serve_until_stopped(
    repository: Path,
    say: Say,
    host: str = LOOPBACK,
    http_port: int | None = None,
    grpc_port: int | None = None,
    metrics_port: int | None = None,
) -> None:
    """Serve a repository, report its addresses, and run until Ctrl-C or SIGTERM, which end it without an error.

    The log is server.log beside the repository. Must be called from the main thread. Raises what `find_triton`,
    `TritonServer.start` and `TritonServer.wait` raise.
    """
    with ended_by_signals():
        server = TritonServer(
            repository,
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            log=repository.with_name("server.log"),
            triton=find_triton(say),
        )
        with server:
            say(f"HTTP     http://{server.http}\ngRPC     {server.grpc}\nMetrics  http://{server.metrics}/metrics")
            if host not in (LOOPBACK, "localhost"):
                say(f"Anyone who reaches {host} can use it: there is no encryption and no password.")
            models = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
            say(f"What a model takes: curl -s http://{server.http}/v2/models/{models[0] if models else 'NAME'}/config")
            say(f"How to send requests: {repository / 'README.md'}. Log: {server.log}. Ready; Ctrl-C stops it.")
            server.wait(say)
