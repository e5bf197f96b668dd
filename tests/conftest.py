"""One tiny run through every stage, shared by the tests that need a whole one."""

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

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads that wait for one another only cost time


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Keep the user's own cache out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def triton(pytestconfig, cache_folder) -> Triton:
    """A real Triton; what the tests start finds it too. It is fetched once and kept for the next time."""
    kept = os.environ.get("CLIPRESS_TEST_TRITON") or pytestconfig.cache.mkdir("triton")
    Path(os.environ["CLIPRESS_CACHE"], "triton").symlink_to(Path(kept).absolute())
    try:
        return find_triton()
    except BackendMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def exports(tiny_run) -> list[Path]:
    """What `served` serves: its version 1 and its version 2."""
    from triton_requests import STAGES

    return [tiny_run[0] / "export" / stage for stage in STAGES]


@pytest.fixture(scope="session")
def served(triton, exports, tmp_path_factory):
    """A real Triton that serves two versions of the tiny run's models, the second one. Leave it as it was."""
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
    """A fresh copy of the tiny recipe, to be changed freely."""
    return copy.deepcopy(RECIPE)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> tuple[Path, Result]:
    """The tiny recipe through compress, export, bench and serve: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("flow")
    result = clipress("run", write_recipe(RECIPE, folder), "--out", folder / "run")
    if result.exception:
        raise result.exception if not isinstance(result.exception, SystemExit) else AssertionError(result.output)
    return folder / "run", result
