"""Architecture rules: allowed imports, sizes of files and functions, light imports, valid shipped recipes."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import clipress

ROOT = Path(clipress.__file__).parent
FOUNDATION = {"errors", "recipe", "storage"}
# The imports of each top-level package. An allowed import that nothing uses is an error too.
ARROWS = {
    "clipress": {"serve", "version", "workflow"},
    "__main__": {"cli"},
    "cli": {"errors", "storage", "version"},  # It imports commands by name.
    "commands": FOUNDATION | {"artifact", "clipress", "studies", "workflow"},
    "workflow": FOUNDATION
    | {"artifact", "bench", "compress", "data", "export", "metrics", "models", "progress", "runtime", "serve", "tasks"}
    | {"version"},
    "studies": FOUNDATION
    | {"artifact", "bench", "compress", "data", "export", "metrics", "models", "progress", "runtime", "serve", "tasks"},
    "compress": FOUNDATION
    | {"artifact", "data", "metrics", "models", "progress", "registry", "runtime", "tasks", "version"},
    "export": FOUNDATION
    | {"artifact", "data", "memory", "metrics", "models", "progress", "registry", "runtime", "tasks", "version"},
    "bench": FOUNDATION
    | {"artifact", "data", "metrics", "models", "progress", "registry", "runtime", "tasks", "version"},
    "serve": FOUNDATION | {"data", "metrics", "progress", "runtime", "version"},
    "tasks": {"artifact", "data", "errors", "metrics", "models", "recipe", "registry", "runtime"},
    "models": FOUNDATION | {"artifact", "data", "registry", "version"},
    "runtime": FOUNDATION | {"data"},
    "metrics": {"data", "errors", "storage"},
    "data": FOUNDATION | {"registry"},
    "artifact": FOUNDATION,
    "recipe": {"errors", "recipe_v1", "storage"},
    "recipe_v1": set(),
    "registry": {"errors"},
    "storage": {"errors"},
    "memory": set(),
    "progress": set(),
    "errors": set(),
    "version": set(),
}
MAX_LINES, MAX_FUNCTION, MAX_LITERALS = 400, 60, 60


@cache
def modules():
    """Return {full name: source} of every module of the package."""
    tracked = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"], cwd=ROOT, text=True
    )
    found = {}
    for name in tracked.split():
        parts = Path(name).with_suffix("").parts
        if parts[0] not in ("tests", ".ci") and (ROOT / name).is_file():
            full = ".".join(("clipress", *(parts[:-1] if parts[-1] == "__init__" else parts)))
            found[full] = (ROOT / name).read_text(encoding="utf-8")
    return found


def imports(source):
    """Yield every clipress name that a file imports, inside functions too, such as `clipress.data.spec.DataSpec`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "clipress":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "clipress")


def room_of(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (parts[1] in ARROWS) else "clipress"


def test_imports_go_one_way_and_every_allowed_import_is_used():
    found = {}
    for module, source in modules().items():
        found.setdefault(room_of(module), set()).update(room_of(name) for name in imports(source))
    assert {room: others - {room} for room, others in found.items()} == ARROWS


def test_there_are_no_circular_imports():
    sources, graph = modules(), {}
    for module, source in sources.items():
        targets = {name if name in sources else name.rpartition(".")[0] for name in imports(source)}
        graph[module] = targets - {module, "clipress"}  # The package imports its public names on first use.
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these files import one another in a circle: {sorted(graph)}"


def test_no_private_name_is_imported():
    tests = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    private = re.compile(r"\._(?!_)")
    for module, source in {**modules(), **tests}.items():
        taken = [name for name in imports(source) if private.search(name)]
        assert not taken, f"{module} imports {taken}"


def test_files_and_functions_stay_within_their_limits():
    for module, source in modules().items():
        assert len(source.splitlines()) <= MAX_LINES, module
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{module}.{node.name}"


def test_image_and_text_literals_stay_in_the_clip_task():
    where = {
        module: len(re.findall(r"""(?m)^.*["'](?:image|text)["'].*$""", source))
        for module, source in modules().items()
        if room_of(module) not in ("models", "data") and module != "clipress.tasks.clip"
    }
    assert sum(where.values()) <= MAX_LITERALS, {module: count for module, count in where.items() if count}


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["run", "--help"], ["embed", "--help"], ["predict", "--help"]]
)
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys; from clipress.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'open_clip', 'modelopt', 'numpy', 'sklearn', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)


def test_every_shipped_recipe_is_valid():
    from clipress.recipe import read_recipe
    from clipress.workflow.plan import plan_from

    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert recipes
    for path in recipes:
        plan_from(read_recipe(path))


def test_the_demo_prunes_to_at_most_forty_percent():
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    budgets = [stage["prune"]["budget"]["params"] for stage in demo["stages"] if "prune" in stage]
    assert budgets and max(budgets) <= 0.4
