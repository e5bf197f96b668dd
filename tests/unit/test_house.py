"""The house rules: which room may know which, what an import costs, what is shipped is valid."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import clipress

ROOT = Path(clipress.__file__).parent
BASE = {"artifact", "recipe", "storage", "errors", "progress", "registry"}
MAY_IMPORT = {
    "errors": set(),
    "progress": set(),
    "recipe": {"errors"},
    "registry": {"errors"},
    "storage": {"errors"},
    "artifact": {"errors", "recipe", "storage"},
    "metrics": BASE | {"data"},
    "data": BASE | {"data", "metrics"},
    "runtime": BASE | {"data", "runtime"},
    "models": BASE | {"data", "metrics", "models"},
    "tasks": BASE | {"data", "metrics", "models", "runtime", "tasks"},
    **{
        room: BASE | {"data", "metrics", "models", "runtime", "tasks", room}
        for room in ("compress", "export", "bench", "serve")
    },
}
MAY_IMPORT["metrics"] |= {"metrics"}
MAY_IMPORT["workflow"] = set(MAY_IMPORT) | {"workflow"}
MAY_IMPORT["commands"] = {"artifact", "commands", "errors", "recipe", "storage", "studies", "workflow"}
MAY_IMPORT["cli"] = {"errors", "storage"}  # commands are imported by name


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[0] in MAY_IMPORT or parts[0].removesuffix(".py") in MAY_IMPORT:
            yield path, parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
        for name in names:
            if name.startswith("clipress."):
                yield name.split(".")[1]


def test_imports_go_one_way():
    checked = 0
    for path, room in modules():
        for other in imported(path):
            checked += 1
            assert other in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports clipress.{other}"
    assert checked > 50


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["run", "--help"], ["embed", "--help"], ["predict", "--help"]]
)
def test_help_is_given_without_loading_anything_heavy(command):
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
    assert len(recipes) >= 2
    for path in recipes:
        plan_from(read_recipe(path))


def test_the_demo_prunes_to_forty_percent_or_less():
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    budgets = [stage["prune"]["budget"]["params"] for stage in demo["stages"] if "prune" in stage]
    assert budgets and max(budgets) <= 0.4
