"""README.md and docs/: commands run, recipes are valid, names exist, links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from itertools import pairwise
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml
from helpers import clipress as invoke

import clipress
from clipress.cli import main

ROOT = Path(clipress.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BY_NAME = {path.stem: path.read_text(encoding="utf-8") for path in PAGES}
FENCE = re.compile(r"(?:^<!-- needs: (?P<needs>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
RUN = "runs/demo"


@dataclass(frozen=True)
class Block:
    """A fenced block; `needs` is what this machine lacks to run it."""

    page: str
    language: str
    text: str
    needs: str | None

    @property
    def lines(self):
        return [line for line in self.text.splitlines() if line and not line.startswith("#")]


BLOCKS = [
    Block(page, found["language"], found["text"], found["needs"])
    for page, text in BY_NAME.items()
    for found in FENCE.finditer(text)
]


def blocks(language, page=None, runnable=True):
    """Blocks of a language, in order; without `runnable` those that need what the machine lacks."""
    of_language = [one for one in BLOCKS if one.language == language and page in (None, one.page)]
    return [one for one in of_language if (one.needs is None) == runnable]


def recipes(page):
    """The whole recipes of a page."""
    found = [yaml.safe_load(one.text) for one in blocks("yaml", page) if "\nname: " in "\n" + one.text]
    return {recipe["name"]: recipe for recipe in found}


@pytest.fixture
def workplace(tmp_path, tiny_run, monkeypatch):
    """A folder with the tiny run as runs/demo, which commands may change."""
    shutil.copytree(tiny_run[0], tmp_path / RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_in_shell(text, **environment):
    """Run a block in a shell in which `clipress` means this very package; returns what it printed."""
    bin_folder = Path.cwd() / "bin"
    bin_folder.mkdir(exist_ok=True)
    script = bin_folder / "clipress"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m clipress "$@"\n')
    script.chmod(0o755)
    where = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", **environment}
    done = subprocess.run(["bash", "-e", "-c", text], env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def words_of_command(line):
    """The words after `clipress` in a line, or None if the line does not call it."""
    words = shlex.split(line, comments=True)
    return words[words.index("clipress") + 1 :] if "clipress" in words else None


def check_words(words, line):
    """Fail unless the command exists, with every option and enough arguments."""
    command, rest = main, list(words)
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest.pop(0)) if rest else None
        assert found is not None, f"{line}: no such command"
        command = found
    takes_value = {
        name: not one.is_flag for one in command.params if isinstance(one, click.Option) for name in names(one)
    }
    positional = 0
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            positional += 1
            continue
        option, _, value = word.partition("=")
        assert option in {*takes_value, "-h", "--help"}, f"{line}: no option {option}"
        if takes_value.get(option) and not value:
            assert rest, f"{line}: {option} has no value"
            rest.pop(0)
    return command, positional


def names(option):
    return [*option.opts, *option.secondary_opts]


# commands


@pytest.mark.parametrize("page", [page for page in BY_NAME if page != "adding" and blocks("bash", page)])
def test_command_blocks_run_in_order(page, workplace):
    """Lines that only call clipress run in this process, which imports torch once; others in a shell."""
    for block in blocks("bash", page):
        for line in block.lines:
            if not line.startswith("clipress "):
                run_in_shell(line)
                continue
            result = invoke(*shlex.split(line, comments=True)[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


def test_a_command_block_runs_in_a_shell(workplace):
    (block,) = [one for one in blocks("bash", "export") if "clipress predict" in one.text]
    assert "digits-000.png: " in run_in_shell(block.text)
    assert (workplace / "images" / "digits-002.png").is_file()


def test_commands_that_need_what_is_missing_exist_with_their_options():
    lines = [line for block in blocks("bash", runnable=False) for line in block.lines]
    checked = 0
    for line in lines:
        words = words_of_command(line)
        if words is None:
            assert line.split()[0] == "make", line
            continue
        command, positional = check_words(words, line)
        required = sum(one.required for one in command.params if isinstance(one, click.Argument))
        assert positional >= required, f"{line}: {command.name} takes {required} arguments"
        checked += 1
    assert checked >= 10


def test_commands_in_the_text_exist_with_their_options():
    found = {span for text in BY_NAME.values() for span in re.findall(r"`(clipress [a-z][^`]*)`", FENCE.sub("", text))}
    assert len(found) >= 10
    for span in found:
        check_words(words_of_command(span), span)


def test_every_command_is_documented():
    text = "\n".join(BY_NAME.values())
    commands = main.list_commands(click.Context(main))
    assert len(commands) > 10
    for name in commands:
        assert re.search(rf"\bclipress {name}\b", text), f"no page shows clipress {name}"


def test_blocks_without_a_language_hold_no_commands():
    for block in blocks("") + blocks("", runnable=False):
        assert not re.search(r"^(clipress [a-z]|pip |make |python )", block.text, re.M), block.text


def test_the_two_commands_are_targets_that_install_and_call_what_they_promise(tmp_path):
    promised = {"demo": "clipress run configs/demo.yaml --out runs/demo", "test": "python -m pytest"}
    first_screen = BY_NAME["README"][: BY_NAME["README"].index("\n## ")]
    for target, command in promised.items():
        assert f"make {target} " in first_screen
        dry_run = ["make", "-n", target, f"VENV={tmp_path / 'venv'}"]  # nothing is installed there yet
        shown = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        installs = [line for line in shown.splitlines() if "pip install" in line]
        assert command in shown and len(installs) > 0
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_pip_lines_name_extras_and_files_that_exist():
    lines = [line for text in BY_NAME.values() for line in re.findall(r"`(pip install [^`]+)`", text)]
    assert len(lines) > 0
    for line in lines:
        words = shlex.split(line)[2:]
        if "-c" in words:
            assert (ROOT / words.pop(words.index("-c") + 1)).is_file(), line
            words.remove("-c")
        for word in words:
            name, _, extra = word.rstrip("]").partition("[")
            assert name == "clipress", line
            assert not extra or extra in known_extras(), f"{line}: no extra '{extra}'"


def known_extras():
    try:
        found = [re.search(r"extra == [\"'](\w+)[\"']", one) for one in requires("clipress") or []]
    except PackageNotFoundError:
        found = []
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return {one[1] for one in found if one} | set(re.findall(r"^(\w+) =", section, re.M))


# Python


def test_python_blocks_run(workplace):
    """The recipe's name stands for the tiny run's, so that its stages are finished; everything else is as shown."""
    invoke("data", "images", "images", "--format", "digits", "--count", 3)
    (page,) = ["\n".join(block.text for block in blocks("python", "python"))]
    code = page.replace('"demo", out=', f"{str(workplace / RUN / 'recipe.yaml')!r}, out=")
    assert code != page
    lines = run_python(code)
    assert lines[0].startswith("('teacher', 'pruned', 'recovered', 'sparse', 'int8')")
    similarities, probabilities = lines[1:-2], lines[-2]
    assert similarities[0].startswith("[[") and len(probabilities.strip("[]").split()) == 3
    assert "int4" in lines[-1] and "clipress export" in lines[-1]
    (short,) = blocks("python", "README")
    assert run_python(short.text) == [probabilities]


def test_the_service_classifies_and_reports_what_is_wrong(workplace):
    """The page's service, called by FastAPI's own client; its answers are those of the loaded model."""
    invoke("data", "images", "images", "--format", "scenes", "--count", 1)
    (service,) = blocks("python", "serve")
    calls = """
