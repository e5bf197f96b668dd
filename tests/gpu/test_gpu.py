"""What a GPU computes is what a CPU computes: losses, gradients, scores, cuts, refits, caches and whole runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import clipress, tiny_inputs, write_recipe

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.learner import Learner
from clipress.compress.loader import batches
from clipress.compress.losses import terms_from
from clipress.compress.prune.budget import Align, Budget
from clipress.compress.prune.search import Prune
from clipress.compress.prune.search import run as prune
from clipress.compress.settings import Runtime, Training
from clipress.compress.teacher_cache import build_cache
from clipress.compress.train import Loop, train
from clipress.data.sources import open_source
from clipress.data.spec import Augment, DataSpec, SourceSpec
from clipress.models import surgery
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture
from clipress.recipe import Recipe
from clipress.tasks import model_from_artifact
from clipress.workflow.forecast import forecast

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
JOB = Path(__file__).parents[1] / "flow" / "distributed_job.py"
DATA = DataSpec(train=(SourceSpec(format="scenes", limit=128),))


@pytest.fixture(scope="module")
def fabrics():
    """Fabric on the CPU and on the GPU, both in float32."""
    return {name: start_fabric(Runtime(accelerator=name, precision="fp32")) for name in ("cpu", "cuda")}


def context_on(fabrics, accelerator, **more):
    runtime = Runtime(accelerator=accelerator, precision="fp32")
    return Context(fabrics[accelerator], DATA, 0, runtime=runtime, title="t", **more)


def embeddings(model):
    """Return unit embeddings of random images and texts, [6, D] on the CPU."""
    images, ids = tiny_inputs()
    module = model.module.cpu().eval()
    with torch.no_grad():
        found = (module.encode_image(images, normalize=True), module.encode_text(ids, normalize=True))
    return torch.cat(found)


def test_every_loss_gradient_and_score_is_the_cpu_s(tmp_path):
    seen = {}
    for accelerator in ("cpu", "cuda"):
        out = tmp_path / f"{accelerator}.pt"
        done = subprocess.run(
            [sys.executable, JOB, "auto", out, accelerator], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        seen[accelerator] = torch.load(out, map_location="cpu")
    for case, wanted in seen["cpu"].items():
        found = seen["cuda"][case]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4), case
        for kind in ("gradients", "learned"):
            for name, gradient in wanted[kind].items():
                atol = 1e-4 * max(float(gradient.abs().max()), 1.0)
                torch.testing.assert_close(found[kind][name], gradient, rtol=1e-3, atol=atol, msg=f"{case} {name}")
        for own, other in zip(found["scores"], wanted["scores"], strict=True):
            torch.testing.assert_close(own / own.sum(), other / other.sum(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 6])
def test_a_cut_is_the_cpu_s(fabrics, steps):
    cut = {}
    for accelerator in fabrics:
        settings = Prune(
            budget=Budget(params=0.5),
            align=Align(head_dim=4, ffn=16),
            steps=steps,
            calibrate=64,
            batch_size=32,
            lr=1e-4,
        )
        cut[accelerator], _ = prune(settings, new_model(tiny_architecture(), 0), context_on(fabrics, accelerator))
    assert surgery.shapes(cut["cuda"].module) == surgery.shapes(cut["cpu"].module)
    # A basis may differ in sign and in directions that no sample uses, so what the models compute is compared.
    own, other = (embeddings(cut[name]) for name in ("cuda", "cpu"))
    assert float((own * other).sum(1).min()) > 0.99


def test_training_on_a_gpu_follows_the_cpu(fabrics):
    last = {}
    for accelerator in fabrics:
        model = new_model(tiny_architecture(), 0)
        settings = Training(steps=10, batch_size=32, lr=1e-3)
        last[accelerator] = train(model, settings, {"contrastive": 1.0}, context_on(fabrics, accelerator))["last"][
            "loss"
        ]
    assert last["cuda"] == pytest.approx(last["cpu"], rel=1e-3)


def test_an_interrupted_job_goes_on_where_it_was(tmp_path, recipe, monkeypatch):
    from clipress.compress.learner import Learner

    recipe["teacher"] = {
        "recipe": recipe["teacher"]["recipe"] | {"stages": [{"distill": {"steps": 4, "batch_size": 32}}]}
    }
    recipe["stages"] = [{"distill": {"losses": ["contrastive", "feature"], "steps": 6, "batch_size": 16}}]
    recipe["runtime"] = {"checkpoint_every": 2, "precision": "fp32"}
    path = write_recipe(recipe, tmp_path)
    assert clipress("compress", path, "--out", tmp_path / "whole").exit_code == 0
    update, calls = Learner.update, []

    def failing(self, rate):
        calls.append(rate)
        if len(calls) == 4:
            raise KeyboardInterrupt
        update(self, rate)

    monkeypatch.setattr(Learner, "update", failing)
    assert clipress("compress", path, "--out", tmp_path / "broken").exit_code != 0
    monkeypatch.setattr(Learner, "update", update)
    assert clipress("compress", path, "--out", tmp_path / "broken").exit_code == 0
    whole, broken = (model_from_artifact(tmp_path / name / "distilled") for name in ("whole", "broken"))
    torch.testing.assert_close(embeddings(broken), embeddings(whole), rtol=1e-4, atol=1e-5)


def test_a_teacher_cache_holds_what_the_cpu_computes(tmp_path):
    model, source = new_model(tiny_architecture(), 0), open_source(SourceSpec(format="scenes", limit=32))
    rows = {}
    for device in ("cpu", "cuda"):
        model.module.to(device).eval()
        cache = build_cache(
            model, source, Augment(), 1, tmp_path / device, teacher_hash="t", say=lambda _: None, precision="fp32"
        )
        rows[device] = torch.from_numpy(cache.images([cache.image_row(item) for item in (0, 5, 31)]))
    torch.testing.assert_close(rows["cuda"], rows["cpu"], rtol=1e-3, atol=1e-3)  # stored in float16


def test_a_whole_run_in_bf16_trains_exports_and_measures(tiny_run):
    """`auto` chooses the GPU and bf16; files are made from the weights it trained, and the torch runner measures there."""
    run, _ = tiny_run
    about = json.loads((run / "pruned" / "clipress.json").read_text())
    assert about["lineage"][-1]["machine"]["device"] == torch.cuda.get_device_name()
    for runner in ("torch", "torch-compiled"):
        done = clipress("bench", run, "--runner", runner, "--dtype", "bf16")
        assert done.exit_code == 0, done.output
        rows = json.loads((run / "bench" / "results.json").read_text())["rows"]
        assert any(row["backend"] == runner and row["device"] == torch.cuda.get_device_name() for row in rows)


def test_a_step_never_makes_the_host_wait(fabrics):
    context = context_on(fabrics, "cuda", teachers=(new_model(tiny_architecture(), 1),))
    settings = Training(steps=100, batch_size=32)
    model = new_model(tiny_architecture(), 0)
    loop = Loop(Learner(model, settings, terms_from(("contrastive", "feature"), "t"), context), [], settings, context)
    arrays = next(iter(batches(model, settings, context, 1)))
    arrays.pop("bad")
    arrays = {name: rows.to("cuda") for name, rows in arrays.items()}
    lines = []
    for step in range(5):
        loop.take_step(step, dict(arrays), 1e-4, lines.append)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5, 105):
            loop.take_step(step, dict(arrays), 1e-4, lines.append)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loop.settle(lines.append)
    assert [line["step"] for line in lines] == list(range(105))


def test_a_compiled_step_is_the_step(fabrics):
    losses = {}
    for compiled in (False, True):
        context = context_on(fabrics, "cuda", teachers=(new_model(tiny_architecture(), 1),))
        context = replace(context, runtime=context.runtime.model_copy(update={"compile": compiled}))
        details = train(
            new_model(tiny_architecture(), 0),
            Training(steps=6, batch_size=32, lr=1e-3),
            terms_from(("contrastive", "feature"), "t"),
            context,
        )
        losses[compiled] = details["last"]["loss"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_takes_the_memory_that_was_foretold(precision):
    recipe = {
        "name": "foretold",
        "teacher": {"model": "ViT-B-32", "checkpoint": "random"},
        "data": {"train": [{"format": "digits"}]},
        "stages": [{"distill": {"losses": ["contrastive", "feature"], "steps": 4, "batch_size": 512}}],
        "runtime": {"accelerator": "cuda", "precision": precision},
    }
    (stage,) = forecast(Recipe.model_validate(recipe)).stages
    assert stage.measured.peak_bytes == pytest.approx(stage.needs.peak, rel=0.2) and stage.measured.seconds > 0
