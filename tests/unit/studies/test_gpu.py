"""The GPU kit is rehearsed on tiny shapes, so that the minutes of a GPU are not spent on typos."""

import json

import pytest

from clipress.studies import gpu


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    gpu.main(["--tiny", "--out", str(out)])
    return out


def test_every_row_of_a_rehearsal_is_measured(rehearsal):
    rows = json.loads((rehearsal / "gpu.json").read_text())["rows"]
    assert not [key for key, row in rows.items() if "failed" in row], rows
    kinds = {key.split(" | ")[0] for key in rows}
    assert kinds == {"chip", "speed", "training"}
    assert {key.split(" | ")[2] for key in rows if key.startswith("speed")} == {"dense", "dense, 2:4", "50 %"}
    assert all(row["ms_per_step"] > 0 for key, row in rows.items() if key.startswith("training"))
    table = (rehearsal / "gpu.md").read_text()
    assert "| tiny | dense, 2:4 | 2 | eager |" in table and "| search, teacher online |" in table


def test_what_is_measured_already_is_not_measured_again(rehearsal, monkeypatch):
    before = (rehearsal / "gpu.json").read_text()
    for measure in ("training_row", "speed_row", "chip"):
        monkeypatch.setattr(gpu, measure, lambda *_: pytest.fail("measured again"))
    gpu.main(["--tiny", "--out", str(rehearsal)])
    assert (rehearsal / "gpu.json").read_text() == before


def test_rows_of_another_device_are_not_continued(rehearsal, monkeypatch, capsys):
    before, about = (rehearsal / "gpu.json").read_text(), gpu.conditions()
    monkeypatch.setattr(gpu, "conditions", lambda: {**about, "device": "another"})
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--tiny", "--out", str(rehearsal)])
    assert stopped.value.code == 2 and "device another, found cpu" in capsys.readouterr().err
    assert (rehearsal / "gpu.json").read_text() == before


def test_a_row_that_fails_holds_its_reason_and_the_others_go_on(tmp_path):
    rows = gpu.Rows(tmp_path / "gpu.json", gpu.conditions())

    def fails():
        raise RuntimeError("out of memory")

    rows.add("speed | a | dense | 1 | eager", fails)
    rows.add("speed | a | dense | 2 | eager", lambda: {"macs": 1, "median_ms": 2.0, "items_per_s": 1000.0})
    table = (tmp_path / "gpu.md").read_text().replace("  ", " ")
    assert "| a | dense | 1 | eager | RuntimeError: out of memory | | |" in table
    assert "| a | dense | 2 | eager | 2.00 | 1000 | |" in table


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2 and "--tiny" in capsys.readouterr().err
