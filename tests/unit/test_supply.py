"""Releases: tested requirements, complete wheels, no traces of the build machine."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

import clipress

ROOT = Path(clipress.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
PINS = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
HERE = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
REGISTRIES = [
    name[::-1] for name in ("ipyp", "detsohnohtyp", "sjmpn")
]  # Spelled backwards: this file must not name them either.
FOREIGN = {
    "a package registry": re.compile(rf"\b(?:{'|'.join(REGISTRIES)})\.[a-z]"),
    "a place on one machine": re.compile(r"(?<![\w.~])/(?:work|tmp/v|root|home/\w+)/"),
}


@pytest.fixture(scope="module")
def tracked():
    """Return all tracked files as paths from the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def applies(pin, python):
    environment = {**default_environment(), **HERE, "python_version": python, "python_full_version": f"{python}.1"}
    return pin.marker is None or pin.marker.evaluate(environment)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_tested_versions_meet_every_requirement(python):
    pins = [pin for pin in map(Requirement, PINS) if applies(pin, python)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)  # No package has two pins.
    required = [
        *PROJECT["project"]["dependencies"],
        *(line for extra in ("test", "compress", "index", "serve", "openvino") for line in EXTRAS[extra]),
    ]
    for wanted in (Requirement(line) for line in required if not line.startswith("clipress[")):
        found = versions[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(found), f"expected {wanted}, found {found} in constraints.txt"


def test_constraints_are_exact_pins_in_order():
    pins = [Requirement(line) for line in PINS]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) and not pin.url and not pin.extras for pin in pins)
    names = [canonicalize_name(pin.name) for pin in pins]
    assert names and names == sorted(names)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_installs_the_tested_versions(tmp_path, target):
    printed = subprocess.run(
        ["make", "-n", target, f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    installs = [line for line in printed.splitlines() if "pip install" in line]
    others = [line for line in installs if "--constraint constraints.txt" not in line]
    # optimum wants older versions of what constraints.txt has, so its file says every version itself.
    assert len(installs) > len(others) and all("--no-deps" in line for line in others)
    assert [line.partition("--requirement ")[2].split()[0] for line in others] == (
        ["tests/optimum.txt"] * (target == "test")
    )
    lines = (ROOT / "tests" / "optimum.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"[\w-]+==[\w.]+;", line) for line in lines if line[0] != "#")


def test_every_supported_python_is_listed():
    listed = {entry.rpartition(" ")[2] for entry in PROJECT["project"]["classifiers"] if ":: Python ::" in entry}
    assert listed == set(PYTHONS) and PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"


def test_the_wheel_contains_every_code_folder_and_its_files(tracked):
    settings = PROJECT["tool"]["setuptools"]
    folders = {path.parent for path in tracked if path.name == "__init__.py"}
    assert set(settings["packages"]) == {".".join(("clipress", *folder.parts)) for folder in folders}
    for path in tracked:
        if path.parent in folders - {Path()} and path.suffix != ".py":
            patterns = settings["package-data"].get(".".join(("clipress", *path.parent.parts)), [])
            assert any(fnmatch(path.name, pattern) for pattern in patterns), f"{path} is not in the wheel"


def test_mentioned_extras_exist(tracked):
    named = {
        extra
        for path in tracked
        if path.suffix in (".py", ".md")
        for extra in re.findall(r"clipress\[(\w+)\]", (ROOT / path).read_text(encoding="utf-8"))
    }
    assert {"download", "openvino", "pycuda", "tensorrt"} <= named <= EXTRAS.keys()


@pytest.mark.parametrize("what", FOREIGN)
def test_no_file_names_a_registry_or_a_local_path(tracked, what):
    for path in tracked:
        found = FOREIGN[what].search((ROOT / path).read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path} names {what}: {found[0]}"


def bill(**torch):
    """Return a shortened SBOM as cyclonedx-py writes it."""
    website = [{"type": "website", "url": "https://example.org"}]
    return {
        "$schema": "http://example.org/bom.json",
        "metadata": {"tools": {"components": [{"name": "tool", "externalReferences": website}]}},
        "components": [
            {"name": "clipress", "bom-ref": "clipress==1", "type": "library", "externalReferences": website},
            {
                "name": "torch",
                "bom-ref": "torch==2",
                "purl": "pkg:pypi/torch@2",
                "externalReferences": website,
                **torch,
            },
        ],
        "dependencies": [{"ref": "clipress==1", "dependsOn": ["torch==2"]}, {"ref": "torch==2"}],
    }


def filtered(bom):
    script = [sys.executable, ROOT / ".ci" / "sbom.py"]
    return subprocess.run(script, input=json.dumps(bom), capture_output=True, text=True)


def test_an_sbom_describes_clipress_without_addresses():
    found = json.loads(filtered(bill()).stdout)
    assert found == {
        "metadata": {
            "tools": {"components": [{"name": "tool"}]},
            "component": {"name": "clipress", "bom-ref": "clipress==1", "type": "application"},
        },
        "components": [{"name": "torch", "bom-ref": "torch==2", "purl": "pkg:pypi/torch@2"}],
        "dependencies": bill()["dependencies"],
    }


@pytest.mark.parametrize("place", ["see https://example.org", "file:wheel.whl", "in /srv/wheels/torch"])
def test_an_sbom_with_an_address_in_its_text_is_refused(place):
    done = filtered(bill(description=place))
    assert done.returncode == 1 and not done.stdout and "An address is left" in done.stderr
