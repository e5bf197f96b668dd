"""Every row of the "To add" table in ARCHITECTURE.md works, with one file of another distribution per row."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import HELD_OUT, SOURCES

import clipress
from clipress.models.tiny import tiny_architecture

ROOT = Path(clipress.__file__).parent
# One file per row of the table. Each one leaves a trace that the tests below look for.
ADDED = {
    "a loss": """
        from clipress.compress.losses import LOSSES, Loss

        @LOSSES.register("length")
        class Length(Loss):
            def forward(self, batch):
                return batch.student.raw_image.square().mean()
    """,
    "a criterion": """
        import torch
        from clipress.compress.prune.criterion import CRITERIA, Criterion

        @CRITERIA.register("first")
        class First(Criterion):
            uses_gradients = False

            def score(self, site, generator):
                return -torch.arange(site.groups * site.units, dtype=torch.float64).reshape(site.groups, site.units)
    """,
    "a named student": """
        from clipress.models.named_towers import IMAGE_TOWERS

        IMAGE_TOWERS.register("thumb")({"width": 32, "layers": 1, "head_width": 16, "patch_size": 8})
    """,
    "a stage": """
        from clipress.compress.stage import stage
        from clipress.recipe import Section

        class Nothing(Section):
            word: str = "none"

        @stage("nothing", Nothing, makes="untouched")
        def run(settings, model, context):
            return model, {"word": settings.word}
    """,
    "a data format": """
        from clipress.data.formats.embedded import read_digits
        from clipress.data.sources import FORMATS

        @FORMATS.register("figures")
        def read(spec):
            return read_digits(spec)
    """,
    "a checkpoint format": """
        from clipress.models.importers.base import IMPORTERS, Importer
        from clipress.models.load import new_model
        from clipress.models.tiny import tiny_architecture

        @IMPORTERS.register("marked")
        class Marked(Importer):
            priority = -1

            def recognises(self, state):
                return "mark" in state

            def model_from_state(self, state, model_name):
                return new_model(tiny_architecture(layers=1), 0)
    """,
    "a runner": """
        from clipress.bench.runners import RUNNERS
        from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner

        @RUNNERS.register("again")
        class Again(OnnxRuntimeRunner):
            backend = "again"
    """,
    "an export target": """
        from clipress.export.targets import target
        from clipress.recipe import Section

        class Listed(Section):
            title: str

        @target("listed", Listed)
        def write(job, settings):
            (job.home / "list.txt").write_text(settings.title + ": " + " ".join(job.exports))
    """,
    "a task": """
        from clipress.tasks import TASKS
        from clipress.tasks.clip import Clip

        @TASKS.register("matching")
        class Matching(Clip):
            name = "matching"
    """,
}
FLOW = """
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import clipress
from clipress.cli import main

run = clipress.run(sys.argv[1], out=sys.argv[2])
save_file({"mark": torch.zeros(1)}, "marked.safetensors")
main(["import", "marked.safetensors", "imported"], standalone_mode=False)
"""


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """Run a recipe that uses every addition; return its working folder."""
    home = tmp_path_factory.mktemp("adding")
    about = home / "site" / "additions-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: additions\nVersion: 1.0\n")
    points = []
    for what, code in ADDED.items():
        name = "added_" + what.split(" ", 1)[1].replace(" ", "_")
        lines = [line[8:] for line in code.splitlines()]
        (home / "site" / f"{name}.py").write_text("\n".join(lines).strip() + "\n")
        points.append(f"{name} = {name}")
    (about / "entry_points.txt").write_text("[clipress.plugins]\n" + "\n".join(points) + "\n")
    architecture = tiny_architecture()
    recipe = {
        "name": "added",
        "task": "matching",
        "student": {
            "image": "thumb",
            "text": architecture["text_cfg"],
            "embed_dim": 32,
            "image_size": 32,
        },
        "data": {
            "train": [{**SOURCES[1], "format": "figures"}],
            "test": [{**HELD_OUT[1], "format": "figures"}],
        },
        "stages": [
            {"distill": {"losses": ["length"], "steps": 1, "batch_size": 8}},
            {
                "prune": {
                    "criterion": "first",
                    "budget": {"params": 0.8},
                    "align": {"head_dim": 4, "ffn": 16},
                    "steps": 2,
                    "batch_size": 8,
                }
            },
            {"nothing": {"word": "seen"}},
        ],
        "export": {"onnx": {"exporter": "torchscript"}, "listed": {"title": "made"}},
        "bench": {"backends": ["again"], "batch": [1], "warm_up": 0, "duration": 1, "iterations": 1},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(home / "site"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", FLOW, "recipe.yaml", "run"], cwd=home, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return home


def header(folder):
    return json.loads((folder / "clipress.json").read_text())


def test_every_row_of_the_table_is_tested():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## To add")[2]
    rows = re.findall(r"^\| (an? [^|]+?) \|", text, re.M)
    assert {*rows} - {"a backbone"} == ADDED.keys()  # A backbone is added in anatomy.py.


def test_an_added_loss_is_used_in_a_step(flow):
    (line,) = (flow / "run" / "logs" / "distilled.jsonl").read_text().splitlines()
    assert json.loads(line)["length"] > 0


def test_an_added_criterion_decides_what_is_pruned(flow):
    shapes = header(flow / "run" / "pruned")["shapes"]
    assert {shape["ffn"] for shape in shapes.values()} != {
        shape["ffn"] for shape in header(flow / "run" / "distilled")["shapes"].values()
    }
    assert header(flow / "run" / "pruned")["lineage"][-1]["settings"]["criterion"] == "first"


def test_an_added_student_is_built(flow):
    assert header(flow / "run" / "distilled")["architecture"]["vision_cfg"]["width"] == 32


def test_an_added_stage_writes_an_artifact_with_its_details(flow):
    assert header(flow / "run" / "untouched")["lineage"][-1]["details"] == {"word": "seen"}


def test_an_added_data_format_is_used_for_training_and_evaluation(flow):
    rows = json.loads((flow / "run" / "bench" / "results.json").read_text())["rows"]
    assert all("figures/top1" in row["accuracy"] for row in rows)


def test_an_added_runner_is_benchmarked(flow):
    rows = json.loads((flow / "run" / "bench" / "results.json").read_text())["rows"]
    assert {row["backend"] for row in rows} == {"again"} and all(row["latency"] for row in rows)


def test_an_added_export_target_is_written_for_every_artifact(flow):
    assert (flow / "run" / "export" / "list.txt").read_text() == "made: distilled pruned untouched"


def test_an_added_task_is_recorded_in_the_artifact_and_the_export(flow):
    assert header(flow / "run" / "pruned")["task"] == "matching"
    assert json.loads((flow / "run" / "export" / "pruned" / "export.json").read_text())["task"] == "matching"


def test_an_added_checkpoint_format_is_detected(flow):
    assert header(flow / "imported")["lineage"][0]["format"] == "marked"
