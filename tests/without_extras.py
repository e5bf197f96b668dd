"""Run a command, or a file of Python, in a process that cannot import what the named extras bring:

python tests/without_extras.py compress,serve clipress predict RUN IMAGES
python tests/without_extras.py compress python FILE
"""

import runpy
import sys

from clipress.cli import main
from clipress.errors import EXTRAS


class Missing:
    """An import finder in front of all others to which some modules are not installed."""

    def __init__(self, modules):
        self.modules = modules

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.modules:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


if __name__ == "__main__":
    extras, what, *words = sys.argv[1:]
    sys.meta_path.insert(0, Missing({module for extra in extras.split(",") for module in EXTRAS[extra]}))
    if what == "python":
        runpy.run_path(words[0], run_name="__main__")
    else:
        main(words)
