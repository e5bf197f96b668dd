"""Every BLIP goes through every stage to an export, a table and a Triton repository, and says something about images."""

import json

import pytest
from helpers import clipress
from PIL import Image
from small_run import STAGES, recipe_of, run_of
from task_students import DATA, STUDENTS

from clipress.artifact import read_header
from clipress.bench.results import read_results
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.runtime.export_folder import read_export
from clipress.tasks import task_named

LOSSES = {
    "retrieval": ("contrastive", "matching", "affinity", "feature", "tokens"),
    "nlvr": ("classification", "logits", "tokens"),
    "caption": ("lm", "logits", "tokens"),
    "vqa": ("lm", "logits", "tokens"),
}
ASKED = {
    "retrieval": ["--text", "a red circle", "--text", "a square"],
    "nlvr": ["--statement", "both images show a black background"],
    "caption": [],
    "vqa": ["--question", "what color is the background ?", "--labels", "black,grey,white"],
}
SAID = {"retrieval": "a red circle: ", "nlvr": "likely to be true", "caption": "b.png: ", "vqa": "b.png: "}


@pytest.fixture(scope="module", params=LOSSES)
def run(request, tmp_path_factory):
    task = request.param
    student = {**STUDENTS[task], "vocabulary": {"format": DATA[task]}}
    recipe = recipe_of(task, DATA[task], student, 8, LOSSES[task])
    folder, result = run_of(recipe, tmp_path_factory.mktemp(task))
    return task, folder, result.output


def test_it_is_cut_exported_measured_and_served(run):
    task, folder, output = run
    dense, pruned = (read_header(folder / stage) for stage in ("teacher", "pruned"))
    assert 0.4 <= pruned["counts"]["block_params"] / dense["counts"]["block_params"] <= 0.5
    rows = read_results(folder / "bench" / "results.json").rows
    assert [row.stage for row in rows] == STAGES and {row.task for row in rows} == {task}
    for row in rows:
        assert any(metric.endswith(task_named(task).figures) for metric in row.accuracy)
        assert row.accuracy_se.keys() == row.accuracy.keys()
        assert {timing.case.graph for timing in row.latency} == read_export(folder / "export" / row.stage).graphs.keys()
    assert any((folder / "triton").rglob("config.pbtxt"))
    assert "Try it: clipress predict" in output


def test_what_the_run_suggests_to_try_works(run, tmp_path):
    task, folder, output = run
    source = open_source(SourceSpec(format="scenes", split="test", limit=2))
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, path in enumerate(paths):
        Image.fromarray(source.image(number)).save(path)
    found = clipress("predict", folder, *paths, *ASKED[task])
    assert found.exit_code == 0 and SAID[task] in found.output, found.output
    records = clipress("predict", folder, *paths, *ASKED[task], "--json")
    lines = [json.loads(line) for line in records.output.splitlines() if line.startswith("{")]
    assert len(lines) == (1 if task == "nlvr" else 2)
    (suggested,) = (line for line in output.splitlines() if line.startswith("Try it: "))
    assert (ASKED[task][0] if ASKED[task] else "IMAGE") in suggested


def test_it_is_evaluated_again_as_it_was_measured(run, tmp_path):
    task, folder, _ = run
    found = clipress("eval", folder, "--stage", "recovered", "--json", tmp_path / "metrics.json")
    assert found.exit_code == 0, found.output
    written = json.dumps(json.loads((tmp_path / "metrics.json").read_text()))
    assert task_named(task).figures[-1].strip("/") in written
