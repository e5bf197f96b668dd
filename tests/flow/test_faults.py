"""Hostile and broken files are skipped and counted, or refused with one clear message."""

import csv
import json
import re

import pytest
from faults import FAULTS, encoded, png_of
from helpers import clipress, write_recipe

from clipress.artifact import read_header
from clipress.models.tiny import tiny_architecture
from clipress.studies.faults import HERE


def test_names_are_unique_and_the_committed_table_lists_existing_inputs_once():
    names = [fault.name for fault in FAULTS]
    assert sorted(set(names)) == sorted(names)
    rows = json.loads((HERE / "faults.json").read_text())["inputs"]
    tried = [row["input"] for row in rows]
    assert sorted(set(tried)) == sorted(tried) and set(tried) <= set(names)
    assert rows and all(row["passed"] for row in rows)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_input_has_the_expected_outcome(fault, tmp_path):
    (tmp_path / "home").mkdir()
    happened = fault.happened(tmp_path / "home")
    assert re.search(fault.expected, happened, re.DOTALL), happened


def test_a_run_on_data_with_five_percent_bad_records_finishes_with_the_right_counts(tmp_path):
    bad = {
        "cut.png": encoded("PNG", size=(64, 64))[:60],
        "note.jpg": b"not an image",
        "bomb.png": png_of(50_000, 50_000),
        "empty.png": b"",
    }
    names = [f"{n:02}.png" for n in range(95)] + [*bad, "gone.png"]
    for name in names[:95]:
        (tmp_path / name).write_bytes(encoded("PNG", size=(40, 36)))
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("title", "filepath"), *((f"an image\0 {n}", name) for n, name in enumerate(names))])
    source = {"format": "csv", "annotations": str(tmp_path / "table.csv"), "images": str(tmp_path), "separator": ","}
    recipe = {
        "name": "broken",
        "student": tiny_architecture(),
        "data": {"train": [source]},
        "stages": [{"distill": {"losses": ["contrastive"], "steps": 3, "batch_size": 33}}],  # One epoch has 99 items.
    }
    result = clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    log = [json.loads(line) for line in (tmp_path / "run" / "logs" / "distilled.jsonl").read_text().splitlines()]
    reported = [row["bad_record"] for row in log if "bad_record" in row]
    # gone.png, record 99, was skipped on opening.
    assert sorted(row["index"] for row in reported) == [95, 96, 97, 98]
    assert all(any(name in row["reason"] for name in bad) for row in reported)
    assert read_header(tmp_path / "run" / "distilled")["lineage"][-1]["details"]["bad_records"] == 4
