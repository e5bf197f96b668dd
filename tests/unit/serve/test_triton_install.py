"""Where Triton is found and how it is fetched: without a network, the wheels are made here."""

import os
import subprocess
import sys
import zipfile

import pytest

from clipress.errors import BackendMissing
from clipress.serve import triton_install
from clipress.serve.triton_install import VERSION, Triton, find_triton


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


def left(folder):
    return [path for path in (folder / "cache").rglob("*") if path.name != ".lock" and path.is_file()]


def test_a_server_on_path_is_taken_with_its_own_backends(tmp_path, monkeypatch):
    own = tmp_path / "tritonserver"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_triton() == Triton(own, (), {})


def test_a_wheel_that_cannot_be_had_is_told_with_a_way_out(tmp_path):
    told = []
    with pytest.raises(BackendMissing) as missing:
        find_triton(told.append)
    (line,) = told
    assert f"nvidia-pytriton {VERSION}" in line and str(tmp_path / "cache") in line
    for part in ("none on PATH", f"pip download nvidia-pytriton=={VERSION}", "No matching distribution", "container"):
        assert part in str(missing.value)
    assert "\n" not in str(missing.value)
    assert left(tmp_path) == []


def test_other_systems_than_linux_are_told_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BackendMissing, match=r"Linux only, and this is darwin.*container"):
        find_triton()


@pytest.mark.parametrize("name", ["../../evil", "/tmp/clipress-evil"])
def test_a_wheel_that_reaches_out_of_its_folder_is_refused(tmp_path, name):
    put_wheel(tmp_path, **{name: "x"})
    with pytest.raises(BackendMissing, match=rf"'{name}', outside its own folder"):
        find_triton()
    assert not list(tmp_path.rglob("*evil"))
    assert left(tmp_path) == []


def test_a_python_that_has_no_stub_is_told_which_have_one(tmp_path):
    put_wheel(tmp_path, **{"pytriton/tritonserver/python_backend_stubs/3.8/triton_python_backend_stub": "x"})
    with pytest.raises(BackendMissing, match=rf"Python {sys.version_info[0]}\.{sys.version_info[1]}; there is: 3\.8\."):
        find_triton()
    assert left(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLIPRESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendMissing, match=r"\$CLIPRESS_CACHE"):
        find_triton()


@pytest.mark.parametrize("broken", ["tritonserver", "triton_python_backend_stub"])
def test_a_binary_that_cannot_run_here_is_told_with_what_the_loader_says(tmp_path, broken):
    server = tmp_path / "pytriton" / "tritonserver"
    for binary in (server / "bin" / "tritonserver", server / "backends" / "python" / "triton_python_backend_stub"):
        binary.parent.mkdir(parents=True)
        failing = f"echo '{binary.name}: libpython: cannot open' >&2; exit 127"
        binary.write_text(f"#!/bin/sh\n{failing if binary.name == broken else 'exit 1'}\n")
        binary.chmod(0o755)
    with pytest.raises(BackendMissing, match=rf"its {broken} cannot run on .*libpython: cannot open"):
        triton_install.check_binaries(tmp_path)


INSTALLER = """
import sys
from pathlib import Path
from clipress.serve import triton_install

def install(home):
    print("installing", flush=True)
    sys.stdin.read()
    (home / "whole").write_text("yes")

triton_install.install = install
triton_install.find_triton()
"""


def test_a_second_process_waits_for_the_first_and_does_not_install_again(monkeypatch):
    messages = []
    with subprocess.Popen(
        [sys.executable, "-c", INSTALLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "installing\n"

        def tell(message):
            messages.append(message)
            first.stdin.close()  # lets the first process finish

        monkeypatch.setattr(triton_install, "install", lambda _: pytest.fail("installed twice"))
        found = find_triton(tell)
    assert first.returncode == 0 and len(messages) == 1 and "waiting" in messages[0]
    assert (found.binary.parents[3] / "whole").is_file()
