"""Fuzz `targets.recipe`: python tests/fuzz/recipe.py NEW_INPUTS tests/fuzz/corpus/recipe -max_total_time=600 -timeout=120."""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["clipress"]):
    from fuzz import harness, targets

    import clipress.cli
    import clipress.data.pairs
    import clipress.models.importers  # noqa: F401

harness.fuzz(targets.recipe)