from pathlib import Path
from fastapi.testclient import TestClient
client, image = TestClient(app), Path("images/scenes-000.png").read_bytes()
assert len(client.get("/health").json()["lineage"]) == 16
answer = client.post("/classify", params={"labels": "cat,dog"}, content=image).json()
assert list(answer.values()) == model.classify(image, ["cat", "dog"]).tolist() and list(answer) == ["cat", "dog"]
for labels, content in (("cat,dog", b"no image"), ("cat,cat", image)):
    refused = client.post("/classify", params={"labels": labels}, content=content)
    assert refused.status_code == 422 and refused.json()["detail"]
print("done")
"""
    assert run_python(service.text + calls) == ["done"]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_methods_of_the_page_on_adding_are_found_and_work(workplace):
    """Its modules become an installed package, and its recipe runs with all of them."""
    site = workplace / "site"
    about = site / "my_clipress-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-clipress\nVersion: 1.0\n")
    (project,) = blocks("toml", "adding")
    group, (entry,) = re.search(r'entry-points\."(.+)"', project.text)[1], project.lines[1:]
    (about / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    for block in blocks("python", "adding"):
        module = site / block.text.splitlines()[0].removeprefix("# ")
        module.parent.mkdir(exist_ok=True)
        module.write_text(block.text)
    for name, recipe in recipes("adding").items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    path = {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", str(ROOT.parent))])}
    printed = "".join(run_in_shell(block.text, **path) for block in blocks("bash", "adding"))
    assert "onnxruntime-all-cores" in printed
    assert Path("runs/extended/export/list.txt").read_text().splitlines() == [
        "Models",
        "teacher",
        "distilled",
        "pruned",
        "rounded",
    ]
    code = (
        "from clipress.models.importers import IMPORTERS; from clipress.tasks import TASKS\n"
        "assert IMPORTERS['prefixed']().recognises({'clip.visual.conv1.weight': 0}) and TASKS['retrieval']().towers"
    )
    run_in_shell(f'"{sys.executable}" -c "{code}"', **path)


# recipes and names


def top_level_chunks(text):
    """The sections of a block; a section that is repeated shows alternatives."""
    return [yaml.safe_load(chunk) for chunk in re.split(r"^(?=[a-z])", text, flags=re.M) if chunk.strip()]


@pytest.mark.parametrize("page", [page for page in BY_NAME if page != "adding" and blocks("yaml", page)])
def test_recipes_are_valid(page):
    from clipress.compress.stage import STAGES
    from clipress.recipe import Recipe, checked
    from clipress.workflow.plan import plan_from

    least = {"name": "page", "teacher": {"artifact": "somewhere"}, "data": {"train": [{"format": "scenes"}]}}
    whole = recipes(page).values()
    for recipe in whole:
        plan_from(checked(Recipe, recipe, ""))
    parts = [one.text for one in blocks("yaml", page) if "\nname: " not in "\n" + one.text]
    in_text = re.findall(r"`([a-z]+: \{[^`]+\})`", FENCE.sub("", BY_NAME[page]))
    for text in [*parts, *in_text]:
        for section in top_level_chunks(text):
            stages = [section] if section.keys() <= STAGES.keys() else []
            plan_from(checked(Recipe, {**least, **({"stages": stages} if stages else section)}, ""))
    assert len(whole) + len(parts) > 0


def test_overrides_fit_the_recipe_of_their_page(tmp_path):
    from clipress.recipe import overrides_from, read_recipe
    from clipress.workflow.plan import plan_from

    checked = 0
    for block in blocks("bash", runnable=False):
        for words in (shlex.split(line) for line in block.lines if " --set " in line):
            (name,) = [Path(word).stem for word in words if word.endswith(".yaml")]
            path = tmp_path / f"{name}.yaml"
            path.write_text(yaml.safe_dump(recipes(block.page)[name]))
            overrides = [value for option, value in pairwise(words) if option == "--set"]
            plan_from(read_recipe(path, overrides_from(overrides)))
            checked += 1
    assert checked > 0


def test_the_stages_shown_for_the_demo_are_the_demos():
    from clipress.compress.stage import stages_from

    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    shown = yaml.safe_load(blocks("yaml", "compress")[0].text)
    for short, whole in zip(stages_from(shown["stages"]), stages_from(demo["stages"]), strict=True):
        assert short.kind == whole.kind
        assert short.settings == whole.settings


def test_the_readmes_own_recipe_runs_on_a_table_of_pairs(workplace):
    """With a small teacher in place of ViT-B-32, and fewer pairs."""
    invoke("data", "images", "images", "--format", "scenes", "--count", 24)
    rows = [
        f'"{file.read_text().splitlines()[0]}",images/{file.stem}.png' for file in sorted(Path("images").glob("*.txt"))
    ]
    for table in ("train.csv", "val.csv", "test.csv"):
        Path(table).write_text("\n".join(["title,filepath", *rows]) + "\n")
    (recipe,) = recipes("README").values()
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    smaller = ["teacher={artifact: runs/demo/teacher}", "bench={batch: [1], duration: 1, warm_up: 0}"]
    smaller += [
        f"stages.{number}.{stage}.batch_size=8" for number, stage in enumerate(("prune", "distill", "quantize"))
    ]
    smaller += ["stages.0.prune.align={head_dim: 4, ffn: 16}", "stages.2.quantize.calibrate=16"]
    (commands,) = [
        block.lines for block in blocks("bash", "README", runnable=False) if "clipress run mine" in block.text
    ]
    first, *others = [shlex.split(line)[1:] for line in commands]
    for words in ([*first, *(word for one in smaller for word in ("--set", one))], *others):
        if words[0] == "triton":
            continue
        result = invoke(*words)
        assert result.exit_code == 0, f"{words}\n{result.output}\n{result.exception!r}"
    assert Path("runs/mine/triton/python").is_dir()


SECTIONS = {
    "bench": "clipress.bench.settings:BenchSettings",
    "data": "clipress.data.spec:DataSpec",
    "export": "clipress.export.settings:ExportSettings",
    "runtime": "clipress.compress.settings:Runtime",
    "serve": "clipress.serve.settings:ServeSettings",
    "source": "clipress.data.spec:SourceSpec",
}


def section_type(name):
    from clipress.compress.stage import STAGES

    if name in STAGES:
        return STAGES[name].settings
    module, _, cls = SECTIONS[name].partition(":")
    return getattr(__import__(module, fromlist=[cls]), cls)


def rows_of_tables(page, heading):
    """The rows of tables whose first column has this heading: names in code of every cell."""
    tables = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", BY_NAME[page], re.M)
    return [[code_in(cell) for cell in row.split("|")[1:-1]] for table in tables for row in table.splitlines()]


def test_every_setting_in_a_table_exists():
    from clipress.export.targets import TARGETS

    settings = [name for page in BY_NAME for row in rows_of_tables(page, "setting") for name in row[0]]
    stages = [f"{kind}.{name}" for (kind,), _, named in rows_of_tables("compress", "stage") for name in named]
    assert len(settings) > 60 and len(stages) > 10
    for setting in settings + stages:
        first, *path = setting.split(".")
        cls = section_type(first)
        if first == "export" and path[0] in TARGETS:
            cls, path = TARGETS[path[0]].settings, path[1:]
        for number, key in enumerate(path):
            assert key in cls.model_fields, f"{setting}: no such setting"
            if number < len(path) - 1:
                inner = cls.model_fields[key].annotation
                cls = next(one for one in get_args(inner) or (inner,) if one is not type(None))


def code_in(text):
    return re.findall(r"`([^`]+)`", text)


def test_every_method_is_documented_and_every_documented_one_exists():
    from clipress.bench.runners import RUNNERS
    from clipress.compress.losses import LOSSES
    from clipress.compress.prune.criterion import CRITERIA
    from clipress.compress.prune.schedule import SCHEDULES
    from clipress.compress.stage import STAGES
    from clipress.data.sources import FORMATS
    from clipress.export.targets import TARGETS
    from clipress.models.importers import IMPORTERS
    from clipress.models.named_towers import IMAGE_TOWERS, TEXT_TOWERS
    from clipress.tasks import TASKS

    tables = {
        ("distil", "loss"): LOSSES,
        ("compress", "stage"): STAGES,
        ("data", "data format"): FORMATS,
        ("measure", "runner"): RUNNERS,
    }
    for (page, heading), registry in tables.items():
        assert sorted(name for row in rows_of_tables(page, heading) for name in row[0]) == sorted(registry)
    mentioned = {
        "compress": [*CRITERIA, *SCHEDULES, *IMPORTERS],
        "distil": [*IMAGE_TOWERS, *TEXT_TOWERS],
        "export": [*TARGETS],
        "README": [*TASKS],
    }
    for page, known in mentioned.items():
        for name in known:
            assert re.search(rf"(?<![\w-]){name}(?![\w-])", BY_NAME[page]), f"{page}.md does not mention {name}"


# links


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("[A-Z]*.md")], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            known = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in known, f"{page.name}: {target}#{anchor}"


def test_the_readme_links_to_every_page_and_is_short():
    readme = BY_NAME["README"]
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme
    assert len(PAGES) > 10 and len(readme.splitlines()) <= 125


def test_the_pages_are_in_the_source_distribution():
    assert {"graft docs", "include *.md constraints.txt Makefile"} <= set(
        (ROOT / "MANIFEST.in").read_text().splitlines()
    )
