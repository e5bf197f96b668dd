"""`clipress plan` foretells what a run then does."""

import json
import shutil

import pytest
import torch
from helpers import RECIPE, SHORT, clipress, write_recipe
from task_students import DATA, STUDENTS

from clipress.artifact import read_header
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.loader import batches
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import Loop
from clipress.data.spec import DataSpec
from clipress.models.tiny import tiny_architecture
from clipress.recipe import Recipe
from clipress.tasks import TASKS, task_named
from clipress.workflow.forecast import forecast

RUN = ("pruned", "recovered", "sparse", "int8")


@pytest.fixture(scope="module")
def found():
    return forecast(Recipe.model_validate(RECIPE))


def test_parameters_and_steps_are_those_of_the_run(found, tiny_run):
    run = tiny_run[0]
    assert [stage.name for stage in found.stages] == list(RUN) and found.artifacts == ("teacher", *RUN)
    for stage in found.stages:
        counts = read_header(run / stage.name)["counts"]
        # A search chooses its own units; its budget and its rounding decide how many parameters remain.
        assert stage.params_after == pytest.approx(counts["params"], rel=0.002)
        rows = [json.loads(line) for line in (run / "logs" / f"{stage.name}.jsonl").read_text().splitlines()]
        steps = sum("loss" in row for row in rows)
        assert stage.steps == steps and stage.pairs == steps * 32
    (teacher,) = found.teachers
    assert teacher.params == read_header(run / "teacher")["counts"]["params"] == found.stages[0].params
    assert [stage.steps for stage in teacher.stages] == [30]


def test_files_have_the_sizes_that_were_foretold(found, tiny_run):
    run = tiny_run[0]
    artifacts = sum(path.stat().st_size for name in found.artifacts for path in (run / name).rglob("*.safetensors"))
    assert found.disk.artifacts == pytest.approx(artifacts, rel=0.02)
    exports = sum(path.stat().st_size for path in (run / "export").rglob("*.onnx*"))
    assert found.disk.exports == pytest.approx(exports, rel=0.1)


def test_checkpoints_have_the_sizes_that_were_foretold(found, recipe, tmp_path, monkeypatch):
    recipe["runtime"] = {"checkpoint_every": 2}
    sizes, save = {}, Loop.save

    def weighed(self, step, log):
        save(self, step, log)
        sizes.setdefault(self.context.title, []).extend(f.stat().st_size for f in self.context.checkpoints.glob("*.pt"))

    monkeypatch.setattr(Loop, "save", weighed)
    assert clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run").exit_code == 0
    for stage in found.stages:
        if stage.steps > 2:
            assert stage.needs.checkpoint == pytest.approx(max(sizes[stage.name]), rel=0.1), stage.name
    assert found.disk.checkpoints == 3 * max(stage.needs.checkpoint for stage in found.stages)


