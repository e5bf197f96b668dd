"""Sweeps of the registries: every stage, data format, runner, task and export target works in its smallest setting.

Losses, criteria, schedules, importers and named students are swept beside their own tests.
"""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from fake_tensorrt import fake_machine
from PIL import Image
from task_students import DATA, STUDENTS

from clipress.artifact import save_artifact
from clipress.bench.runners import RUNNERS, open_runner
from clipress.bench.settings import BenchSettings
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.settings import Runtime
from clipress.compress.stage import STAGES, stages_from
from clipress.data.eval_sets import evalsets
from clipress.data.sources import FORMATS, open_source
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import ClipressError
from clipress.export.settings import OnnxSettings
from clipress.export.targets import TARGETS, TargetJob
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import TASKS, evaluate_model, graphs_of, model_from_artifact, runs_of, task_named

LINEAGE = ({"stage": "start", "hash": "0"},)
SHORT = {"steps": 1, "batch_size": 8}


def sets_of(task):
    return evalsets([SourceSpec(format=DATA[task], split="test", limit=24)])


# stages

STAGE_SETTINGS = {
    "distill": {"losses": ["contrastive"], **SHORT},
    "prune": {"budget": {"params": 0.7}, "align": {"head_dim": 4, "ffn": 16}, "distill_losses": [], **SHORT},
    "sparsify": {"losses": ["contrastive"], **SHORT},
    "quantize": {"losses": ["contrastive"], "calibrate": 8, **SHORT},
}


def test_every_stage_has_settings_here():
    assert STAGE_SETTINGS.keys() == STAGES.keys()


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_changes_a_model_that_its_artifact_restores(kind, tmp_path):
    (stage,) = stages_from([{kind: STAGE_SETTINGS[kind]}])
    assert (stage.kind, stage.name) == (kind, STAGES[kind].makes)
    data = DataSpec(train=(SourceSpec(format="scenes", limit=16),))
    start = new_model(tiny_architecture(layers=1), 0)
    before = {name: tensor.clone() for name, tensor in start.module.state_dict().items()}
    made, details = stage.run(start, Context(start_fabric(Runtime(accelerator="cpu")), data, 0, title=kind))
    after = made.module.state_dict()
    assert json.dumps(details) and details["steps"] == 1
    assert after.keys() != before.keys() or any(
        tensor.shape != before[name].shape or not torch.equal(tensor, before[name]) for name, tensor in after.items()
    )
    save_artifact(artifact_from_model(made, LINEAGE, {}), tmp_path / "artifact")
    assert_same_outputs(model_from_artifact(tmp_path / "artifact"), made)


def assert_same_outputs(found, expected):
    for name, graph in graphs_of(expected).items():
        ours, theirs = (runs_of(model)[name](graph.example(3)) for model in (found, expected))
        assert ours.keys() == theirs.keys() == {output.name for output in graph.outputs}
        for key, rows in theirs.items():
            np.testing.assert_array_equal(ours[key], rows)


# data formats


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(folder):
    with (folder / "table").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), ("a.png", "red"), ("b.png", "blue")])
    return {"annotations": folder / "table", "images": folder}


def write_karpathy(folder):
    rows = [{"image": "a.png", "caption": "red"}, {"image": "b.png", "caption": "blue"}]
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"annotations": folder / "rows.json", "images": folder}


def write_coco(folder):
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    captions = [{"image_id": 1, "caption": "red"}, {"image_id": 2, "caption": "blue"}]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return {"annotations": folder / "coco.json", "images": folder}


