"""Every kind of architecture that open_clip lists goes through the whole of clipress."""

import re

import pytest

from clipress.studies import architectures
from clipress.studies.architectures import COLUMNS, is_done, row_of

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
    "mt5-base-ViT-B-32": {"prune text"},
    "EVA02-B-16": {"prune image"},
    "PE-Core-T-16-384": {"prune image"},
    "convnext_tiny": {"prune image"},
}


@pytest.mark.parametrize("name", KINDS)
def test_one_of_each_kind_goes_through_every_column(name, capfd):
    row = row_of(name, exporter="torchscript")
    failed = {column: row.get(column) for column in COLUMNS if not is_done(row.get(column))}
    assert failed.keys() <= KINDS[name], failed
    assert not [cell for cell in failed.values() if re.match(r"\w+(Error|Exception)\b", cell)], failed


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