def test_a_teacher_is_known_by_its_header_alone(recipe, tiny_run, tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    shutil.copy(tiny_run[0] / "pruned" / "clipress.json", folder)
    recipe |= {"teacher": {"artifact": str(folder)}, "stages": [{"distill": {"losses": ["feature"], "steps": 4}}]}
    foretold = forecast(Recipe.model_validate(recipe))
    assert foretold.teachers[0].params == read_header(folder)["counts"]["params"] == foretold.stages[0].params


@pytest.mark.parametrize(
    "student",
    [
        {"model": "ViT-B-32", "image_size": 32},
        {"image": "vit-2x64-p8", "text": "teacher"},
        {"inherit": {"image": {"layers": 1, "ffn": 32}}},
        {"image": {"timm": "resnet18", "pretrained": True}, "text": "2x64"},
    ],
)
def test_students_have_their_parameters_before_they_are_built(recipe, student):
    from clipress.compress.pipeline import load_teacher
    from clipress.models.load import TeacherSpec
    from clipress.models.students import student_from, without_weights

    recipe |= {"student": student, "stages": [{"distill": {"losses": ["feature"], "steps": 4, "batch_size": 8}}]}
    foretold = forecast(Recipe.model_validate(recipe)).stages[0]
    teacher = load_teacher(TeacherSpec.model_validate(recipe["teacher"]), "clip", lambda line: None).model
    built = student_from(without_weights(student), teacher, 0).module
    assert foretold.params == sum(p.numel() for p in built.parameters()) and foretold.needs is not None
    frozen = "text" in student and student["text"] == "teacher"
    assert (foretold.needs.trained < foretold.params) == frozen


def test_embeddings_on_disk_have_the_size_that_was_foretold(recipe, tmp_path):
    recipe["teacher"]["cache"] = {"views": 2}
    (teacher,) = forecast(Recipe.model_validate(recipe)).teachers
    assert clipress("embed", write_recipe(recipe, tmp_path), "--out", tmp_path / "caches").exit_code == 0
    written = sum(path.stat().st_size for path in (tmp_path / "caches").rglob("*.npy"))
    assert written < teacher.cache_bytes + 10_000  # equal captions are stored once
    assert teacher.cache_bytes < 2 * written


def test_a_step_that_no_machine_could_take_is_counted_all_the_same(recipe):
    """No values, no memory: this one would take more than a hundred gigabytes."""
    recipe["student"] = {"model": "ViT-B-32", "image_size": 224}
    recipe["teacher"] = {"model": "ViT-B-32", "checkpoint": "random"}
    recipe["data"]["augment"] = {"crop_scale": [0.5, 1.0]}
    recipe["stages"] = [{"distill": {"losses": ["contrastive"], "steps": 4, "batch_size": 4096}}]
    before = torch.get_rng_state()
    needs = forecast(Recipe.model_validate(recipe)).stages[0].needs
    assert needs.peak > 100e9 and needs.trained == 151_277_313
    assert torch.equal(torch.get_rng_state(), before)


LOSSES = {
    "clip": ["contrastive"],
    "classification": ["classification", "logits"],
    "segmentation": ["segmentation", "logits"],
    "retrieval": ["contrastive", "matching"],
    "nlvr": ["classification", "logits"],
    "caption": ["lm", "logits"],
    "vqa": ["lm", "logits"],
}


def test_every_task_has_losses_here():
    assert LOSSES.keys() == TASKS.keys()


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_counted_with_the_batch_that_it_then_gets(task):
    data, distill = {"train": [{"format": DATA[task], "limit": 24}]}, {"losses": [*LOSSES[task], "tokens"], **SHORT}
    first = {"distill": {"losses": LOSSES[task][:1], **SHORT}}
    teacher = {"name": "dense", "task": task, "student": STUDENTS[task], "data": data, "stages": [first]}
    prune = {"losses": LOSSES[task], "budget": {"params": 0.7}, "align": {"head_dim": 4, "ffn": 16}, **SHORT}
    quantize = {"losses": LOSSES[task], "calibrate": 8, **SHORT}
    stages = [{"prune": prune}, {"distill": distill}, {"quantize": quantize}]
    recipe = {"name": "small", "task": task, "teacher": {"recipe": teacher}, "data": data, "stages": stages}
    found = forecast(Recipe.model_validate(recipe))
    counted = [*found.teachers[0].stages, *found.stages]
    assert [stage.notes for stage in counted] == [()] * 4
    assert all(stage.needs.activations > 0 and stage.needs.batch > 0 for stage in counted)
    student = task_named(task).student_from(STUDENTS[task], None, 0)
    context = Context(start_fabric(Runtime(accelerator="cpu")), DataSpec.model_validate(data), 0, title="t")
    arrays = next(iter(batches(student, Training(**SHORT), context, 1, whole_texts=True)))
    assert found.stages[1].needs.batch == sum(rows.nbytes for rows in arrays.values() if isinstance(rows, torch.Tensor))


def test_pixels_for_a_teacher_of_another_image_size_are_counted(recipe):
    recipe["data"]["augment"] = {}
    recipe["student"] = tiny_architecture(layers=1)
    recipe["teacher"]["recipe"]["student"] = tiny_architecture(layers=1, image_size=64)
    recipe["stages"] = [{"distill": {"losses": losses, **SHORT}} for losses in (["contrastive"], ["feature"])]
    large, (alone, both) = 32 * 3 * 64**2 * 4, forecast(Recipe.model_validate(recipe)).stages
    assert alone.needs.batch == both.needs.batch > large + large // 4
    recipe["teacher"]["recipe"]["student"] = tiny_architecture(layers=1)
    assert forecast(Recipe.model_validate(recipe)).stages[0].needs.batch == both.needs.batch - large


def test_the_command_prints_a_table_or_json(recipe, tmp_path):
    path = write_recipe(recipe, tmp_path)
    table, plain = clipress("plan", path), clipress("plan", path, "--json", "--processes", 2)
    assert table.exit_code == plain.exit_code == 0, table.output + plain.output
    assert all(name in table.output for name in (*RUN, "activations", "Disk: ", "Export: ", "Measure: ", "Serve: int8"))
    assert max(map(len, table.output.splitlines())) <= 140 and not [*tmp_path.glob("runs*")]
    read = json.loads(plain.stdout)
    assert read["processes"] == 2 and read["stages"][0]["needs"]["peak"] > 0 and read["disk"]["total"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [{"distil": {"steps": 4}}]}, "unknown stage 'distil'"),
        (
            {"stages": [{"distill": {"losses": ["feature"], "steps": 4, "batch_size": 9}}]},
            "multiple of the 2 processes",
        ),
        ({"teacher": {"artifact": "nowhere"}}, "nowhere is not an artifact"),
        ({"data": {"train": [{"format": "csv", "annotations": "nowhere.csv"}]}}, "no such file"),
    ],
)
def test_a_mistake_is_one_message(recipe, tmp_path, change, message):
    result = clipress("plan", write_recipe(recipe | change, tmp_path), "--processes", 2)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