def write_shard(folder):
    with tarfile.open(folder / "0.tar", "w") as shard:
        for key, color in (("a", "red"), ("b", "blue")):
            for name, content in ((f"{key}.png", png(color)), (f"{key}.txt", color.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return {"shards": str(folder / "0.tar")}


def write_classes(folder):
    for name in ("red", "blue"):
        (folder / "classes" / name).mkdir(parents=True)
        (folder / "classes" / name / "0.png").write_bytes(png(name))
    return {"images": folder / "classes", "templates": ("{}",)}


def write_captions(folder):
    (folder / "captions.tsv").write_text("red\thttp://x.org/1.png\nblue\thttp://x.org/2.png\n")
    return {"annotations": folder / "captions.tsv"}


def write_statements(folder):
    rows = [("a.png", "b.png", "red", "True"), ("b.png", "a.png", "blue", "False")]
    named = [{"images": [one, other], "sentence": text, "label": label} for one, other, text, label in rows]
    (folder / "statements.json").write_text(json.dumps(named))
    return {"annotations": folder / "statements.json", "images": folder}


def write_questions(folder):
    rows = [
        {"image": "a.png", "question": "red", "answer": ["yes"] * 10},
        {"image": "b.png", "question": "blue", "answer": "no"},
    ]
    (folder / "questions.json").write_text(json.dumps(rows))
    return {"annotations": folder / "questions.json", "images": folder}


def write_masks(folder):
    for name, color in (("a", "red"), ("b", "blue")):
        for kind, suffix, content in (
            ("images", "jpg", Image.new("RGB", (8, 6), color)),
            ("annotations", "png", Image.new("L", (8, 6), 1)),
        ):
            path = folder / kind / "training" / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            content.save(path)
    return {"images": folder}


INPUTS = {
    "csv": write_table,
    "karpathy": write_karpathy,
    "coco": write_coco,
    "webdataset": write_shard,
    "folder": write_classes,
    "images": lambda folder: {"images": folder},
    "captions": write_captions,
    "scenes": lambda folder: {"limit": 2},
    "digits": lambda folder: {"limit": 2},
    "nlvr2": write_statements,
    "vqa": write_questions,
    "ade20k": write_masks,
    "shapes": lambda folder: {"limit": 2},
    "statements": lambda folder: {"limit": 2},
    "questions": lambda folder: {"limit": 2},
}
EMBEDDED = ("scenes", "digits", "shapes", "statements", "questions")
WITHOUT_TEXTS = ("images", "shapes", "ade20k")


def test_every_format_has_an_input_here():
    assert INPUTS.keys() == FORMATS.keys()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_reads_images_captions_and_groups(form, tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(png(color))
    open_source.cache_clear()
    source = open_source(SourceSpec(format=form, **INPUTS[form](tmp_path)))
    assert len(source) == 2 and source.fingerprint and (source.has_images or source.has_texts)
    assert source.has_images == (form != "captions") and source.has_texts == (form not in WITHOUT_TEXTS)
    captions = [source.captions(index) for index in range(2)]
    if form not in (*EMBEDDED, *WITHOUT_TEXTS):
        assert sorted(caption for several in captions for caption in several) == ["blue", "red"]
        assert source.group(0) != source.group(1)
    if source.has_images:
        for index, several in enumerate(captions):
            pixels = np.asarray(source.image(index))
            assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
            if several in (("red",), ("blue",)):
                assert pixels[0, 0].argmax() == {"red": 0, "blue": 2}[several[0]]


# tasks


def student(task):
    return task_named(task).student_from(STUDENTS[task], None, 0)


def test_every_task_has_a_student_here():
    assert STUDENTS.keys() == DATA.keys() == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_builds_runs_and_restores_a_model(name, tmp_path):
    task = task_named(name)
    task.check_student(STUDENTS[name], False)
    model = student(name)
    assert task.name == model.task == name and task.main_graph in graphs_of(model)
    assert (model.tokenize() is not None) == task.reads_text
    for key, graph in graphs_of(model).items():
        found = runs_of(model)[key](graph.example(3))
        assert {output.name: (3, *output.shape) for output in graph.outputs} == {
            output: rows.shape for output, rows in found.items()
        }
    save_artifact(artifact_from_model(model, LINEAGE, {}), tmp_path / "artifact")
    assert_same_outputs(model_from_artifact(tmp_path / "artifact"), model)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_measures_the_metrics_that_decide(name):
    outcomes = evaluate_model(student(name), sets_of(name))
    assert any(metric.endswith(task_named(name).figures) for metric in outcomes)
    assert all(np.isfinite(outcome.values).all() for outcome in outcomes.values())


# runners and export targets


@pytest.fixture(scope="module", params=TASKS)
def exported(request, tmp_path_factory):
    """Every task's student as an artifact and an export."""
    home = tmp_path_factory.mktemp(request.param)
    artifact = save_artifact(artifact_from_model(student(request.param), LINEAGE, {}), home / "dense")
    onnx_from_artifact(
        artifact, home / "export" / "dense", OnnxSettings(exporter="torchscript"), sets_of(request.param)
    )
    return artifact, home / "export" / "dense"


@pytest.mark.parametrize("backend", RUNNERS)
def test_every_runner_matches_torch_or_reports_what_is_missing(backend, exported):
    model = model_from_artifact(exported[0])
    try:
        runner = open_runner(backend, *exported, BenchSettings(backends=(backend,)))
    except ClipressError as error:
        assert backend in ("onnxruntime-cuda", "openvino", "tensorrt") and "nstall" in str(error)
        return
    assert runner.backend == backend and runner.model.graphs == graphs_of(model)
    for name, graph in runner.model.graphs.items():
        for key, rows in runs_of(model)[name](graph.example(3)).items():
            np.testing.assert_allclose(runner.run(name)(graph.example(3))[key], rows, atol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_every_export_target_is_made_from_an_export_of_every_task(name, exported, tmp_path, monkeypatch):
    monkeypatch.setattr("clipress.export.tensorrt_target.find_machine", fake_machine)
    home, lines = exported[1].parent, []
    before = {path for path in home.rglob("*") if path.is_file()}
    target = TARGETS[name]
    target.make(
        TargetJob({"dense": exported[1]}, home, lambda: sets_of(model_from_artifact(exported[0]).task), lines.append),
        target.settings(),
    )
    assert lines and {path for path in home.rglob("*") if path.is_file()} - before
