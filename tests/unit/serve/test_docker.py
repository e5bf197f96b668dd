"""The files that images are built from: everything in them is pinned, and where a docker engine answers the image works."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import clipress
from clipress.serve.settings import ServeSettings
from clipress.version import __version__

ROOT = Path(clipress.__file__).parent
FILES = sorted((ROOT / "serve" / "docker").glob("*.Dockerfile"))


def instructions(path):
    """Return a Dockerfile's instructions, with their continuation lines."""
    text = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return re.sub(r"\\\n\s*", "", text).splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_bases_and_packages_are_pinned(path):
    lines = instructions(path)
    (base,) = [line for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"FROM [\w./-]+:\d+\.\d[\w.-]+", base)
    installs = [part for line in lines if line.startswith("RUN ") for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 1
    for word in installs[0].split("pip install")[1].split():
        if not word.startswith(("-", "/")):
            assert re.fullmatch(r"[\w-]+==[\w.]+|'/opt/clipress\[index\]'", word), word
    assert "--constraint" in installs[0] and "constraints.txt" in installs[0]


def test_the_gpu_image_is_of_the_release_that_repositories_are_written_for():
    (gpu,) = [path for path in FILES if path.stem == "gpu"]
    assert f"tritonserver:{ServeSettings().container}-py3" in instructions(gpu)[0]


def test_the_cpu_image_is_built_and_runs():
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("no docker engine answers")
    (cpu,) = [path for path in FILES if path.stem == "cpu"]
    build = [docker, "build", "-q", "-f", cpu, ROOT]
    image = subprocess.run(build, capture_output=True, text=True, check=True).stdout.strip()
    done = subprocess.run([docker, "run", "--rm", image, "--version"], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout
