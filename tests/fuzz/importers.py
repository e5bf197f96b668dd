"""Fuzz `targets.importers`: python tests/fuzz/importers.py NEW_INPUTS tests/fuzz/corpus/importers -max_total_time=600 -timeout=120."""

import importlib
import pkgutil
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["clipress"]):
    from fuzz import harness, targets

    import clipress

    for room in ("data", "data.formats", "models", "models.importers"):  # Late imports would not be instrumented.
        for module in pkgutil.iter_modules([str(Path(clipress.__file__).parent / room.replace(".", "/"))]):
            importlib.import_module(f"clipress.{room}.{module.name}")

harness.fuzz(targets.importers)
