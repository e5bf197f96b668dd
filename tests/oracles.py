"""Other people's libraries, as `make test` installs them: not beside open_clip, which would import transformers in every process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDERS = {"transformers": Path(sys.prefix, "oracles"), "optimum": Path(sys.prefix, "oracles-optimum")}


def run_oracle(script, folder, *more, library="transformers", beside=()):
    """Run a program of this folder with a library and those `beside` it, mostly one that writes into `folder`.

    Skips where one is not installed.
    """
    site = FOLDERS[library]
    for name in (library, *beside):
        if not (site / name).is_dir():
            pytest.skip(f"{name} is not installed in {site}. The Makefile says how it is: make test")
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, Path(__file__).with_name(script), folder, *more]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder
