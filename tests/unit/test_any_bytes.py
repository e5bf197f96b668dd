"""The fuzz targets on their corpus and on arbitrary bytes: readers return or raise a ClipressError."""

from pathlib import Path

import pytest
from fuzz import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = sorted(path for path in (Path(targets.__file__).parent / "corpus").glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_corpus_inputs_raise_nothing_but_clipress_errors(path):
    getattr(targets, path.parent.name)(path.read_bytes())


def test_every_target_has_a_corpus():
    assert {path.parent.name for path in CORPUS} == {target.__name__ for target in targets.KINDS}


@pytest.mark.parametrize("target", targets.KINDS, ids=lambda target: target.__name__)
def test_arbitrary_bytes_raise_nothing_but_clipress_errors(target):
    @given(st.integers(0, targets.KINDS[target] - 1), st.binary(max_size=60))
    @settings(deadline=None, max_examples=40, database=None, suppress_health_check=list(HealthCheck))
    def run_target(kind, data):
        target(bytes([kind]) + data)

    run_target()
