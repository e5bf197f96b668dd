"""Fixtures: the tiny recipe, one run of it shared by all tests, and a real Triton."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers import RECIPE, clipress, write_recipe

from clipress.errors import BackendMissing
from clipress.serve.triton_install import Triton, find_triton

os.environ.setdefault("OMP_NUM_THREADS", "1")  # Tiny models are slower with several threads.


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Keep the user's own cache out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def triton(pytestconfig, cache_folder) -> Triton:
    """A real Triton, also found by the commands under test. It is fetched once and kept for the next session."""
    kept = os.environ.get("CLIPRESS_TEST_TRITON") or pytestconfig.cache.mkdir("triton")
    Path(os.environ["CLIPRESS_CACHE"], "triton").symlink_to(Path(kept).absolute())
    try:
        return find_triton()
    except BackendMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def exports(tiny_run) -> list[Path]:
    """Versions 1 and 2 of the models in `served`."""
    from triton_requests import STAGES

    return [tiny_run[0] / "export" / stage for stage in STAGES]


@pytest.fixture(scope="session")
def served(triton, exports, tmp_path_factory):
    """A real Triton with two versions of the tiny run's models; it serves the second. Tests must leave it unchanged."""
    from triton_requests import SETTINGS

    from clipress.serve.triton_repo import triton_repo_from_export
    from clipress.serve.triton_server import TritonServer

    folder = tmp_path_factory.mktemp("served")
    for export in exports:
        (repository,) = triton_repo_from_export(export, folder, SETTINGS)
    with TritonServer(repository, triton=triton) as server:
        yield server


@pytest.fixture
def recipe() -> dict[str, Any]:
    """A copy of the tiny recipe that a test may change."""
    return copy.deepcopy(RECIPE)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> tuple[Path, Result]:
    """The tiny recipe run through compress, export, bench and serve: the run folder and the command's output."""
    folder = tmp_path_factory.mktemp("flow")
    result = clipress("run", write_recipe(RECIPE, folder), "--out", folder / "run")
    if result.exception:
        raise result.exception if not isinstance(result.exception, SystemExit) else AssertionError(result.output)
    return folder / "run", result


@pytest.fixture(scope="session")
def blip_exports(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    """A tiny BLIP of every task: its export in a run folder, `<run>/export/dense`, and its model in torch."""
    from blip_exports import DATA, write_blip

    return {task: write_blip(task, tmp_path_factory.mktemp(task)) for task in DATA}
