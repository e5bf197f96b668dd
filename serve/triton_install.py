"""Find a Triton server: on PATH, else in the cache, else in a wheel that holds a whole one (nvidia-pytriton).

    $CLIPRESS_CACHE/triton/<version>/<interpreter>/
        pytriton/tritonserver/    binary, python backend, response cache
        nvidia_pytriton.libs/     the libraries they link to
        python/                   a virtual environment with NumPy 1 and nothing else

The wheel is unpacked, not installed: it would pin NumPy for everything else. Its python backend uses the environment of the
first `python3` on PATH, and under NumPy 2 answers with empty tensors and no error; so it gets an environment of its own.
All other packages come from the interpreter that runs clipress: a .pth file adds the folders that MODULES names.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clipress.errors import ArtifactError, BackendMissing
from clipress.progress import Say
from clipress.storage import cache_folder, locked, write_whole

VERSION = "0.7.0"  # Version of nvidia-pytriton, which contains Triton 2.51.
MODULES = "CLIPRESS_TRITON_MODULES"
PTH = f"import os, site; list(map(site.addsitedir, filter(None, os.environ.get({MODULES!r}, '').split(os.pathsep))))\n"
INSTALLING = threading.Lock()  # A folder's lock does not exclude threads of the same process.
WAY_OUT = "Put a tritonserver on PATH, or start the repository in Triton's container as its README.md says."


@dataclass(frozen=True)
class Triton:
    """A server that can be started: its binary, the options for its own folders, and additions to its environment."""

    binary: Path
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def find_triton(say: Say = lambda _: None) -> Triton:
    """Return the `tritonserver` on PATH, with its own backends, else the one in the cache.

    If the cache has none it is fetched, some 60 MB, once for every interpreter; `say` reports that. Several processes and
    threads may call this at once. Raises BackendMissing if it cannot be fetched, or cannot run on this machine.
    """
    if own := shutil.which("tritonserver"):
        return Triton(Path(own))
    home = cache_folder().absolute() / "triton" / VERSION / _interpreter()
    if not home.is_dir():
        if not sys.platform.startswith("linux"):
            raise BackendMissing(f"Triton runs on Linux only, and this is {sys.platform}. {WAY_OUT}")
        try:
            with INSTALLING, locked(home.parent, wait=say):
                if not home.is_dir():  # Another one may have installed it meanwhile.
                    say(f"Installing Triton (nvidia-pytriton {VERSION}, about 60 MB) into {home}, once.")
                    write_whole(home, install)
        except ArtifactError as error:
            raise BackendMissing(
                f"Triton cannot be installed into {home.parent}: {error} Or set $CLIPRESS_CACHE to another folder. {WAY_OUT}"
            ) from None
    return _in_folder(home)


def _interpreter() -> str:
    known = hashlib.sha256(sys.base_prefix.encode()).hexdigest()[:8]
    return f"{sys.implementation.name}{sys.version_info.major}.{sys.version_info.minor}-{known}"


def _in_folder(home: Path) -> Triton:
    server = home / "pytriton" / "tritonserver"
    libraries = [home / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix, "lib")]
    modules = [Path(folder).absolute() for folder in sys.path if folder and Path(folder).is_dir()]
    return Triton(
        server / "bin" / "tritonserver",
        (f"--backend-directory={server / 'backends'}", f"--cache-directory={server / 'caches'}"),
        {
            "PATH": _joined(home / "python" / "bin", os.environ.get("PATH", os.defpath)),
            "LD_LIBRARY_PATH": _joined(*libraries, os.environ.get("LD_LIBRARY_PATH")),
            MODULES: _joined(*modules),
        },
    )


def _joined(*folders: str | Path | None) -> str:
    """Join folders for an environment variable, without empty entries: those would mean the current folder."""
    return os.pathsep.join(str(folder) for folder in folders if folder)


def install(home: Path) -> None:
    """Download the wheel, unpack it into a folder, and check that its binaries run. Raises BackendMissing."""
    wheels = home / "wheel"
    _pip("download", "--no-deps", "--dest", wheels, f"nvidia-pytriton=={VERSION}")
    for wheel in wheels.glob("*.whl"):
        _unpack(wheel, home)
    shutil.rmtree(wheels)
    _use_own_stub(home)
    environment = home / "python"
    venv.create(environment, symlinks=True)
    packages = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    _pip("install", "--no-deps", "--no-compile", "--only-binary", ":all:", "--target", packages, "numpy<2")
    (packages / "clipress.pth").write_text(PTH, encoding="utf-8")
    check_binaries(home)


def _pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *words]
    done = subprocess.run(
        [*map(str, command), "--quiet", "--no-input", "--disable-pip-version-check"], capture_output=True, text=True
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise BackendMissing(
            f"Triton is missing: there is none on PATH, and `pip {words[0]} {words[-1]}` failed on {_machine()}: "
            f"{' '.join(errors[-2:])} {WAY_OUT}"
        )


def _machine() -> str:
    return f"{platform.platform()} with Python {platform.python_version()}"


def _unpack(wheel: Path, home: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not (home / name).resolve().is_relative_to(home.resolve()):
                raise BackendMissing(f"{wheel.name} holds '{name}', outside its own folder: it cannot be trusted.")
        archive.extractall(home)


def _use_own_stub(home: Path) -> None:
    """Make the binaries executable, and use the python backend's stub for this interpreter."""
    server = home / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = sorted(path.name for path in stub.parent.parent.glob("*"))
        raise BackendMissing(
            f"Triton's python backend: expected one for Python {version}, found {', '.join(known)}. {WAY_OUT}"
        )
    fitted = server / "backends" / "python" / stub.name
    shutil.copyfile(stub, fitted)
    shutil.rmtree(stub.parent.parent)
    for binary in (fitted, server / "bin" / "tritonserver"):
        binary.chmod(0o755)


def check_binaries(home: Path) -> None:
    """Start both binaries once: the loader then says what this machine lacks (glibc, libpython, ...).

    Raises BackendMissing.
    """
    triton = _in_folder(home)
    stub = home / "pytriton" / "tritonserver" / "backends" / "python" / "triton_python_backend_stub"
    for command in ([triton.binary, "--help"], [stub]):
        try:
            done = subprocess.run(
                command, env={**os.environ, **triton.environment}, capture_output=True, text=True, timeout=60
            )
            failed = done.stderr if done.returncode in (126, 127) or done.returncode < 0 else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            failed = str(error)
        if failed:
            raise BackendMissing(
                f"Triton was fetched, but its {Path(command[0]).name} cannot run on {_machine()}: {failed.strip()} {WAY_OUT}"
            )
