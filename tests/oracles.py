"""transformers, as `make test` installs it: not beside open_clip, which would import it in every process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix, "oracles")
_PATHS = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(_PATHS), "HF_HUB_OFFLINE": "1"}


def run_oracle(script, folder, *more):
    """Run a program of this folder with transformers, which writes into `folder`; skip where it is not installed."""
    if not (FOLDER / "transformers").is_dir():
        pytest.skip(f"transformers is not installed. Run: pip install --no-deps --target {FOLDER} transformers")
    run = [sys.executable, Path(__file__).with_name(script), folder, *more]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder
