"""How Triton is found and fetched: without a network, from wheels made here."""

import os
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clipress.errors import BackendMissing
from clipress.serve import triton_install
from clipress.serve.triton_install import VERSION, Triton, check_binaries, find_triton


@pytest.fixture(autouse=True)
def nothing_to_find(tmp_path, monkeypatch):
    """No server on PATH, an empty cache, and a pip that knows only `wheels`."""
    monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", "/bin"]))
    monkeypatch.setenv("CLIPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()


def put_wheel(folder, **members):
    info = f"nvidia_pytriton-{VERSION}.dist-info"
    with zipfile.ZipFile(folder / "wheels" / f"nvidia_pytriton-{VERSION}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: nvidia-pytriton\nVersion: {VERSION}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        for name, content in members.items():
            wheel.writestr(name, content)


def files_left(folder):
    return [path for path in (folder / "cache").rglob("*") if path.name != ".lock" and path.is_file()]


def test_a_server_on_path_uses_its_own_backends(tmp_path, monkeypatch):
    own = tmp_path / "tritonserver"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_triton() == Triton(own, (), {})


def test_a_wheel_that_cannot_be_fetched_is_an_error_with_instructions(tmp_path):
    said = []
    with pytest.raises(BackendMissing) as missing:
        find_triton(said.append)
    (line,) = said
    assert f"nvidia-pytriton {VERSION}" in line and str(tmp_path / "cache") in line
    for part in ("none on PATH", f"pip download nvidia-pytriton=={VERSION}", "No matching distribution", "container"):
        assert part in str(missing.value)
    assert "\n" not in str(missing.value)
    assert files_left(tmp_path) == []


def test_other_systems_than_linux_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BackendMissing, match=r"Linux only, and this is darwin.*container"):
        find_triton()


@pytest.mark.parametrize("name", ["../../evil", "/tmp/clipress-evil"])
def test_a_wheel_with_files_outside_its_folder_is_refused(tmp_path, name):
    put_wheel(tmp_path, **{name: "x"})
    with pytest.raises(BackendMissing, match=rf"'{name}', outside its own folder"):
        find_triton()
    assert not list(tmp_path.rglob("*evil"))
    assert files_left(tmp_path) == []


def test_a_python_without_a_stub_gets_a_list_of_those_with_one(tmp_path):
    put_wheel(tmp_path, **{"pytriton/tritonserver/python_backend_stubs/3.8/triton_python_backend_stub": "x"})
    with pytest.raises(BackendMissing, match=rf"Python {sys.version_info[0]}\.{sys.version_info[1]}, found 3\.8\."):
        find_triton()
    assert files_left(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLIPRESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendMissing, match=r"\$CLIPRESS_CACHE"):
        find_triton()


@pytest.mark.parametrize("broken", ["tritonserver", "triton_python_backend_stub"])
def test_a_binary_that_cannot_run_is_an_error_with_the_loaders_message(tmp_path, broken):
    server = tmp_path / "pytriton" / "tritonserver"
    for binary in (server / "bin" / "tritonserver", server / "backends" / "python" / "triton_python_backend_stub"):
        binary.parent.mkdir(parents=True)
        failing = f"echo '{binary.name}: libpython: cannot open' >&2; exit 127"
        binary.write_text(f"#!/bin/sh\n{failing if binary.name == broken else 'exit 1'}\n")
        binary.chmod(0o755)
    with pytest.raises(BackendMissing, match=rf"its {broken} cannot run on .*libpython: cannot open"):
        check_binaries(tmp_path)


FIRST = """
import sys
from pathlib import Path
from clipress.serve import triton_install

def install(home):
    print("fetching", flush=True)
    sys.stdin.readline()
    (home / "whole").write_text("yes")

triton_install.install = install
print(triton_install.find_triton().binary)
"""
SECOND = FIRST.replace('print("fetching", flush=True)', 'raise SystemExit("fetched twice")').replace(
    "find_triton()", "find_triton(lambda line: print(line, flush=True))"
)


def test_concurrent_processes_fetch_the_server_once():
    def start(program):
        return subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    first = start(FIRST)
    assert first.stdout.readline() == "fetching\n"
    second = start(SECOND)
    assert "in use by another clipress process; waiting" in second.stdout.readline()
    found = [first.communicate("go\n")[0], second.communicate()[0]]
    assert found[0] == found[1] and (first.returncode, second.returncode) == (0, 0)
    assert (Path(found[0].strip()).parents[3] / "whole").is_file()


def test_concurrent_threads_fetch_the_server_once(monkeypatch):
    fetched, other = [], threading.Event()

    def install(home):
        fetched.append(home)
        other.wait(0.5)  # Time for the other thread to fetch it too.
        other.set()

    monkeypatch.setattr(triton_install, "install", install)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: find_triton(), range(2))
    assert first == second and len(fetched) == 1
