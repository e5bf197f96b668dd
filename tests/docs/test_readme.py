"""What the README tells people to type works, and what it links to is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import clipress

ROOT = Path(clipress.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def commands_on_path(tmp_path, monkeypatch):
    """Let `clipress` in a shell mean this very package, wherever it is installed."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "clipress"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m clipress "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")


def test_every_command_block_runs(tmp_path, tiny_run, commands_on_path):
    shutil.copytree(tiny_run[0], tmp_path / "runs" / "demo")  # the commands change it
    shell = blocks("bash")
    assert shell
    for block in shell:
        done = subprocess.run(["bash", "-e", "-c", block], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "digits-000.png: " in done.stdout
    assert (tmp_path / "images" / "digits-002.png").is_file()


def test_the_python_block_runs(tmp_path, tiny_run):
    """The recipe's name stands for the tiny run's, so that its stages are finished; everything else is as shown."""
    run = shutil.copytree(tiny_run[0], tmp_path / "runs" / "demo")
    (block,) = blocks("python")
    code = block.replace('"demo", out=', f"{str(run / 'recipe.yaml')!r}, out=")
    assert code != block
    shell = next(block for block in blocks("bash") if "clipress data images" in block)
    (command,) = [line.split() for line in shell.splitlines() if line.startswith("clipress data images")]
    for words in ([sys.executable, "-m", *command], [sys.executable, "-c", code]):
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    artifacts, similarities, *_, probabilities = done.stdout.splitlines()
    assert artifacts.startswith("('teacher', 'pruned', 'recovered', 'sparse', 'int8')")
    assert similarities.startswith("[[") and len(probabilities.strip("[]").split()) == 3


def test_the_two_commands_are_targets_that_call_what_they_promise():
    promised = {"demo": "clipress run configs/demo.yaml --out runs/demo", "test": "python -m pytest"}
    first_screen = README[: README.index("\n## ")]
    for target, command in promised.items():
        assert f"make {target} " in first_screen
        shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert command in shown and "pip install" in shown + "pip install" * (ROOT / ".venv").exists()
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_recipes_in_the_readme_are_valid_and_the_demos_lines_are_the_demos():
    from clipress.compress.stage import stages_from
    from clipress.models.students import check
    from clipress.recipe import Recipe, checked
    from clipress.workflow.plan import plan_from

    students, recipes = [], []
    for block in blocks("yaml"):
        if block.startswith("student:"):  # one alternative per line
            students += [yaml.safe_load(line)["student"] for line in block.splitlines()]
        else:
            recipes.append(yaml.safe_load(block))
    assert len(recipes) == 2 and len(students) == 4
    for recipe in recipes:
        if "name" in recipe:
            plan_from(checked(Recipe, recipe, ""))
    for student in students:
        check(student, has_teacher=True)
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    named = next(recipe for recipe in recipes if "name" not in recipe)
    for short, whole in zip(stages_from(named["stages"]), stages_from(demo["stages"]), strict=True):
        assert short.kind == whole.kind
        assert short.settings == whole.settings


def test_every_link_leads_somewhere():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
