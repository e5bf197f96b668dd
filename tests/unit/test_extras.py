"""What works without which extra, and what the rest says: imports of the others are refused in a process of its own."""

import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from blip_exports import images_of
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from small_exports import LABELS, small_image, write_classifier, write_export, write_segmenter

import clipress
from clipress.cli import COMMANDS
from clipress.errors import EXTRAS, BackendMissing, import_extra

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(clipress.__file__).parent
RECIPE = {"name": "small", "student": {}, "data": {}, "stages": [{"distill": {}}, {"prune": {}}, {"distill": {}}]}
TORCH = "This needs torch, which is not installed. Run: pip install 'clipress[compress]'"


def without(extras, *words):
    """Run a command where extras are missing; return its exit code, and what it printed and said."""
    command = [sys.executable, ROOT / "tests" / "without_extras.py", extras, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def served_without_torch(*words, extras="compress,index"):
    code, printed, said = without(extras, "clipress", *words)
    assert code == 0, said
    return printed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run folder whose last artifact, `recovered`, has the export of a CLIP, and `distilled` that of a Segmenter."""
    folder = tmp_path_factory.mktemp("runs") / "clip"
    for stage, write in (("recovered", write_export), ("pruned", write_classifier), ("distilled", write_segmenter)):
        write(folder / "export" / stage)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(small_image(seed)[1])
    return folder


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda words: " ".join(words) or "none")
def test_every_help_page_is_printed_without_any_extra(command):
    code, printed, said = without(",".join(EXTRAS), "clipress", *command, "--help")
    assert code == 0 and printed.startswith("Usage:"), said


def test_a_clip_classifies_with_its_files_alone(run, images):
    lines = served_without_torch("predict", run, images / "0.png", "--labels", "cat,dog").splitlines()
    best = clipress.load(run / "recovered").classify(images / "0.png", ["cat", "dog"]).max()
    assert len(lines) == 1 and f"{best:.1%}" in lines[0]


def test_a_classifier_and_a_segmenter_predict_with_their_files_alone(run, images, tmp_path):
    assert all(label in served_without_torch("predict", run, images, "--stage", "pruned") for label in LABELS)
    printed = served_without_torch("predict", run, images / "0.png", "--stage", "distilled", "--out", tmp_path)
    assert str(tmp_path / "0.png") in printed and Image.open(tmp_path / "0.png").size > (1, 1)


def test_a_blip_writes_captions_with_its_files_alone(blip_exports, tmp_path):
    export, _ = blip_exports["caption"]
    Image.fromarray(images_of("caption")[0]).save(tmp_path / "image.png")
    (caption,) = clipress.load(export).caption(tmp_path / "image.png")
    printed = served_without_torch("predict", export.parents[1], tmp_path / "image.png")
    assert printed == f"{tmp_path / 'image.png'}: {caption}\n"


def test_a_run_is_served_with_its_export_alone(tiny_run, tmp_path):
    code = f"""
from pathlib import Path
from clipress.recipe import read_recipe
from clipress.workflow.serve import ServeRequest, serve_run
from shutil import copytree
run = Path({str(tmp_path / "run")!r})
copytree({str(tiny_run[0])!r}, run)
print(*sorted(serve_run(run, ServeRequest("recovered"), lambda line: None)))
"""
    (tmp_path / "job.py").write_text(code)
    exit_code, printed, said = without("compress", "python", tmp_path / "job.py")
    assert exit_code == 0 and printed.split() == ["onnxruntime", "python"], said
    served = served_without_torch("serve", tmp_path / "run", "--stage", "int8", "--backend", "python")
    assert "Triton model repository of int8" in served
    assert "Version 1 is served" in served_without_torch("serve", tmp_path / "run", "--version", 1)
    assert "int8 " in served_without_torch("show", tmp_path / "run")


def test_an_index_is_built_and_searched_without_torch(run, images, tmp_path):
    words = ["index", images, "--run", run, "--out", tmp_path / "index"]
    assert without("compress,index", "clipress", *words)[::2] == (
        2, "Error: This needs faiss, which is not installed. Run: pip install 'clipress[index]'\n",
    )  # fmt: skip
    assert "Index of 3 images" in served_without_torch(*words, extras="compress")
    code = f"""
import clipress
from clipress.serve.index import open_index
model = clipress.load({str(run / "recovered")!r})
_, keys = open_index({str(tmp_path / "index")!r}).search(model.encode_image([{str(images / "2.png")!r}]), 1)
print(keys[0][0])
"""
    (tmp_path / "job.py").write_text(code)
    exit_code, printed, said = without("compress", "python", tmp_path / "job.py")
    assert exit_code == 0 and printed == f"{images / '2.png'}\n", said


def test_the_file_of_small_images_is_written_without_any_extra(tmp_path):
    code, _, said = without(",".join(EXTRAS), "clipress", "data", "images", tmp_path / "images", "--format", "scenes")
    assert code == 0 and len(list((tmp_path / "images").glob("*.png"))) == 10, said


NEEDS = {
    "run": ["demo", "--out", "OUT"],
    "auto": ["teacher", "--data", "demo", "--out", "OUT"],
    "compress": ["demo", "--out", "OUT"],
    "plan": ["demo"],
    "embed": ["demo"],
    "bench": ["RUN"],
    "bench-server": ["RUN"],
    "latency-table": ["RUN", "--out", "OUT"],
    "eval": ["RUN"],
    "import": ["RUN/export/recovered/image.onnx", "OUT"],
    "study": ["STUDY", "--runs", "OUT", "--out", "OUT"],
}
STUDY = ROOT / "configs" / "studies" / "int8.yaml"


def filled(words, **places):
    """Return words with places in them by their names."""
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    return words


@pytest.mark.parametrize("command", NEEDS)
def test_a_command_that_needs_torch_says_which_extra_has_it(run, tmp_path, command):
    words = filled(NEEDS[command], RUN=run, OUT=tmp_path / "new", STUDY=STUDY)
    code, printed, said = without("compress", "clipress", command, *words)
    assert (code, printed, said) == (2, "", f"Error: {TORCH}\n")


def test_exporting_and_the_embedded_digits_say_which_extra_they_need(run, tmp_path):
    for words, module in (
        (["export", run], "onnx"),
        (["export", "--verify", run], "onnx"),
        (["data", "images", tmp_path / "i", "--format", "digits"], "sklearn"),
        (["data", "filter", tmp_path, "--prompts", "p", "--model", run, "--keep", 1, "--out", tmp_path / "l"], "torch"),
    ):
        code, _, said = without("compress", "clipress", *words)
        assert (code, said) == (2, f"Error: {TORCH.replace('torch', module)}\n")


def test_an_artifact_without_an_export_says_that_exporting_needs_an_extra(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    code, _, said = without("compress", "clipress", "serve", folder)
    assert code == 2 and "pip install 'clipress[compress]'" in said


@pytest.mark.parametrize(
    "words", [["predict", "RUN", "IMAGES", "--labels", "a,b"], ["index", "IMAGES", "--run", "RUN", "--out", "OUT"]]
)
def test_without_any_extra_prediction_says_which_one_it_needs(run, images, tmp_path, words):
    words = filled(words, RUN=run, IMAGES=images, OUT=tmp_path / "index")
    code, _, said = without("compress,index,serve", "clipress", *words)
    assert code == 2 and re.fullmatch(
        r"Error: This needs \w+, which .* Run: pip install 'clipress\[(serve|index)\]'\n", said
    )


def test_the_python_api_names_the_extra(tmp_path):
    job = "import clipress\nfrom clipress.errors import BackendMissing\ntry: clipress.run('demo', {!r})\nexcept BackendMissing as e: print(e)"
    (tmp_path / "job.py").write_text(job.format(str(tmp_path / "out")))
    assert without("compress", "python", tmp_path / "job.py") == (0, f"{TORCH}\n", "")


def test_a_module_of_no_extra_that_is_missing_stays_a_bug():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_extra("no_such_module")
    with (
        pytest.raises(BackendMissing, match=r"needs img2dataset.*clipress\[download\]") as missing,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setitem(sys.modules, "img2dataset", None)
        import_extra("img2dataset")
    assert missing.value.exit_code == 2


def test_every_distribution_of_an_extra_is_named_with_its_modules():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    modules = {}
    for module, distributions in packages_distributions().items():
        for distribution in distributions:
            modules.setdefault(canonicalize_name(distribution), set()).add(module)
    for extra in EXTRAS:
        for wanted in map(Requirement, project["optional-dependencies"][extra]):
            found = modules.get(canonicalize_name(wanted.name))
            assert wanted.name == "clipress" or found is None or found & {*EXTRAS[extra]}, f"{extra}: {wanted}"
    base = {module for line in project["dependencies"] for module in modules[canonicalize_name(Requirement(line).name)]}
    assert not base & {module for known in EXTRAS.values() for module in known}
