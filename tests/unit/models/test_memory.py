"""A large checkpoint is in memory about once while it is imported, and so is an artifact while it is loaded."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from clipress.models import surgery
from clipress.models.load import build

PROGRAM = """
import sys
from pathlib import Path
from clipress.artifact import save_artifact
from clipress.models.importers import artifact_from_checkpoint
from clipress.tasks import model_from_artifact

def peak():  # getrusage would count what the parent had
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

def whole(folder):
    save_artifact(artifact_from_checkpoint(folder), folder / "artifact")

small, large = map(Path, sys.argv[2:])
whole(small)  # with what the libraries take
model_from_artifact(small / "artifact")
if sys.argv[1] == "load":
    before = peak()
    model_from_artifact(large / "artifact")
else:
    before = peak()
    whole(large)
print(peak() - before)
"""
SIZES = {"small": 64, "large": 2048}  # widths: 0.3 and 405 MB of float32


def architecture(width):
    text = {"context_length": 8, "vocab_size": 64, "width": width, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": width, "layers": 1, "head_width": width // 2}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "custom_text": False}


@pytest.fixture(scope="module", params=["float32.safetensors", "float16.safetensors", "float16.bin"])
def folders(request, tmp_path_factory):
    import json

    home = tmp_path_factory.mktemp("sizes")
    for name, width in SIZES.items():
        (home / name).mkdir()
        weights = surgery.stock_weights(build(architecture(width), 0))
        if request.param.startswith("float16"):
            weights = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
        if request.param.endswith("bin"):
            torch.save(weights, home / name / "open_clip_pytorch_model.bin")
        else:
            save_file(
                {key: tensor.contiguous() for key, tensor in weights.items()},
                home / name / "open_clip_model.safetensors",
            )
        config = {"model_cfg": architecture(width), "preprocess_cfg": {}}
        (home / name / "open_clip_config.json").write_text(json.dumps(config))
    return home


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_at_most_one_and_three_tenths_copies_are_in_memory(folders):
    size = sum(tensor.nbytes for tensor in build(architecture(SIZES["large"]), 0).state_dict().values())
    assert size > 400e6
    for what in ("import", "load"):
        run = [sys.executable, "-c", PROGRAM, what, folders / "small", folders / "large"]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        assert 0.9 * size < int(done.stdout.split()[-1]) < 1.3 * size, what
