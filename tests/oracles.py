"""transformers, as `make test` installs it, and optimum: not beside open_clip, which would import them in every process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDERS = {"transformers": Path(sys.prefix, "oracles"), "optimum": Path(sys.prefix, "oracles-optimum")}
PINS = {
    "transformers": "transformers",
    # optimum reads ONNX with an older transformers than the other oracles.
    "optimum": "optimum==2.1.0 optimum-onnx==0.1.0 transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2",
}


def run_oracle(script, folder, *more, library="transformers"):
    """Run a program of this folder with a library, mostly one that writes into `folder`; skip where it is not installed."""
    site = FOLDERS[library]
    if not (site / library).is_dir():
        pytest.skip(f"{library} is not installed. Run: pip install --no-deps --target {site} {PINS[library]}")
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, Path(__file__).with_name(script), folder, *more]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder
