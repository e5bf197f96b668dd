"""Damaged images in a run's data: the others go on, and the damaged ones are counted where a user looks."""

import json
import shutil

import pytest
from helpers import clipress, write_recipe
from PIL import Image

from clipress.artifact import read_header
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec

TRAIN, TEST, TORN = range(24), range(24, 36), (3, 17, 30)


@pytest.fixture(scope="module")
def compressed(tiny_run, tmp_path_factory):
    """A run whose 24 training images and 12 test images have two damaged ones among them, and one."""
    folder = tmp_path_factory.mktemp("damaged")
    scenes = open_source(SourceSpec(format="scenes"))
    rows = []
    for number in (*TRAIN, *TEST):
        path = folder / f"{number}.png"
        Image.fromarray(scenes.image(number)).save(path)
        rows.append({"image": path.name, "caption": list(scenes.captions(number))})
        if number in TORN:
            path.write_bytes(path.read_bytes()[:200])
    sources = {}
    for name, numbers in {"train": TRAIN, "test": TEST, "good": [one for one in TEST if one not in TORN]}.items():
        (folder / f"{name}.json").write_text(json.dumps([rows[number] for number in numbers]))
        sources[name] = {"format": "karpathy", "annotations": str(folder / f"{name}.json"), "name": name}
    recipe = {
        "name": "damaged",
        "teacher": {"artifact": str(tiny_run[0] / "recovered")},
        "data": {"train": [sources["train"]], "val": [sources["test"]], "test": [sources["test"]]},
        "stages": [{"quantize": {"calibrate": 24, "batch_size": 8, "steps": 0}}],
        "export": {"onnx": {"exporter": "torchscript"}},
        "bench": {"batch": [1], "warm_up": 0, "duration": 1, "iterations": 3},
    }
    done = clipress("compress", write_recipe(recipe, folder), "--out", folder / "run")
    assert done.exit_code == 0, done.output
    recipe["data"]["test"] = [{**sources["good"], "name": "test"}]
    return folder / "run", recipe


def test_what_a_stage_could_not_read_is_in_its_artifact(compressed):
    header = read_header(compressed[0] / "int8")
    assert header["lineage"][-1]["details"]["bad_records"] == 2
    assert header["metrics"]["conditions"]["unread"] == {"test": 1}


def test_eval_leaves_a_damaged_image_out_names_it_and_ends_with_exit_code_2(compressed, tmp_path):
    run, without = compressed
    shutil.copytree(run, tmp_path / "run")
    done = clipress("eval", tmp_path / "run", "--stage", "int8", "--json", tmp_path / "with.json")
    assert done.exit_code == 2 and "Left out 1 unreadable record; the first: " in done.stderr
    assert "30.png" in done.stderr and "Traceback" not in done.output
    found = json.loads((tmp_path / "with.json").read_text())
    assert found["unread"] == {"test": 1}
    assert clipress("compress", write_recipe(without, tmp_path), "--out", tmp_path / "run").exit_code == 0
    clean = clipress("eval", tmp_path / "run", "--stage", "int8", "--json", tmp_path / "without.json")
    expected = json.loads((tmp_path / "without.json").read_text())
    assert clean.exit_code == 0 and expected["unread"] == {}
    assert found["metrics"] == expected["metrics"]


def test_bench_counts_damaged_images_in_its_results_and_in_one_line_of_the_report(compressed):
    run, _ = compressed
    done = clipress("bench", run)
    assert done.exit_code == 0, done.output
    line = "Records that could not be read: 1 in test (left out), 2 in int8 (replaced)."
    assert line in done.output and line in (run / "bench" / "report.html").read_text()
    results = json.loads((run / "bench" / "results.json").read_text())
    assert {key: results["conditions"]["data"]["test"][key] for key in ("items", "unread")} == {
        "items": 11,
        "unread": 1,
    }
    assert results["rows"][-1]["lineage"][-1]["details"]["bad_records"] == 2
