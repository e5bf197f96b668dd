"""A real Triton: its answers, its errors and its cleanup."""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as triton_client
from tritonclient.utils import InferenceServerException

from clipress.errors import ServerError
from clipress.serve.triton_install import Triton
from clipress.serve.triton_server import SHARED_MEMORY, TritonServer

PROBE = """
import json, sys
import clipress, numpy
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        text = json.dumps({"numpy": numpy.__version__, "clipress": clipress.__file__})
        tensor = pb_utils.Tensor("text", numpy.array([text.encode()], numpy.object_))
        return [pb_utils.InferenceResponse([tensor]) for _ in requests]
"""


def put_model(repository, name, code):
    """Write a python model without a batch that answers any number with a text."""
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(code)
    (repository / name / "config.pbtxt").write_text(
        'backend: "python" input { name: "number" data_type: TYPE_FP32 dims: 1 } '
        'output { name: "text" data_type: TYPE_STRING dims: 1 } instance_group { kind: KIND_CPU }'
    )
    return repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Write a model that reports the environment it runs in."""
    return put_model(tmp_path_factory.mktemp("models"), "probe", PROBE)


@pytest.fixture(scope="module")
def server(triton, repository):
    with TritonServer(repository, triton=triton) as server:
        yield server


@pytest.fixture
def client(server):
    client = triton_client.InferenceServerClient(server.grpc, channel_args=[("grpc.enable_http_proxy", 0)])
    yield client
    client.close()


def infer(client, model, takes, kind, array, gives):
    tensor = triton_client.InferInput(takes, list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return client.infer(model, [tensor]).as_numpy(gives)


def processes(field, number):
    """Return the processes with this parent (field 1) or session (field 3); see proc(5)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # The process has just ended.
            continue
        if int(fields[field]) == number and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def children(pid):
    return processes(1, pid)


def session(pid):
    return processes(3, pid)


def await_end(pids, seconds=60):
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([handle], [], [], seconds)[0], f"{pid} is still there"
        os.close(handle)


def until(condition, seconds=60):
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline


def shared_memory(pid):
    return list(SHARED_MEMORY.glob(f"clipress-{pid}-*"))


def test_both_encoders_answer_as_onnx_runtime_does(served, exports):
    client = triton_client.InferenceServerClient(served.grpc, channel_args=[("grpc.enable_http_proxy", 0)])
    generator = np.random.default_rng(0)
    for tower, takes, kind, made in (
        ("image", "pixel_values", "FP32", lambda dims: generator.standard_normal((3, *dims), np.float32)),
        ("text", "input_ids", "INT64", lambda dims: generator.integers(0, 99, (3, *dims))),
    ):
        model = f"{tower}_encoder"
        config = client.get_model_config(model, as_json=True)["config"]
        dims = [int(dim) for dim in config["input"][0]["dims"]]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        onnx = exports[1] / f"{tower}.onnx"
        session = onnxruntime.InferenceSession(onnx, options, ["CPUExecutionProvider"])
        for sides in [dims] if tower == "image" else [[24], [5]]:  # texts have any length
            rows = made(sides)
            direct = session.run(None, {takes: rows})[0]
            np.testing.assert_array_equal(infer(client, model, takes, kind, rows, f"{tower}_embeds"), direct)
    client.close()


def test_models_run_with_numpy_1_and_this_clipress(client):
    import clipress

    found = json.loads(infer(client, "probe", "number", "FP32", np.zeros(1, np.float32), "text")[0])
    assert found["numpy"].startswith("1.")
    assert found["clipress"] == clipress.__file__


def test_an_unloaded_model_answers_again_after_loading(server, client):
    server.unload("probe")
    with pytest.raises(InferenceServerException, match=r"unknown model|not ready|not found"):
        infer(client, "probe", "number", "FP32", np.zeros(1, np.float32), "text")
    server.load("probe")
    assert infer(client, "probe", "number", "FP32", np.zeros(1, np.float32), "text").size == 1


def test_a_new_version_is_served_after_loading(server, client, repository):
    newer = repository / "probe" / "2"
    newer.mkdir()
    (newer / "model.py").write_text(PROBE)
    server.load("probe")
    assert [client.is_model_ready("probe", version) for version in "12"] == [False, True]


def test_a_missing_model_cannot_be_loaded(server):
    with pytest.raises(ServerError, match="could not load nobody: failed to load 'nobody'"):
        server.load("nobody")


def test_clients_cannot_load_models_or_share_memory(client):
    for forbidden in (
        lambda: client.load_model("probe"),
        lambda: client.unload_model("probe"),
        lambda: client.register_system_shared_memory("mine", "/anything", 64),
    ):
        with pytest.raises(InferenceServerException, match="restricted"):
            forbidden()


