"""Fixtures that tests of layouts share."""

import pytest
from oracles import run_oracle


@pytest.fixture(scope="session")
def others(tmp_path_factory):
    """Layouts of CLIPs with other tokenizers than CLIP's."""
    return run_oracle("layouts_oracle.py", tmp_path_factory.mktemp("others"))
