"""One process and two compute the same losses, gradients and pruning scores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import torchrun, write_recipe

from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.models import surgery
from clipress.tasks import model_from_artifact

JOB = Path(__file__).with_name("distributed_job.py")


def close(found, wanted, what):
    atol = 1e-5 * max(float(wanted.abs().max()), 1.0)  # These are float32 sums of many terms.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol, msg=lambda text: f"{what}: {text}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "seen.pt"
    subprocess.run([sys.executable, JOB, "auto", out], check=True, capture_output=True, timeout=300)
    return torch.load(out)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_match_one(alone, strategy, tmp_path):
    done = torchrun(JOB, strategy, tmp_path / "seen.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    seen = torch.load(tmp_path / "seen.pt")
    assert seen.keys() == alone.keys()
    for case, wanted in alone.items():
        found = seen[case]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5), case
        for kind in ("gradients", "learned"):
            assert found[kind].keys() == wanted[kind].keys() and wanted[kind]
            for name, gradient in wanted[kind].items():
                close(found[kind][name].reshape(gradient.shape), gradient, f"{case} {name}")
        for own, other in zip(found["scores"], wanted["scores"], strict=True):
            torch.testing.assert_close(own / own.sum(), other / other.sum(), rtol=1e-4, atol=1e-9)


def test_local_loss_matches_global_loss(alone):
    for width in (32, 16):
        own, everyone = (alone[local, width] for local in (True, False))
        assert own["losses"] == pytest.approx(everyone["losses"], rel=1e-6)


@pytest.mark.parametrize(("strategy", "number"), [("ddp", 0), ("fsdp2", 3)])
def test_torchrun_runs_a_recipe_and_only_one_process_writes(recipe, tmp_path, strategy, number):
    recipe["stages"] = [recipe["stages"][number]]
    recipe["runtime"] = {"strategy": strategy}
    recipe["data"]["augment"] = {"shift": 0}
    path = write_recipe(recipe, tmp_path)
    done = torchrun("-m", "clipress", "run", path, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Try it: ") == 1
    rows = json.loads((tmp_path / "run" / "bench" / "results.json").read_text())["rows"]
    kind, name = {0: ("prune", "pruned"), 3: ("quantize", "int8")}[number]
    assert [row["stage"] for row in rows] == ["teacher", name]
    steps = (tmp_path / "run" / "logs" / f"{name}.jsonl").read_text().splitlines()
    assert len(steps) == recipe["stages"][0][kind]["steps"]


def test_two_processes_rotate_score_and_refit_as_one(recipe, tmp_path):
    shape = {
        "budget": {"params": 0.5},
        "align": {"head_dim": 4, "ffn": 16},
        "steps": 0,
        "calibrate": 64,
        "batch_size": 32,
    }
    recipe["stages"] = [{"prune": {**shape, "refit": {"samples": 64}}}]
    recipe["data"]["augment"] = {"shift": 0}
    path = write_recipe(recipe, tmp_path)
    command = ("-m", "clipress", "compress", path, "--out")
    subprocess.run([sys.executable, *command, tmp_path / "alone"], check=True, capture_output=True, timeout=300)
    done = torchrun(*command, tmp_path / "both")
    assert done.returncode == 0, done.stderr[-2000:]
    alone, both = (model_from_artifact(tmp_path / name / "pruned") for name in ("alone", "both"))
    assert surgery.shapes(both.module) == surgery.shapes(alone.module)
    # Bases may differ in sign and in directions that no sample uses, so embeddings of real images are compared.
    (one,) = evalsets([SourceSpec(format="scenes", split="test", limit=24)])
    pixels = torch.from_numpy(next(one.pixel_batches(alone.preprocess, 24)))
    with torch.no_grad():
        own, other = (model.module.encode_image(pixels, normalize=True) for model in (both, alone))
    assert float((own * other).sum(1).min()) > 0.995