def listening():
    """Return {port: addresses} of all listening sockets, as proc(5) writes them."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            address, port = local.split(":")
            if state == "0A":
                found.setdefault(int(port, 16), set()).add(address)
    return found


def test_the_server_listens_on_this_machine_only(server):
    found = listening()
    for address in (server.http, server.grpc, server.metrics):
        host, port = address.split(":")
        assert host == "127.0.0.1"
        assert {one[-8:] for one in found[int(port)]} == {"0100007F"}


def test_stopping_a_server_leaves_nothing_behind(triton, tmp_path):
    with TritonServer(put_model(tmp_path, "probe", PROBE), triton=triton) as server:
        leader = server.pid
        assert len(session(leader)) > 1
        assert list(SHARED_MEMORY.glob(f"{server.name}-*"))
        assert set(listening()) >= {int(one.split(":")[1]) for one in (server.http, server.grpc, server.metrics)}
        assert server.log.is_file()
    assert session(leader) == []
    assert not {int(one.split(":")[1]) for one in (server.http, server.grpc, server.metrics)} & set(listening())
    assert not server.log.exists()
    assert list(SHARED_MEMORY.glob(f"{server.name}-*")) == []


def test_a_model_that_cannot_be_loaded_is_an_error_with_its_reason(triton, tmp_path):
    repository = put_model(tmp_path / "models", "broken", "import a_module_nobody_has")
    with pytest.raises(ServerError) as failed, TritonServer(repository, triton=triton, log=tmp_path / "log"):
        pass
    assert "ended with exit code 1 before it was ready" in str(failed.value)
    assert "failed to load 'broken' version 1" in str(failed.value)
    assert str(failed.value).count("No module named 'a_module_nobody_has'") == 1
    assert "\n" not in str(failed.value)
    assert "a_module_nobody_has" in (tmp_path / "log").read_text()


def test_a_server_that_does_not_become_ready_is_stopped(triton, tmp_path):
    known = children(os.getpid())
    code = "import threading\nclass TritonPythonModel:\n    def initialize(self, args): threading.Event().wait()"
    with (
        pytest.raises(ServerError, match=r"not ready within 0\.5 s\. Its log ends"),
        TritonServer(put_model(tmp_path, "endless", code), triton=triton, ready_within=0.5),
    ):
        pass
    assert set(children(os.getpid())) <= set(known)


def test_a_server_that_dies_is_an_error(triton, tmp_path):
    (tmp_path / "models").mkdir()
    known = children(os.getpid())
    with TritonServer(tmp_path / "models", triton=triton) as server:
        (leader,) = set(children(os.getpid())) - set(known)
        os.kill(leader, signal.SIGKILL)
        with pytest.raises(ServerError, match="ended by itself, with exit code -9"):
            server.wait()


def test_a_port_in_use_is_an_error_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"127\.0\.0\.1:{port} \(grpc\): Address already in use"):
            TritonServer(tmp_path, grpc_port=port, triton=Triton(Path("/nowhere"))).start()


RUNNING = []


@pytest.fixture(autouse=True)
def nothing_outlives_a_test():
    """A failing test must not leave its command behind; the server ends with the command."""
    yield
    while RUNNING:
        RUNNING.pop().kill()


def started(*command):
    """Start a command that serves; when it is ready return it, the server's process and the output."""
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
    RUNNING.append(process)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "Ready" in line:
            (leader,) = children(process.pid)
            return process, leader, "".join(printed)
    raise AssertionError(f"ended with {process.wait()}: {''.join(printed)}")


SERVE = "import sys; from pathlib import Path; from clipress.serve.triton_server import serve_until_stopped as serve\n"
SERVE += "serve(Path(sys.argv[1]), lambda line: print(line, flush=True))"


def test_ctrl_c_ends_the_command_without_an_error_and_the_server_with_it(triton, tiny_run, tmp_path):
    shutil.copytree(tiny_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "bench", "triton"))
    process, leader, printed = started("-m", "clipress", "triton", tmp_path / "run")
    with socket.create_connection(re.search(r"gRPC +(\S+):(\d+)", printed).groups()):
        everything = session(leader)
    assert len(everything) > 3  # The server, its models and their instances.
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 0
    assert session(leader) == [] and shared_memory(process.pid) == []
    assert (tmp_path / "run" / "triton" / "server.log").is_file()


def test_sigterm_ends_the_command_without_an_error(triton, tmp_path):
    process, leader, _ = started("-c", SERVE, put_model(tmp_path / "models", "probe", PROBE))
    process.terminate()
    process.communicate()
    assert process.returncode == 0
    assert session(leader) == [] and shared_memory(process.pid) == []


def test_the_server_ends_when_its_clipress_is_killed(triton, tmp_path):
    process, leader, _ = started("-c", SERVE, put_model(tmp_path / "models", "probe", PROBE))
    everything = session(leader)
    assert len(everything) == 2
    process.kill()
    process.communicate()
    await_end(everything)
    assert session(leader) == [] and shared_memory(process.pid) == []


@pytest.mark.slow  # The fault tests cover `wait` itself; this one checks that the command uses it.
def test_a_model_whose_process_is_killed_is_loaded_again(triton, tmp_path):
    """Otherwise its requests would keep failing while the server reports ready."""
    process, leader, printed = started("-c", SERVE, put_model(tmp_path / "models", "probe", PROBE))
    (model,) = children(leader)
    os.kill(model, signal.SIGKILL)
    assert process.stdout.readline() == "A process of probe has died: it is loaded again.\n"
    (address,) = re.findall(r"gRPC +(\S+)", printed)
    with triton_client.InferenceServerClient(address) as client:

        def answered():
            with suppress(InferenceServerException):
                return infer(client, "probe", "number", "FP32", np.zeros(1, np.float32), "text").size == 1

        until(answered)
    process.terminate()
    process.communicate()
    assert process.returncode == 0 and session(leader) == []
