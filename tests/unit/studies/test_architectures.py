"""Every kind of architecture that open_clip lists goes through the whole of clipress; the committed table says which do."""

import json
import logging
import re

import open_clip
import pytest
import torch

from clipress.models import surgery
from clipress.models.load import build
from clipress.models.open_clip_config import config_named, embedding_weights
from clipress.studies import architectures
from clipress.studies.architectures import COLUMNS, DONE, is_done, markdown, row_of

NAMES = open_clip.list_models()  # before tests add small ones
# One of each kind, and what cannot be done with it.
KINDS = {
    "ViT-B-32": set(),
    "ViT-bigG-14-CLIPA": set(),
    "RN50": set(),
    "ViT-B-16-SigLIP2": set(),
    "MobileCLIP-S1": set(),
    "MobileCLIP-B": set(),
    "coca_ViT-B-32": set(),
    "coca_roberta-ViT-B-32": set(),
    "nllb-clip-base-siglip": set(),
    "mt5-base-ViT-B-32": set(),
    "EVA02-B-16": set(),
    "PE-Core-T-16-384": set(),
    "convnext_tiny": set(),
    "swin_base_patch4_window7_224": {"prune image"},
}


@pytest.mark.parametrize("name", KINDS)
def test_one_of_each_kind_goes_through_every_column(name, capfd):
    row = row_of(name, exporter="torchscript")
    failed = {column: row.get(column) for column in COLUMNS if not is_done(row.get(column))}
    assert failed.keys() == KINDS[name], failed
    assert not [cell for cell in failed.values() if re.match(r"\w+(Error|Exception)\b", cell)], failed


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_at_full_size_its_names_and_shapes_are_open_clips(name):
    config = config_named(name)
    with torch.device("meta"):
        ours = build(config)
        stock = surgery.stock_weights(ours)
        assert surgery.own_weights(ours, stock).keys() == ours.state_dict().keys()
        if "hf_config" in config["text_cfg"]:
            return  # open_clip fetches the encoder's config; tests/unit/models/test_hf_text.py counts its parameters.
        theirs = embedding_weights(open_clip.create_model(name, load_weights=False, device="meta").state_dict())
    assert {key: tensor.shape for key, tensor in stock.items()} == {key: tensor.shape for key, tensor in theirs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_does_what_the_table_says(name):
    row = row_of(name)
    assert {column: is_done(row.get(column)) for column in COLUMNS} == {
        column: is_done(committed()["rows"][name].get(column)) for column in COLUMNS
    }


def committed():
    return json.loads((architectures.HERE / "architectures.json").read_text(encoding="utf-8"))


def test_the_committed_table_has_every_architecture():
    found = committed()
    assert found["rows"].keys() == set(NAMES)
    assert (architectures.HERE / "architectures.md").read_text(encoding="utf-8") == markdown(found)
    for column in ("load", "import file", "import folder", "save", "export", "INT8"):
        assert not [name for name, row in found["rows"].items() if row.get(column) != DONE], column


def test_a_row_that_is_there_is_not_computed_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        architectures, "row_of", lambda name, narrow: calls.append(name) or {"load": "it has no weights."}
    )
    for _ in range(2):
        architectures.main(["--out", str(tmp_path), "--only", "ViT-B-32", "RN50"])
    assert calls == ["ViT-B-32", "RN50"]
    table = (tmp_path / "architectures.md").read_text()
    assert "| all | 2 | 0 |" in table and "| RN50 | [1] | [2] |" in table
    assert "1. it has no weights." in table and "2. not reached" in table


def test_log_lines_are_left_out_while_it_runs_and_no_longer(tmp_path, monkeypatch, caplog):
    def row_that_warns(name, narrow):
        logging.getLogger("timm").warning("a tower of another size")
        return {"load": DONE}

    monkeypatch.setattr(architectures, "row_of", row_that_warns)
    architectures.main(["--out", str(tmp_path), "--only", "RN50"])
    logging.getLogger("clipress").warning("of the next program")
    assert caplog.messages == ["of the next program"]
